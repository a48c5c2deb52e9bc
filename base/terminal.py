"""What the command lines share: argument types, and output whose reader is gone or knows fewer letters."""

import argparse
import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO


def quiet_pipes() -> None:
    """End without a traceback when the reader of our output has gone (`script | head -1`).

    Not for programs that write to pipes or sockets of their own: those would end there, too.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    any_letters()


def any_letters() -> None:
    """Print letters that a terminal's encoding (ASCII, Latin-1) lacks as escapes, rather than end the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not what a test or a notebook put in its place
            stream.reconfigure(errors="backslashreplace")


def outlive_readers() -> None:
    """Let the program go on when the reader of its output has gone: `train.py | head`, a closed terminal, a full disk
    under a log. What is printed from then on is dropped, with one note on the other stream."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    any_letters()
    out, err = Lasting(sys.stdout, "standard output"), Lasting(sys.stderr, "standard error")
    out.other, err.other = err, out
    sys.stdout, sys.stderr = out, err


class Lasting:
    """A text stream that is dropped at its first failing write. Everything else is the stream's own."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        self.other: Lasting | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Point the descriptor at nothing: what is still buffered goes there at the end, as do our children's words."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)
        if self.other is not None:
            with contextlib.suppress(ValueError):  # closed
                print(f"note: {self._name} is dropped ({error.strerror}); the program goes on", file=self.other)
                self.other.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def in_columns(lines: Sequence[Sequence[str]]) -> str:
    """A table of texts, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


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
