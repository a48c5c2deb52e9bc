"""Ranks: who we are, and the few collectives that the trainer needs. World size 1 is the same code without a group.

Started by torchrun (RANK, WORLD_SIZE and LOCAL_RANK in the environment) or plainly. Tensors travel over the device's
back end (NCCL on GPUs); counts, flags and messages over a gloo group of CPU tensors, without synchronizing the GPU.
"""

import atexit
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# Longer than the watchdog's half hour, which says more than a collective's own timeout; long enough, too, for rank 0 to
# prepare a small data set while the others wait.
TIMEOUT = timedelta(hours=1)
T = TypeVar("T")


@dataclass(frozen=True)
class Dist:
    """This process among the ranks. `group` is None at world size 1, else a gloo group for CPU tensors and objects."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    local_world: int = 1  # ranks on this node

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place, in the tensor's own dtype (FP64 for evaluation sums). CPU or device tensor."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group if tensor.device.type == "cpu" else None)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """One JSON-like object of every rank, in rank order, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's object on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def on_main(self, function: Callable[[], T]) -> T:
        """function()'s result on rank 0, given to every rank; what it raises is raised on every rank.

        For what only one process may do (locks, folders, reading checksums): without it, an error on rank 0 would leave
        the others waiting until the timeout.
        """
        if self.group is None:
            return function()
        outcome: tuple[Any, str | None] = (None, None)
        if self.is_main:
            try:
                outcome = (function(), None)
            except Exception as error:
                self.broadcast((None, f"rank 0: {error}"))
                raise
        value, failure = self.broadcast(outcome)
        if failure is not None:
            raise RuntimeError(failure)
        return value


def setup(device: str = "auto") -> Dist:
    """Join the process group if torchrun started us, else stay alone. `device`: cpu, or auto: a GPU if there is one.

    Raises RuntimeError if there are more local ranks than GPUs.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    chosen = _device(device, local_rank)
    if world == 1:
        return Dist(0, 1, 0, chosen)
    if chosen.type == "cuda":
        dist.init_process_group("nccl", device_id=chosen, timeout=TIMEOUT)
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
        group = dist.group.WORLD
    return Dist(rank, world, local_rank, chosen, group, local_world)


def teardown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End this process with `code`, exit handlers run, if it is one of several ranks; return if it is alone.

    Without the interpreter's finalization: one of gloo's threads may hold a collective's tensors for a moment after the
    collective, and one that lets go of them during finalization aborts the process (SIGABRT). torchrun would then call
    a finished run failed (torch 2.11 and 2.13; pytorch issue 190489; tests/faults/test_late_thread.py).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    # What multiprocessing does at the end of its own children.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise RuntimeError(
            f"local rank {local_rank} on {socket.gethostname()}, torch sees {torch.cuda.device_count()} GPUs: start "
            "as many processes per node as it has GPUs (torchrun --nproc-per-node=gpu)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


class SharedFlag:
    """Largest value any rank has raised, known to all ranks at the same step, without waiting for it.

    `poll(value)` starts an all-reduce on the CPU group and returns the result of the previous poll, which has finished
    by then; so all ranks act on the same step, one step after the first raised it. At world size 1 it is immediate.
    """

    def __init__(self, ranks: Dist) -> None:
        self._ranks = ranks
        self._tensor: Tensor | None = None
        self._work: Any = None

    def poll(self, value: int) -> int:
        if self._ranks.group is None:
            return value
        agreed = 0
        if self._work is not None:
            self._work.wait()
            agreed = int(self._tensor)
        self._tensor = torch.tensor(value)
        self._work = dist.all_reduce(self._tensor, dist.ReduceOp.MAX, group=self._ranks.group, async_op=True)
        return agreed
