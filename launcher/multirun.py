"""Several runs from one command, each in its own process: nothing leaks from one to the next."""

import hashlib
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from base.files import make_folder
from base.ranks import RanksError, refuse_several
from launcher import slurm
from launcher.compose import Composed, ConfigError, compose, sweep
from launcher.lanes import Lane, Running, environment, gpu_lanes, keep_busy
from launcher.slurm import TRAIN

STOPPED = {signal.SIGINT: 130}  # a run that Ctrl-C stopped says 0, but the command didn't do what it was asked to
LOGS = ".multirun"  # of runs side by side, below the runs' folder


def run_all(overrides: list[str]) -> int:
    """Check every combination, then run them: one a GPU at once, their output in files; on a single GPU or a CPU one
    after another, on the terminal. Returns the first exit code that isn't 0, 130 after Ctrl-C, else 0.

    A failing run doesn't keep the others from running; a stop (Ctrl-C, SIGTERM) does. The same command continues:
    finished runs say so and are passed over.
    """
    refuse_torchrun("-m")
    jobs = sweep(overrides)
    runs = {shlex.join(job): one.config.paths.runs for job, one in zip(jobs, checked(jobs), strict=True)}
    lanes, queue, ends = gpu_lanes("all", 1), list(runs), {}
    is_alone = len(lanes) == 1

    def start(job: str, lane: Lane) -> Running:
        number = len(runs) - len(queue)
        log = None if is_alone else log_of(runs[job], job)
        shown = "" if log is None else f" on GPU {lane}, its output in {log}"
        print(f"{chr(10) * is_alone}[{number}/{len(runs)}] train.py {job}{shown}", flush=True)
        return Running(job, lane, started(job, lane, log))

    def ended(run: Running, waiting: int, running: int, stopping: bool) -> None:
        code = run.process.returncode
        ends[run.job] = code, stopping
        if not is_alone:
            print(f"{said(code, stopping)} after {run.minutes:.1f} min: {run.job}", flush=True)

    asked = keep_busy(queue, lanes, start, ended, tell if is_alone else subprocess.Popen.send_signal)
    if asked:
        print(f"stopped; {len(queue)} of {len(runs)} runs not started", file=sys.stderr)
    for job in filter(ends.get, runs):
        print(f"{said(*ends[job]):<14} {job}")
    first = next((code for job in runs if (code := ends.get(job, (0,))[0])), 0)
    return first or (STOPPED.get(asked[0], 0) if asked else 0)


def said(code: int, stopping: bool) -> str:
    return "stopped" if stopping else "ok" if code == 0 else f"exit code {code}"


def log_of(runs: str, job: str) -> Path:
    """Where the output of one of several runs goes; a file that is there is continued."""
    name = re.sub(r"[^\w.=,+-]+", "_", job)
    cut = f"{name[:80]}-{hashlib.sha256(job.encode()).hexdigest()[:8]}"
    return Path(runs) / LOGS / f"{cut}.log"


def started(job: str, lane: Lane, log: Path | None) -> subprocess.Popen:
    """One run; without a log on this terminal, whose Ctrl-C it then gets."""
    command = [sys.executable, str(TRAIN), *shlex.split(job)]
    if log is None:
        return subprocess.Popen(command, env=environment(lane))
    make_folder("paths.runs", log.parent)
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(lane), start_new_session=True
        )


def tell(process: subprocess.Popen, number: int) -> None:
    """Pass a stop on to a run on this terminal, so that it saves and ends by itself."""
    if number != signal.SIGINT:  # Ctrl-C reaches the whole foreground group already
        process.send_signal(number)


def refuse_torchrun(what: str) -> None:
    try:
        refuse_several(what)
    except RanksError as error:
        raise ConfigError(str(error)) from error


def checked(jobs: list[list[str]], world: int = 1) -> list[Composed]:
    """What `jobs` compose to, each to numbers that fit each other and `world` processes, into a folder of its own.
    Raises ConfigError."""
    found, named, seen = [], {}, {}
    for job in jobs:
        try:
            found.append(compose(job))
            config = found[-1].config
            from training.start.derive import derive  # here: a wrong override shall not wait for torch to be imported
            from training.start.shapes import shape_of

            derive(config, shape_of(config, config.data.vocab_size).parameters_non_embedding, world)
        except ValueError as error:
            raise ConfigError(f"in {shlex.join(job)}: {error}") from error
        twin = seen.setdefault(found[-1].yaml, job)
        if twin is not job:
            raise ConfigError(f"{shlex.join(twin)} and {shlex.join(job)} are the same run; list each value once")
        name = config.run.name
        if name is not None and named.setdefault(name, job) != job:
            raise ConfigError(
                f"run.name={name}: {shlex.join(named[name])} and {shlex.join(job)} would share one folder; leave "
                "run.name out, and each run gets a name of its own"
            )
    return found


def submit_all(overrides: list[str], multirun: bool, options: dict[str, str]) -> int:
    """One SLURM job per run, after the same checks. A job that is preempted is requeued and resumes. With dry_run=true
    the start screens are shown and nothing is submitted."""
    refuse_torchrun("launcher=slurm")
    try:
        nodes, processes = slurm.ranks_of(options)
        jobs = sweep(overrides) if multirun else [overrides]
        composed = checked(jobs, nodes * processes)
        if any(one.config.dry_run for one in composed):
            print(slurm.described(jobs, options))
            return show_screens(jobs, composed, nodes, processes)
        for job, number in zip(jobs, slurm.submit_runs(jobs, options), strict=True):
            print(f"job {number}: train.py {shlex.join(job)}")
    except slurm.CellError as error:
        raise ConfigError(str(error)) from error
    return 0


def show_screens(jobs: list[list[str]], composed: list[Composed], nodes: int, processes: int) -> int:
    """Print the start screens of `jobs` on so many ranks, with the devices of this machine."""
    from training.ranks.distributed import Dist, setup  # here: see `checked`
    from training.start.failures import one_line_errors
    from training.start.launch import Request, start_screen

    with one_line_errors() as outcome:
        ranks = Dist(0, nodes * processes, 0, setup().device, local_world=processes)
        for job, one in zip(jobs, composed, strict=True):
            command = shlex.join(["train.py", *job])
            request = Request(one.config, one.yaml, one.choices, command)
            print(f"\n{command}", start_screen(request, ranks, elsewhere=True), sep="\n")
        outcome.code = 0
    return outcome.code
