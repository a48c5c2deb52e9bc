"""What `profile.steps` asks for: a torch trace of some steps and, on a GPU, the memory allocator's history.

Files of the run folder's profile/, one of each a rank; a trace opens in ui.perfetto.dev, a snapshot in
docs.pytorch.org/memory_viz. Watching costs time, and no bit of the run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from base.runfolder import PROFILE

HISTORY = 100_000  # newest events of the allocator that are kept: minutes of a compiled run


class Profile:
    """Of one rank's process. `steps`: first and last step traced, [] for none; `say`: takes one line.

    The allocator's history begins here, before the model is built: an out-of-memory error comes in the first steps.
    """

    def __init__(self, steps: list[int], run: Path, rank: int, device: torch.device, say: Callable[[str], None]):
        self._first, self._last = steps or (0, -1)
        self._folder, self._rank, self._say = run / PROFILE, rank, say
        self._has_history = bool(steps) and device.type == "cuda"
        self._activities = [ProfilerActivity.CPU]
        self._activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._trace: profile | None = None
        if self._has_history:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY, stacks="python")

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step, counted from 1: traced, under its number, if it is one of those asked for."""
        if not self._first <= number <= self._last:
            yield
            return
        if self._trace is None:
            # The events of a CPU's allocator go into the trace: it has no history of its own.
            self._trace = profile(activities=self._activities, profile_memory=not self._has_history)
            self._trace.start()
        with record_function(f"step {number}"):
            yield
        if number == self._last:
            self.close()

    def close(self) -> None:
        """Write what was traced, if a trace is open: also that of a run that stops in the middle."""
        if self._trace is None:
            return
        if self._has_history:
            torch.cuda.synchronize()  # else the last step's kernels are not in it
        trace, self._trace = self._trace, None
        trace.stop()
        path = self._file("trace.json.gz")
        hidden = path.with_name(f".tmp-{path.name}")  # by this ending it is compressed
        trace.export_chrome_trace(str(hidden))
        hidden.replace(path)
        self._say(f"trace: {path} (opens in ui.perfetto.dev)")
        self.snapshot("memory")

    def snapshot(self, name: str) -> None:
        """Write the allocator's history and what it holds now."""
        if not self._has_history:
            return
        path = self._file(f"{name}.pickle")
        hidden = path.with_name(f".tmp-{path.name}")
        torch.cuda.memory._dump_snapshot(str(hidden))
        hidden.replace(path)
        self._say(f"memory: {path} (opens in docs.pytorch.org/memory_viz)")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the whole run: nothing that was seen is lost when it ends, out of memory or not."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.snapshot("out_of_memory")
            raise
        finally:
            self.close()

    def _file(self, name: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"rank{self._rank}.{name}"
