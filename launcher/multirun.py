"""Several runs from one command, one after another, each in its own process: nothing leaks from one to the next."""

import shlex
import signal
import subprocess
import sys

from base.processes import stop_signals
from base.ranks import RanksError, refuse_several
from launcher import slurm
from launcher.compose import Composed, ConfigError, compose, sweep
from launcher.slurm import TRAIN

STOPPED = {signal.SIGINT: 130}  # a run that Ctrl-C stopped says 0, but the command didn't do what it was asked to


def run_all(overrides: list[str]) -> int:
    """Check every combination, then run them. Returns the first exit code that isn't 0, 130 after Ctrl-C, else 0.

    A failing run doesn't keep the others from running; a stop (Ctrl-C, SIGTERM) does. The same command continues:
    finished runs say so and are passed over.
    """
    refuse_torchrun("-m")
    jobs = sweep(overrides)
    checked(jobs)
    ends, stop = [], 0
    for number, job in enumerate(jobs, 1):
        print(f"\n[{number}/{len(jobs)}] train.py {shlex.join(job)}", flush=True)
        code, asked = run_one(job)
        ends.append(code)
        if asked:
            stop = STOPPED.get(asked, 0)
            print(f"stopped; {len(jobs) - number} of {len(jobs)} runs not started", file=sys.stderr)
            break
    for number, (job, code) in enumerate(zip(jobs, ends, strict=False), 1):
        said = "stopped" if asked and number == len(ends) else "ok" if code == 0 else f"exit code {code}"
        print(f"{said:<14} {shlex.join(job)}")
    return next((code for code in ends if code), stop)


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
            print(slurm.described(len(jobs), options))
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


def run_one(job: list[str]) -> tuple[int, int]:
    """(exit code, the signal that asked us to stop or 0): signals are passed on, so that the run saves and ends by
    itself. After Ctrl-C its code is 0, finished or not."""
    asked = []
    child = subprocess.Popen([sys.executable, str(TRAIN), *job])

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        if number != signal.SIGINT:  # Ctrl-C reaches the whole foreground group already
            child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        return child.wait(), asked[0] if asked else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
