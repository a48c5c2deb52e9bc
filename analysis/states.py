"""Which runs of a grid are done, running, stopped or missing, told from their folders and locks. No torch, quick."""

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path

RUN_LOCK = ".lock"  # training/signals.py holds it while a run trains
DONE, RUNNING, STOPPED, MISSING = "done", "running", "stopped", "missing"


@dataclass(frozen=True)
class State:
    """`step`: the last logged one; `loss`: the final loss of a finished run."""

    status: str
    step: int = 0
    loss: float | None = None


def cell_lock(runs: Path, name: str) -> Path:
    """The file that run_grid.py and the run it starts hold locked, from before the run folder exists."""
    return runs / ".grid" / f"{name}.lock"


def state_of(runs: Path, name: str) -> State:
    """State of the run folder runs/<name>."""
    folder = runs / name
    result = folder / "result.json"
    if result.exists():
        content = json.loads(result.read_text())
        return State(DONE, content.get("step", 0), content.get("final_loss"))
    if is_locked(cell_lock(runs, name)) or is_locked(folder / RUN_LOCK):
        return State(RUNNING, last_step(folder / "metrics.jsonl"))
    if (folder / "run.json").exists():
        return State(STOPPED, last_step(folder / "metrics.jsonl"))
    return State(MISSING)


def is_locked(path: Path) -> bool:
    """Does a living process hold `path` locked exclusively? (Locks of killed processes vanish with them.)

    Asks with a shared lock: several may ask at once, and a start waits for them (training.signals.lock_file).
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
    """The last training step in metrics.jsonl, read from its end; 0 without one."""
    if not metrics.exists():
        return 0
    with open(metrics, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65536))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the first line of the window is cut
        if record.get("kind") == "train":
            return int(record["step"])
    return 0
