"""One line of progress on standard error: rewritten in place for a person, a plain line now and then for a log."""

import sys
import time
from collections.abc import Callable

_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 15.0


class Progress:
    """Counts bytes of text; `share()` says how much of the source has been read (None: unknown)."""

    def __init__(self, label: str, share: Callable[[], float | None]):
        self.label, self.share = label, share
        self.bytes = 0
        self.is_terminal = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        self.begin = self.shown = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._show("\n", done=True)

    def add(self, size: int) -> None:
        """Count `size` more bytes of text, and show the line when it is time."""
        self.bytes += size
        if time.monotonic() - self.shown >= (_TERMINAL_SECONDS if self.is_terminal else _LOG_SECONDS):
            self.shown = time.monotonic()
            self._show("" if self.is_terminal else "\n")

    def _show(self, end: str, done: bool = False) -> None:
        seconds = max(time.monotonic() - self.begin, 1e-9)
        line = (
            f"{self.label}: {self.bytes / 1e6:.1f} MB of text, {seconds:.0f} s, {self.bytes / 1e6 / seconds:.1f} MB/s"
        )
        share = self.share()
        if share and not done:
            line += f", {100 * share:.0f} % read, {seconds / share - seconds:.0f} s left"
        sys.stderr.write(("\r\x1b[K" if self.is_terminal else "") + line + end)
        sys.stderr.flush()
