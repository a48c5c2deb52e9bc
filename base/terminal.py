"""What the command lines share: argument types, and quiet ends of pipes."""

import argparse
import signal
from pathlib import Path


def quiet_pipes() -> None:
    """End without a traceback when the reader of our output has gone (`script | head -1`).

    Not for programs that write to pipes or sockets of their own: those would end there, too.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, got {text!r}")
    return int(text)


def existing(text: str) -> Path:
    """An argparse type: a path that exists. Only for what the user gives; a default may be missing."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return Path(text)
