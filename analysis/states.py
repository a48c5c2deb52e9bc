"""Which runs of a grid are done, running, diverged, stopped or missing; from folders and locks. No torch, quick."""

import fcntl
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from analysis.runs import ended_by, json_object, set_aside
from base.runfolder import LOCK, RESULT, RUN, RunError, newest_rows

DONE, RUNNING, DIVERGED, STOPPED, MISSING = "done", "running", "diverged", "stopped", "missing"
DAMAGED = "damaged"
DEAD = "dead"  # ended without having learned anything (training/dead.py); a result, as a diverged run is
OTHER = "other"  # the folder of a cell's name holds other numerics
UNKNOWN = "unknown"  # a folder holds the cell's numerics, but whether its text is the cell's can't be told


@dataclass(frozen=True)
class State:
    """`step`: the last logged one; `loss`: the final loss of a finished run; `problem`: why a cell is damaged, other
    or unknown, and what to type."""

    status: str
    step: int = 0
    loss: float | None = None
    problem: str = ""


def cell_lock(runs: Path, name: str) -> Path:
    """The file that run_grid.py and the run it starts hold locked, from before the run folder exists."""
    return runs / ".grid" / f"{name}.lock"


def state_of(runs: Path, name: str) -> State:
    """State of the run folder runs/<name>. Nothing is started in a damaged one, and the other cells go on."""
    folder = runs / name
    result, info = folder / RESULT, folder / RUN
    if result.exists():
        try:
            content = json_object(result)
        except RunError as error:
            return damaged(error, folder, result, "it goes on from its last checkpoint")
        status = DEAD if content.get("status") == DEAD else DONE
        return State(status, content.get("step", 0), content.get("final_loss"))
    if is_locked(cell_lock(runs, name)) or is_locked(folder / LOCK):
        return State(RUNNING, last_step(folder))
    if info.exists():
        try:
            json_object(info)
        except RunError as error:
            return damaged(error, folder, folder, "it starts anew")
        step = last_step(folder)
        return State(STOPPED if ended_by(newest_rows(folder), step) is None else DIVERGED, step)
    return State(MISSING)


def damaged(error: RunError, folder: Path, path: Path, then: str) -> State:
    return State(DAMAGED, last_step(folder), problem=f"{error}; type: {set_aside(path)} (then {then})")


def counted(found: Iterable[State]) -> str:
    """How many of each, such as "3 done, 1 running"."""
    statuses = [state.status for state in found]
    return ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))


def tell_problems(found: dict[str, State]) -> bool:
    """One line on standard error for each damaged, other or unknown cell of {cell: state}; is there one?"""
    problems = [
        f"{cell}: {state.status}, left alone: {state.problem}" for cell, state in found.items() if state.problem
    ]
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


def move(folder: Path, to: Path) -> str:
    """The command that renames a folder, and nothing where that name is taken."""
    return shlex.join(["mv", "-nT", str(folder), str(to)])


def is_locked(path: Path) -> bool:
    """Does a living process hold `path` locked exclusively? (Locks of killed processes vanish with them.)

    Asks with a shared lock: several may ask at once, and a start waits for them (training.ranks.signals.lock_file).
    """
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def last_step(folder: Path) -> int:
    """The last training step in a run's metrics.jsonl; 0 without one."""
    return next((int(row["step"]) for row in newest_rows(folder) if row["kind"] == "train"), 0)
