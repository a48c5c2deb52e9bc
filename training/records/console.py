"""What a person sees while a run goes on: a progress bar with ETA on a terminal, plain lines elsewhere."""

import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

QUIET_S = 15.0


class Console:
    """Silent unless `active` (rank 0). `say` prints a line above the bar."""

    def __init__(self, active: bool, steps: int, done: int = 0):
        self.active = active
        self.steps = steps
        self._bar: Progress | None = None
        self._spoke = time.monotonic()
        if active and sys.stdout.isatty():
            # On a narrow terminal the status is cut, never the ETA.
            columns = (
                BarColumn(bar_width=16),
                MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(steps)) + 1)),
                TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=8)),
                TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            )
            self._bar = Progress(*columns, console=RichConsole(soft_wrap=True))
            self._task = self._bar.add_task("training", total=steps, completed=done, status="")
            self._bar.start()

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self.active:
            print(text, flush=True)

    def within(self, what: str, done: int, total: int) -> None:
        """Where a step or an evaluation has got to, if nothing was said for QUIET_S: a slow machine looks hung."""
        if not self.active or time.monotonic() - self._spoke < QUIET_S:
            return
        text = what if total == 1 else f"{what}: {done} of {total} micro-batches"
        if self._bar is not None:
            self._bar.update(self._task, status=text)
        else:
            print(f"  {text}", flush=True)
        self._spoke = time.monotonic()

    def step(self, row: dict[str, Any]) -> None:
        """`row`: the newest train row of metrics.jsonl."""
        self._spoke = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], status=describe(row))
        elif self.active:
            left = timedelta(seconds=round((self.steps - row["step"]) * row["ms_per_step"] / 1e3))
            print(f"step {row['step']}/{self.steps}  {describe(row)}  eta {left}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe(row: dict[str, Any]) -> str:
    mfu = "" if row["mfu"] is None else f"  mfu {100 * row['mfu']:.1f} %"
    speed = f"{row['ms_per_step']:.0f} ms/step  {row['tokens_per_second']:,.0f} tok/s"
    return f"loss {row['loss']:.4f}  grad {row['grad_norm']:.2f}  lr {row['lr']:.2e}  {speed}{mfu}"
