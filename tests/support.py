"""What tests of several folders share."""

import time
from collections.abc import Callable
from typing import NamedTuple

from quant import library
from quant.names import SLOTS

# Of the files in configs/quant: recipes of six slots.
SLOT_RECIPES = [name for name in library.names() if "scheme" not in library.mapping(name)]
# One of each kind, where a test of a recipe takes seconds: without those that differ from another by grids or layers
# alone.
VARIANTS = (
    "fp4_all_the_way", "hif4_rht_fwd", "mxfp4", "quartet2_eden46", "quartet2_if4", "quartet2_po2", "quartet2_po2_fwd",
    "quartet2_fp8_fprop", "quartet2_po4", "quartet2_search", "quartet2_sfp4_fwd", "tseng", "ufp4", "ufp4_eden",
    "nvidia_published",
)  # fmt: skip
KINDS = [name for name in SLOT_RECIPES if name not in VARIANTS]
# Among them those whose six operands 4-bit tensor cores can read.
FP4_RECIPES = [name for name in KINDS if all(library.load(name).operand(slot).spec.tensor_core for slot in SLOTS)]


class Done(NamedTuple):
    """What a command left, under the names of subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


def wait_until(condition: Callable[[], object], limit_s: float = 60, every_s: float = 0.02) -> None:
    """Returns when `condition()` holds; fails after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s in vain"
        time.sleep(every_s)
