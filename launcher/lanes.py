"""Runs side by side, one a lane: the scheduler of -m and of scripts/run_grid.py. A GPU is a lane, or several; without
one the machine is a single lane."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from base.processes import stop_signals
from launcher.cells import CellError

POLL_S = 0.1
Lane = str | None  # CUDA_VISIBLE_DEVICES of a run; None: as it is


@dataclass
class Running:
    """A started run: what it is called, the lane it occupies, its process."""

    job: str
    lane: Lane
    process: subprocess.Popen
    began: float = field(default_factory=time.monotonic)

    @property
    def place(self) -> str:
        return "the CPU" if self.lane is None else f"GPU {self.lane}"

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.began) / 60


def gpu_lanes(wanted: str, per_gpu: int) -> list[Lane]:
    """CUDA_VISIBLE_DEVICES per lane, first lane of every GPU first; [None] without one. CellError for an absent GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout.splitlines()
        here = [str(i) for i in range(len([row for row in listed if row.startswith("GPU ")]))]
    except (OSError, subprocess.TimeoutExpired):
        here = []
    if here and visible is not None:
        here = [gpu for gpu in visible.split(",") if gpu]
    if not here and wanted == "all":
        return [None]
    chosen = here if wanted == "all" else wanted.split(",")
    if missing := sorted(set(chosen) - set(here)):
        raise CellError(f"gpus={wanted}: no GPU {', '.join(missing)} here (there are: {', '.join(here) or 'none'})")
    return [gpu for _ in range(per_gpu) for gpu in chosen]


def environment(lane: Lane) -> dict[str, str]:
    """What a run of this lane gets."""
    return dict(os.environ) if lane is None else {**os.environ, "CUDA_VISIBLE_DEVICES": lane}


def keep_busy(
    queue: list[str],
    lanes: list[Lane],
    start: Callable[[str, Lane], Running | None],
    ended: Callable[[Running, int, int, bool], None],
    forward: Callable[[subprocess.Popen, int], None],
    ready: Callable[[list[str]], str | None] = lambda queue: queue[0] if queue else None,
    has_lost: Callable[[Running], bool] = lambda run: False,
) -> list[int]:
    """Keep every lane busy until nothing is left or a stop is asked for, and wait for all that was started. Returns the
    signals that asked; `queue` keeps what was not started.

    start: None where a job is left alone. ended(run, waiting, running, stopping): a run is over. forward(process,
    signal): tells a run to stop. ready: which job of the queue can start now; nothing is waited for where none can and
    none runs. has_lost: asked often, of each that runs; true ends it.
    """
    running: list[Running] = []
    asked: list[int] = []

    def stop(number: int, frame: object = None) -> None:
        asked.append(number)
        for run in running:
            forward(run.process, number)

    previous = {number: signal.signal(number, stop) for number in stop_signals()}
    free = list(lanes)
    try:
        while (queue and not asked) or running:
            while free and not asked and (job := ready(queue)):
                queue.remove(job)
                if run := start(job, free[0]):
                    free.pop(0)
                    running.append(run)
                    if asked:  # while it was started: `stop` didn't know it. Told twice does no harm
                        forward(run.process, asked[-1])
            if queue and not running and not ready(queue):
                break
            time.sleep(POLL_S)
            for run in running:
                if has_lost(run):
                    forward(run.process, signal.SIGTERM)
            for run in [r for r in running if r.process.poll() is not None]:
                running.remove(run)
                free.append(run.lane)
                ended(run, len(queue), len(running), bool(asked))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return asked
