"""Runs as SLURM jobs, through submitit (extra `slurm`). Jobs that are preempted or out of time resume when requeued.

A job is one command, `python train.py ...`, run once per node: by torchrun where a node has several processes or there
are several nodes. SLURM's warning (SIGUSR1) reaches every process of the job; train.py saves and leaves with code 75,
and submitit has the job requeued, which starts the same command again. So it is where a machine is at fault: a rank
hung, or torchrun was killed under its ranks. A run that failed by itself (a full disk, a mistake) ends its job.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.processes import descendants
from launcher.cells import CellError
from training.ranks.signals import EXIT_HUNG, EXIT_PREEMPTED

# Where train.py saves and leaves with code 75; submitit's own default, USR2, would end it without a save.
PREEMPT_SIGNAL = "USR1"
SAVE_LIMIT_S = 120
# The warning comes so long before the end that a save may take its whole limit and the requeue still be asked for.
# submitit's own 90 s end a job in the middle of a longer save, and nobody requeues it.
WARNING_S = SAVE_LIMIT_S + 60
# Time limits that a run may reach. submitit's own 3 would end a run of weeks after four of them.
MAX_TIMEOUTS = 1000
FAILURE_PAUSE_S = 10
# A job is requeued so often for faults, with no preemption or time limit between them: what always hangs shall end.
MAX_FAULTS = 3
SLURM = "slurm"  # what submitit calls the cluster that is meant unless slurm.cluster says another
NO_SLURM = "launcher=slurm: this machine has no {}; log in where SLURM is, or try slurm.cluster=local"
RUNS = "nibble"  # the name of train.py's jobs
TRAIN = Path(__file__).resolve().parents[1] / "train.py"
# Ports of the rendezvous, by job id: two jobs may share a node.
FIRST_PORT, PORTS = 20_000, 20_000
# What submitit knows under its own names; everything else is an sbatch option (partition, qos, account, ...).
TIME_LIMITS = {"timeout_min", "time", "slurm_time"}
# What has to be a whole number, and how large at least. submitit computes with them in the job: a time of "24:00:00",
# which sbatch takes, would end it at its first preemption.
NUMBERS = {"nodes": 1, "processes_per_node": 1, "gpus_per_node": 0, "timeout_min": 1, "time": 1}
NUMBERS |= {"signal_delay_s": 1, "array_parallelism": 1}
# What submitit wants as a list: words, and lines of the batch script before and after srun.
SPLIT = {"srun_args": shlex.split, "setup": str.splitlines, "teardown": str.splitlines}
SHARED = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "stderr_to_stdout")


class Task:
    """What one job runs on each node: a command, with `processes` ranks. submitit calls `checkpoint` on preemption and
    submits what it returns again."""

    def __init__(self, processes: int = 1, faults: int = 0) -> None:
        self.processes, self.faults = processes, faults
        self.pause_s = FAILURE_PAUSE_S
        self._pid: int | None = None
        self._is_fault = self._is_cancelled = False

    def __call__(self, words: list[str]) -> int:
        if callable(signal.getsignal(signal.SIGTERM)):  # submitit's, which ignores it, as this one does
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_is_cancelled", True))
        launched = self.launched(words)
        # Ignored in torchrun, which SIGUSR1 would kill under its ranks' feet; train.py installs its own handler.
        process = subprocess.Popen(launched, preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN))
        self._pid = process.pid
        code = process.wait()
        self._pid = None
        if code in (0, EXIT_PREEMPTED):
            return code
        # Without torchrun its ranks leave, too (training/ranks/watchdog.py).
        if code == EXIT_HUNG or (code == -signal.SIGKILL and launched != words):
            self.requeue(code)
        time.sleep(self.pause_s)  # a job that another node has requeued is taken away in this pause
        raise RuntimeError(f"{shlex.join(words)} failed with exit code {code}")

    def requeue(self, code: int) -> None:
        """Ask submitit, by its own signal, to requeue this job. Returns where it doesn't: on nodes but the first, with
        cluster=debug, after MAX_FAULTS, and after SIGTERM, with which scancel begins: it ends hung ranks by SIGKILL."""
        if self._is_cancelled or self.faults >= MAX_FAULTS or not callable(signal.getsignal(signal.SIGUSR1)):
            return
        self.faults += 1
        print(f"exit code {code}: a hang or a lost launcher; requeueing ({self.faults} of {MAX_FAULTS})", flush=True)
        self._is_fault = True
        os.kill(os.getpid(), signal.SIGUSR1)

    def launched(self, words: list[str]) -> list[str]:
        """`words`, a python command, behind torchrun where the job has more than one rank."""
        import submitit

        environment = submitit.JobEnvironment()
        nodes = environment.num_nodes
        if nodes == 1 and self.processes == 1:
            return words
        torchrun = [sys.executable, "-m", "launcher.torchrun", f"--nproc-per-node={self.processes}"]
        if nodes == 1:
            return [*torchrun, "--standalone", *words[1:]]
        port = FIRST_PORT + int("".join(filter(str.isdigit, environment.job_id)) or 0) % PORTS
        endpoint = f"{environment.hostnames[0]}:{port}"
        meeting = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={port}"]
        return [*torchrun, *meeting, *words[1:]]

    def checkpoint(self, words: list[str]):
        """Called in a signal handler: let train.py finish its save before the job ends, then ask for the same again."""
        from submitit.helpers import DelayedSubmission

        for pid in descendants(os.getpid()):  # SLURM has told them itself; a local trial hasn't. Twice does no harm.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + SAVE_LIMIT_S
        while self._pid is not None and is_running(self._pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        again = Task(self.processes, self.faults if self._is_fault else 0)
        again.pause_s = self.pause_s
        return DelayedSubmission(again, words)


def is_running(pid: int) -> bool:
    """Whether a child still runs; without reaping it, which Popen.wait (interrupted by our signal) will do."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def jobs_in_queue(options: dict[str, str]) -> set[str]:
    """Ids of this user's jobs that wait or run, the elements of an array one by one ("17_0", "17_1"). None with
    cluster=local|debug, where nothing waits.

    CellError if squeue doesn't answer: nothing is submitted blindly.
    """
    if options.get("cluster", SLURM) != SLURM:
        return set()
    words = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    try:
        return set(subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.split())
    except FileNotFoundError:
        raise CellError(NO_SLURM.format("squeue")) from None
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        raise CellError(f"{shlex.join(words)}: {reason}; which cells wait or run already can't be seen") from None


@dataclass(frozen=True)
class Wish:
    """What slurm.* options ask for. `processes`: a node's; `parameters`: submitit's, under its names."""

    cluster: str
    nodes: int
    processes: int
    parameters: dict[str, Any]


def read_options(name: str, options: dict[str, str]) -> Wish:
    """`options`: submitit's parameters and sbatch's, cluster=local|debug for trials, and processes_per_node (default:
    gpus_per_node, itself 1). CellError where a number isn't one, and for a job without a time limit."""
    if {"use_srun", "slurm_use_srun"} & options.keys():
        raise CellError(
            "slurm.use_srun: jobs start through srun, which passes SLURM's warning on to them; without it a job would "
            "end unsaved. Leave slurm.use_srun out"
        )
    given = {key: _typed(value) for key, value in options.items()}
    for key, value in given.items():
        least = NUMBERS.get(key.removeprefix("slurm_"))
        if least is not None and (type(value) is not int or value < least):
            unit = " of minutes" if key in TIME_LIMITS else ""
            raise CellError(f"slurm.{key}={options[key]}: give a whole number{unit}, {least} or more")
    for key, value in options.items():
        if split := SPLIT.get(key.removeprefix("slurm_")):
            try:
                given[key] = split(value)
            except ValueError as error:
                raise CellError(f"slurm.{key}={value}: {error}") from None
    given = {key: value for key, value in given.items() if value is not False}  # a flag left out
    cluster = given.pop("cluster", SLURM)
    if cluster == SLURM and not TIME_LIMITS & given.keys():
        # submitit's own five minutes would be spent on starting and saving.
        raise CellError("launcher=slurm needs a time limit: slurm.timeout_min=1440; a job that reaches it is requeued")
    processes = given.pop("processes_per_node", given.get("gpus_per_node", 1) or 1)
    settings = {key if key in SHARED or key.startswith("slurm_") else f"slurm_{key}": v for key, v in given.items()}
    defaults = {"name": name, "gpus_per_node": 1, "tasks_per_node": 1, "slurm_signal_delay_s": WARNING_S}
    return Wish(cluster, given.get("nodes", 1), processes, defaults | settings)


def _typed(value: str) -> int | bool | str:
    """submitit writes True as a flag without a value: slurm.exclusive=true is --exclusive."""
    is_whole = value.isdigit() and str(int(value)) == value  # account=007 stays as it is typed
    return int(value) if is_whole else {"true": True, "false": False}.get(value.lower(), value)


def executor_for(wish: Wish, folder: Path, options: dict[str, str], cluster: str):
    """submitit's executor with these parameters. CellError without submitit, or for an option that it refuses."""
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", PREEMPT_SIGNAL)  # submitit reads it when it is imported
    try:
        import submitit
    except ImportError:
        raise CellError("launcher=slurm needs submitit: pip install -e '.[slurm]'") from None
    if cluster == SLURM and shutil.which("srun") is None:
        raise CellError(NO_SLURM.format("srun"))
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, slurm_max_num_timeout=MAX_TIMEOUTS)
        executor.update_parameters(**wish.parameters)
    # submitit's, for an unknown option, type or cluster
    except (NameError, AssertionError, ValueError, TypeError) as error:
        given = " ".join(f"slurm.{key}={value}" for key, value in options.items())
        raise CellError(f"{given}: submitit refuses it: {str(error).splitlines()[0]}") from None
    return executor


def submit(name: str, folder: Path, commands: list[list[str]], options: dict[str, str]) -> list[str]:
    """Submit one job array; returns the job ids. CellError without submitit, or for what it or sbatch refuses."""
    if not commands:
        return []
    wish = read_options(name, options)
    executor = executor_for(wish, folder, options, wish.cluster)
    try:
        return [job.job_id for job in executor.map_array(Task(wish.processes), commands)]
    except (RuntimeError, OSError) as error:  # what sbatch says, or a folder that can't be written
        raise CellError(f"launcher=slurm: {'; '.join(filter(None, str(error).splitlines()))}") from None


def submit_runs(jobs: list[list[str]], options: dict[str, str]) -> list[str]:
    """One job for each list of train.py's overrides."""
    commands = [[sys.executable, str(TRAIN), *job] for job in jobs]
    folder, rest = split_folder(options)
    return submit(RUNS, folder, commands, rest)


def split_folder(options: dict[str, str]) -> tuple[Path, dict[str, str]]:
    """Where submitit's scripts and logs go, and the other options."""
    return Path(options.get("folder", "slurm")), {key: value for key, value in options.items() if key != "folder"}


def ranks_of(options: dict[str, str]) -> tuple[int, int]:
    """(nodes, processes on each) of a run with these options. CellError as read_options."""
    wish = read_options(RUNS, split_folder(options)[1])
    return wish.nodes, wish.processes


def described(jobs: list[list[str]], options: dict[str, str]) -> str:
    """What submit_runs would submit, without SLURM: of SLURM the batch script itself. CellError as submit_runs."""
    folder, rest = split_folder(options)
    wish = read_options(RUNS, rest)
    count, each = len(jobs), f"{wish.nodes} node{'s' * (wish.nodes > 1)}"
    each += f" x {wish.processes} process{'es' * (wish.processes > 1)}"
    lines = [f"dry run    {count} job{'s' * (count > 1)} of {each} on {wish.cluster}; nothing is submitted"]
    with tempfile.TemporaryDirectory() as nowhere:  # submitit makes its folder at once, and a dry run leaves none
        if wish.cluster == SLURM:
            lines += ["", script_of(jobs, rest, Path(nowhere).resolve(), folder.absolute()), ""]
        else:
            executor_for(wish, Path(nowhere), rest, wish.cluster)
    return "\n".join([*lines, f"logs       {folder}/", f"{'':<10} device and compile below are those of this machine"])


def script_of(jobs: list[list[str]], options: dict[str, str], nowhere: Path, folder: Path) -> str:
    """The batch script that submitit would give to sbatch: written by it below `nowhere`, where programs of SLURM's
    names do nothing, and with the paths that it would have in `folder`."""
    there = nowhere / "jobs"
    for name, says in (("sbatch", "echo Submitted batch job 0"), ("srun", ":")):
        (nowhere / name).write_text(f"#!/bin/sh\n{says}\n")
        (nowhere / name).chmod(0o755)
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{nowhere}{os.pathsep}{before}"
    try:
        submit_runs(jobs, options | {"folder": str(there)})
    finally:
        os.environ["PATH"] = before
    (script,) = there.glob("*_submission.sh")
    return script.read_text().replace(str(there), str(folder)).strip()
