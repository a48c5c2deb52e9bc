"""metrics.jsonl, the truth about a run, and the device-side buffer that lets every step be logged without waiting.

One JSON object a line, its kinds and fields declared in base/runfolder.py. Append-only, except that a resume cuts what
lies after the resumed step, so that no step appears twice.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.files import atomic_write
from base.flops import peak_of
from base.runfolder import METRICS, read_metrics
from training.start.memory import GIB


class MetricsFile:
    """Appends rows to run_dir/metrics.jsonl; each call writes whole lines and flushes them to the system."""

    def __init__(self, run_dir: Path):
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / METRICS

    def append(self, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with open(self.path, "a") as file:
            file.write(text)

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows. RunError for a line that is none."""
        return read_metrics(self.run_dir)

    def truncate(self, step: int, begins: int = 0) -> int:
        """Drop measurements after `step` (events stay: they are history); atomic. Returns how many rows went. Warns
        where the last steps before it are not there. `begins`: the step from which on the run is this folder's."""
        rows = self.rows()
        kept = [row for row in rows if row["kind"] == "event" or row["step"] <= step]
        last = max((row["step"] for row in kept), default=begins)
        if last < step:
            print(f"warning: {self.path} has nothing of steps {last + 1} to {step}: were lines removed?", flush=True)
        with atomic_write(self.path) as file:
            file.writelines((json.dumps(row) + "\n").encode() for row in kept)
        return len(rows) - len(kept)


class StepBuffer:
    """Summed nats and gradient norm of up to `capacity` steps, FP64 on the device [capacity, 2], read all at once."""

    def __init__(self, capacity: int, device: torch.device):
        self._values = torch.zeros(capacity, 2, dtype=torch.float64, device=device)
        self.count = 0

    def add_nats(self, nats: Tensor) -> None:
        """Add one micro-batch's summed nats to the step in progress."""
        self._values[self.count, 0] += nats.detach()

    def end_step(self, grad_norm: Tensor) -> None:
        self._values[self.count, 1] = grad_norm
        self.count += 1

    def read(self, reduce: Any) -> list[tuple[float, float]]:
        """(nats over ranks, gradient norm) per step, and start over. Waits for the device. `reduce` sums over ranks."""
        values = self._values[: self.count].clone()
        values[:, 0] = reduce(values[:, 0].contiguous())
        self._values.zero_()
        self.count = 0
        return [tuple(row) for row in values.tolist()]


def peak_flops(device: torch.device) -> float | None:
    """Dense BF16 peak of the GPU that MFU is measured against; None where we know no honest figure (CPUs too)."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def others_gib(device: torch.device) -> float | None:
    """Memory of the GPU that this process's tensors don't hold, GiB: other processes' above all, since CUDA's context
    and libraries take about one. A run that shares its GPU says nothing about speed. None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free - torch.cuda.memory_reserved(device)) / GIB


def memory_gib(device: torch.device) -> float | None:
    """Peak memory that tensors took since the start, GiB; on a CPU the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
