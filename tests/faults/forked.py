"""Training processes that start in milliseconds: forked from one that has imported everything. For many kills.

`Ranks` starts one process per rank, as torchrun would, in this process's image; output goes to one log.
"""

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

from launcher.compose import compose
from training.start.failures import one_line_errors
from training.start.launch import Request, launch


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def become(rank: int, world: int, port: int) -> None:
    """Make this process, just forked, one of `world` ranks, as torchrun tells its children."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    # Before there is a second thread: torch renews its thread pool at its first use after a fork, and two threads that
    # do so at once end in "Invalid thread pool!". The parent has one thread, too (conftest.py).
    torch.set_num_threads(1)


class Ranks:
    """The ranks of one start of a run."""

    def __init__(self, overrides: list[str], log: Path, world: int = 1, patch=lambda rank: None) -> None:
        """`patch(rank)` runs in each child before training: faults are planted there."""
        port = free_port()
        self.log = log
        self.pids = [self._fork(overrides, rank, world, port, patch) for rank in range(world)]
        self.codes: dict[int, int] = {}

    def _fork(self, overrides: list[str], rank: int, world: int, port: int, patch) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 99
        try:
            target = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, 1)
            os.dup2(target, 2)
            # pytest has replaced Python's own streams
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            become(rank, world, port)
            patch(rank)
            composed = compose(overrides, typed=False)
            with one_line_errors() as outcome:
                outcome.code = launch(Request(composed.config, composed.yaml, composed.choices, "test"))
            code = outcome.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def alive(self) -> list[int]:
        """Ranks still running; collects the exit codes of the others (negative: the signal)."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.pids)) if rank not in self.codes]

    def kill(self, ranks: list[int], number: int = signal.SIGKILL) -> None:
        for rank in ranks:
            os.kill(self.pids[rank], number)

    def end_survivors(self, patience_s: float) -> int:
        """What torchrun does when a rank died: SIGTERM to the others, SIGKILL later. Returns how many needed that."""
        self.kill(self.alive(), signal.SIGTERM)
        deadline = time.monotonic() + patience_s
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        stubborn = self.alive()
        self.kill(stubborn)
        self.wait()
        return len(stubborn)

    def wait(self, limit_s: float = 120) -> list[int]:
        """Exit codes in rank order. Kills everything and raises if a rank is left after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while self.alive():
            if time.monotonic() > deadline:
                left = self.alive()
                self.kill(left)
                raise AssertionError(f"ranks {left} still ran after {limit_s} s:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.01)
        return [self.codes[rank] for rank in range(len(self.pids))]
