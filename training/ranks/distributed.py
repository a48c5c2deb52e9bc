"""Ranks: who we are, and the few collectives that the trainer needs. World size 1 is the same code without a group.

Started by torchrun (base/ranks.py has its variables) or plainly. Tensors travel over the device's
back end (NCCL on GPUs); counts, flags and messages over a gloo group of CPU tensors, without
synchronizing the GPU.
"""

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from base.ranks import Place, place, remedy

# Longer than the watchdog's half hour, which says more than a collective's own timeout; long enough, too, for rank 0 to
# prepare a small data set while the others wait.
TIMEOUT = timedelta(hours=1)
# For the ranks of one start to find each other: images are pulled and torch is imported meanwhile.
# torchrun's agents have found each other before.
JOIN_S = 300
WORD_AFTER_S = 15  # who waits longer says for what
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

    Raises ValueError for variables that say half of it, RuntimeError if there are more local ranks
    than GPUs or the other ranks don't come within JOIN_S.
    """
    here = place()
    chosen = _device(device, here.local_rank)
    if here.world == 1:
        return Dist(0, 1, 0, chosen)
    is_gpu = chosen.type == "cuda"
    try:
        store = _meet(here)
        names = {"store": store, "rank": here.rank, "world_size": here.world, "timeout": TIMEOUT}
        back_end, device_id = ("nccl", chosen) if is_gpu else ("gloo", None)
        dist.init_process_group(back_end, device_id=device_id, **names)
        group = dist.new_group(backend="gloo", timeout=TIMEOUT) if is_gpu else dist.group.WORLD
    except (OSError, dist.DistStoreError, dist.DistNetworkError) as error:
        host, port = here.address
        raise RuntimeError(
            f"rank {here.rank} of {here.world} didn't find the others at {host}:{port} "
            f"(MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]}. For {remedy()}"
        ) from error
    return Dist(here.rank, here.world, here.local_rank, chosen, group, here.local_world)


def _meet(here: Place) -> dist.Store:
    """The key-value store of all ranks, once they are there; OSError or torch's after JOIN_S."""
    host, port = here.address
    who = f"rank {here.rank} of {here.world}"
    word = f"{who} waits for the others at {host}:{port}, {JOIN_S} s at most"
    timer = threading.Timer(WORD_AFTER_S, print, [word], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        if here.rank:
            _wait_for_port(here.address)  # torch's client would print its stacks at the end
        limit = timedelta(seconds=JOIN_S)
        store, _, _ = next(rendezvous("env://", here.rank, here.world, timeout=limit))
    finally:
        timer.cancel()
    store.set_timeout(TIMEOUT)
    return store


def _wait_for_port(address: tuple[str, int]) -> None:
    """Return when somebody listens there; the last OSError after JOIN_S."""
    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            socket.create_connection(address, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_groups(weight: Tensor) -> list[dist.ProcessGroup]:
    """The process groups over which a weight is sharded; none for a whole one."""
    placed = enumerate(weight.placements) if isinstance(weight, DTensor) else ()
    return [weight.device_mesh.get_group(number) for number, placement in placed if placement.is_shard()]


def teardown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End this process with `code`, exit handlers run, if it is one of several ranks; return if it is alone.

    Without the interpreter's finalization: one of gloo's threads may hold a collective's tensors for a moment after the
    collective, and one that lets go of them during finalization aborts the process (SIGABRT). torchrun would then call
    a finished run failed (torch 2.11 and 2.13; pytorch issue 190489; tests/faults/test_late_thread.py).
    """
    if os.environ.get("WORLD_SIZE", "").strip() in ("", "1"):
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
