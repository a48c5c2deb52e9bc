"""A dead run: finite to the end, and nothing learned.

A rate far too high throws the weights so far that norms or softmax saturate: every logit is equal, the loss is exactly
ln V and every gradient 0, which no later step mends. Or the loss ends above a uniform guess. Neither is non-finite, so
the guard of training/nonfinite.py doesn't see it; such a run ends as it was asked to, and says what it is.
"""

import math
from collections.abc import Callable
from typing import Any

LOOKED_AT = 3  # steps in a row without a gradient
NO_GRADIENT = 1e-12  # norm; what is seen is 0
NEAR = 1e-3  # nats from ln V
WORSE = 1.0  # nats above ln V: an untrained model is within 0.1
REMEDY = "start another run with a lower optim.lr or a longer warm-up"


def without_gradient(train: list[dict[str, Any]], vocab_size: int) -> str | None:
    """Why the last of these train rows are of a dead run, in words; else None."""
    guess, last = math.log(vocab_size), train[-LOOKED_AT:]
    dead = (row["grad_norm"] < NO_GRADIENT and row["loss"] > guess - NEAR for row in last)
    if len(last) < LOOKED_AT or not all(dead):
        return None
    return f"gradients are 0 and the loss is no better than a uniform guess (ln {vocab_size} = {guess:.4f})"


def nothing_learned(train: list[dict[str, Any]], final_loss: float, vocab_size: int) -> str | None:
    """The same of a run at its end."""
    guess = math.log(vocab_size)
    if not final_loss <= guess + WORSE:  # NaN, too
        return f"the final loss of {final_loss:.4f} is worse than a uniform guess (ln {vocab_size} = {guess:.4f})"
    return without_gradient(train, vocab_size)


class Pulse:
    """Warns once, as soon as it can be known, that a run is dead. `feel` gets the train rows as they are logged."""

    def __init__(self, vocab_size: int, say: Callable[[str], None]) -> None:
        self._vocab_size, self._say = vocab_size, say
        self._last: list[dict[str, Any]] = []

    def feel(self, rows: list[dict[str, Any]]) -> None:
        was = without_gradient(self._last, self._vocab_size)
        self._last = [*self._last, *rows][-LOOKED_AT:]
        why = without_gradient(self._last, self._vocab_size)
        if why and not was:
            self._say(f"warning: dead at step {rows[-1]['step']}: {why}. Ctrl-C stops it; {REMEDY}")
