"""Which runs of a grid are done, running, diverged, stopped or missing; from folders and locks. No torch, quick."""

import fcntl
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from analysis.runs import RunError, ended_by, json_object, set_aside

RUN_LOCK = ".lock"  # training/ranks/signals.py holds it while a run trains
WINDOW = 1 << 16  # bytes of metrics.jsonl read at first
DONE, RUNNING, DIVERGED, STOPPED, MISSING = "done", "running", "diverged", "stopped", "missing"
DAMAGED = "damaged"


@dataclass(frozen=True)
class State:
    """`step`: the last logged one; `loss`: the final loss of a finished run; `problem`: of a damaged one, and what to
    type."""

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
    result, info, metrics = (folder / file for file in ("result.json", "run.json", "metrics.jsonl"))
    if result.exists():
        try:
            content = json_object(result)
        except RunError as error:
            return damaged(error, metrics, result, "it goes on from its last checkpoint")
        return State(DONE, content.get("step", 0), content.get("final_loss"))
    if is_locked(cell_lock(runs, name)) or is_locked(folder / RUN_LOCK):
        return State(RUNNING, last_step(metrics))
    if info.exists():
        try:
            json_object(info)
        except RunError as error:
            return damaged(error, metrics, folder, "it starts anew")
        step = last_step(metrics)
        return State(STOPPED if ended_by(newest_first(metrics), step) is None else DIVERGED, step)
    return State(MISSING)


def damaged(error: RunError, metrics: Path, path: Path, then: str) -> State:
    return State(DAMAGED, last_step(metrics), problem=f"{error}; type: {set_aside(path)} (then {then})")


def counted(found: Iterable[State]) -> str:
    """How many of each, such as "3 done, 1 running"."""
    statuses = [state.status for state in found]
    return ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))


def tell_damaged(found: dict[str, State]) -> bool:
    """One line on standard error for each damaged cell of {cell: state}; is there one?"""
    problems = [f"{cell}: damaged, left alone: {state.problem}" for cell, state in found.items() if state.problem]
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


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


def last_step(metrics: Path) -> int:
    """The last training step in metrics.jsonl; 0 without one."""
    size, window = metrics.stat().st_size if metrics.exists() else 0, WINDOW
    while True:
        steps = (int(record["step"]) for record in newest_first(metrics, window) if record.get("kind") == "train")
        step = next(steps, 0)
        if step or window >= size:
            return step
        window *= 8  # an evaluation's row of slots is longer than the window: 150 KiB for 32 layers


def newest_first(metrics: Path, window: int = WINDOW) -> Iterator[dict]:
    """The records in the last `window` bytes of metrics.jsonl."""
    if not metrics.exists():
        return
    with open(metrics, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - window))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the first line of the window is cut
        if isinstance(record, dict):
            yield record
