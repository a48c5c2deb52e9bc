"""What the command lines share: argument types, and quiet ends of pipes."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable
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


def between(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`; neither NaN nor infinite."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"a number from {low:g} to {high:g} is needed, got {text!r}")
        return value

    return number


def existing(text: str) -> Path:
    """An argparse type: a path that exists. Only for what the user gives; a default may be missing."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return Path(text)


def one_line_on_ctrl_c(name: str) -> None:
    """From here on Ctrl-C that nobody takes is one line and exit code 130, no traceback.

    Scripts call it before their slow imports, which an impatient person interrupts, too. `name`: of the script.
    """

    def shown(kind: type[BaseException], error: BaseException, traceback: object) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            return sys.__excepthook__(kind, error, traceback)
        print(f"{name}: interrupted", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)  # Python itself would end by the signal, which callers see as -2

    sys.excepthook = shown
