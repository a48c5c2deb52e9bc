"""What tests of several folders share."""

import time
from collections.abc import Callable

from quant import library
from quant.names import SLOTS

# Of the files in configs/quant: recipes of six slots, and among them those whose six operands are all 4-bit.
SLOT_RECIPES = [name for name in library.names() if library.load(name).operands()]
FP4_RECIPES = [
    name for name in SLOT_RECIPES if all(library.load(name).operand(slot).spec.grid == "e2m1" for slot in SLOTS)
]


def wait_until(condition: Callable[[], object], limit_s: float = 60, every_s: float = 0.02) -> None:
    """Returns when `condition()` holds; fails after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s in vain"
        time.sleep(every_s)
