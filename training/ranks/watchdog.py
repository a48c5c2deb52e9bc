"""Ends a rank that hangs or is left alone, and says which rank is the cause.

A rank that waits for another one waits inside a collective, where Python can't help; a thread of each rank can. It
publishes what its rank is doing, and when its rank has shown no progress for `timeout_s` it prints everyone's last sign
of life and its own Python stacks, and ends the process (torchrun then ends the others). It also ends the process
when torchrun has died: `kill -9` of the launcher must not leave ranks behind that hold GPUs.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from training.ranks.distributed import Dist
from training.ranks.signals import EXIT_HUNG, EXIT_ORPHAN

CHECK_S = 1.0


class Watchdog:
    """`beat(step, doing)` is cheap and called at every micro-batch. Use as a context manager around the training loop.

    Times are monotonic, so that a change of the clock neither triggers nor hides anything.
    """

    def __init__(self, ranks: Dist, timeout_s: float) -> None:
        self._ranks, self._timeout_s = ranks, timeout_s
        self._last = (time.monotonic(), -1, "starting")
        self._stop = threading.Event()
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._store = _store(ranks)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int, doing: str) -> None:
        self._last = (time.monotonic(), step, doing)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(CHECK_S, self._timeout_s / 4)):
            when, step, doing = self._last
            silent_s = time.monotonic() - when
            if self._parent is not None and os.getppid() != self._parent:
                _end(EXIT_ORPHAN, f"rank {self._ranks.rank}: torchrun (pid {self._parent}) is gone; stopping")
            self._publish(step, doing, silent_s)
            if silent_s > self._timeout_s:
                _end(EXIT_HUNG, self._report(step, doing, silent_s), stacks=True)

    def _publish(self, step: int, doing: str, silent_s: float) -> None:
        sign = {"step": step, "doing": doing, "silent_s": silent_s, "host": socket.gethostname()}
        if self._store is not None:
            with contextlib.suppress(dist.DistError, RuntimeError):  # rank 0, which serves it, has ended
                self._store.set(f"watchdog/{self._ranks.rank}", json.dumps(sign))

    def _report(self, step: int, doing: str, silent_s: float) -> str:
        lines = [f"watchdog: rank {self._ranks.rank} made no progress for {silent_s:.0f} s at step {step}, {doing}."]
        signs = {rank: sign for rank in range(self._ranks.world) if (sign := self._sign(rank)) is not None}
        if self._store is not None:
            lines += [f"  rank {rank}: {_describe(sign)}" for rank, sign in signs.items()]
            lines += [f"  rank {rank}: no sign of life" for rank in range(self._ranks.world) if rank not in signs]
            behind = _furthest_behind(signs)
            if behind is not None:
                lines.append(f"  rank {behind} on {signs[behind]['host']} is furthest behind: look there first.")
        lines.append("The same command resumes from the last checkpoint. This rank's stacks:")
        return "\n".join(lines)

    def _sign(self, rank: int) -> dict[str, Any] | None:
        with contextlib.suppress(dist.DistError, RuntimeError):
            if self._store is not None and self._store.check([f"watchdog/{rank}"]):
                return json.loads(self._store.get(f"watchdog/{rank}"))
        return None


def _store(ranks: Dist) -> Any:
    """Our own connection to the process group's key-value store: a blocked main thread may hold the other one."""
    if ranks.group is None:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)


def _describe(sign: dict[str, Any]) -> str:
    return f"step {sign['step']}, {sign['doing']}, silent for {sign['silent_s']:.0f} s, on {sign['host']}"


def _furthest_behind(signs: dict[int, dict[str, Any]]) -> int | None:
    """The rank with the oldest progress, or None if all are at the same point."""
    points = {rank: (sign["step"], sign["doing"]) for rank, sign in signs.items()}
    if len(set(points.values())) < 2:
        return None
    return min(signs, key=lambda rank: (signs[rank]["step"], -signs[rank]["silent_s"]))


def _end(code: int, message: str, stacks: bool = False) -> None:
    print(message, file=sys.stderr, flush=True)
    if stacks:
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        time.sleep(2 * CHECK_S)  # the first rank to end makes torchrun kill the others: let them speak too
    os._exit(code)
