"""Signals that ask a run to stop, and the lock that keeps two processes out of one run folder.

SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGHUP (a closed terminal, unless nohup ignores it) set a flag; the loop looks at
it before each batch of training and evaluation, saves, and ends with `StopFlag.exit_code`. A second Ctrl-C ends at
once, without saving. Exit codes:

    0    finished, or stopped by Ctrl-C after saving
    75   stopped by SIGTERM, SIGUSR1 or SIGHUP (preemption) after saving: start the same command again. EX_TEMPFAIL of
         sysexits.h, so that a requeue script can tell it from a failure
    74   a rank hung, 71: torchrun is gone (training/ranks/watchdog.py). EX_IOERR and EX_OSERR
    130  second Ctrl-C
"""

import contextlib
import fcntl
import os
import signal
import time
from pathlib import Path
from types import FrameType

from base.files import flock
from base.processes import stop_signals
from base.runfolder import LOCK

EXIT_PREEMPTED = 75
EXIT_HUNG = 74
EXIT_ORPHAN = 71
EXIT_KILLED_BY_USER = 130
LOCK_WAIT_S = 0.2
# Larger is more urgent: what one rank got decides for all (distributed.SharedFlag takes the maximum).
INTERRUPT, PREEMPT = 1, 2
NAMES = {INTERRUPT: "interrupt (Ctrl-C)", PREEMPT: "preemption (SIGTERM, SIGUSR1 or SIGHUP)"}


class StopFlag:
    """Level of the stop asked for: 0, INTERRUPT or PREEMPT. Installs its handlers until `restore`."""

    def __init__(self) -> None:
        self.level = 0
        self._interrupted = False
        self._previous = {number: signal.signal(number, self._handle) for number in stop_signals()}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            tell(b"\nstopped at once by a second Ctrl-C; the same command resumes from the last checkpoint\n")
            os._exit(EXIT_KILLED_BY_USER)
        if number == signal.SIGINT:
            self._interrupted = True
            tell(b"\nCtrl-C: saving after this batch (again to stop at once, without saving)\n")
        self.level = max(self.level, INTERRUPT if number == signal.SIGINT else PREEMPT)

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @staticmethod
    def exit_code(level: int) -> int:
        return EXIT_PREEMPTED if level == PREEMPT else 0


def tell(text: bytes) -> None:
    """Write to standard error from a signal handler; nobody may be there to read it."""
    with contextlib.suppress(OSError):
        os.write(2, text)


def lock_file(descriptor: int) -> None:
    """Lock exclusively, trying for 0.2 s: who asks whether a run is going on holds its lock shared for a moment.

    Raises BlockingIOError if another process has it, OSError where there are no locks.
    """
    end = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.01)


class RunLock:
    """Exclusive use of a run folder, held by rank 0 for all ranks.

    A kernel lock (flock), not the file's existence: it ends with the process, so that nothing is left by kill -9.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / LOCK
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock. Raises RuntimeError, naming the holder, if another process has it."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            lock_file(descriptor)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise RuntimeError(
                f"{self.path.parent} is in use by another process ({holder}). Wait for it, stop it, or give this run "
                "another run.name"
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
