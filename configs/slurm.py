"""Runs as SLURM jobs, through submitit (extra `slurm`). Jobs that are preempted or out of time resume when requeued."""

import os
import shlex
import subprocess
from pathlib import Path

from configs.grid import GridError

# Where train.py saves and leaves with code 75; submitit's own default, USR2, would end it without a save.
PREEMPT_SIGNAL = "USR1"
PREEMPTED = 75


class Task:
    """What one job runs: a command. submitit calls `checkpoint` on preemption and submits what it returns again."""

    def __call__(self, words: list[str]) -> int:
        code = subprocess.run(words).returncode
        if code not in (0, PREEMPTED):
            raise RuntimeError(f"{shlex.join(words)} failed with exit code {code}")
        return code

    def checkpoint(self, words: list[str]):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, words)


def submit(name: str, folder: Path, commands: list[list[str]], options: dict[str, str]) -> list[str]:
    """Submit one job array; returns the job ids. `options`: submitit parameters, and cluster=local|debug for trials.

    GridError without submitit.
    """
    try:
        import submitit
    except ImportError:
        raise GridError("launcher=slurm needs submitit: pip install -e '.[slurm]'") from None
    if not commands:
        return []
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", PREEMPT_SIGNAL)
    settings = {key: int(value) if value.isdigit() else value for key, value in options.items() if key != "cluster"}
    executor = submitit.AutoExecutor(folder=folder, cluster=options.get("cluster"))
    executor.update_parameters(**{"name": name, "gpus_per_node": 1, "tasks_per_node": 1, **settings})
    return [job.job_id for job in executor.map_array(Task(), commands)]
