"""How much of a run is multiplied in 4 bits, over its phases: shares of FLOPs, no speeds (scripts/price.py)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quant import price
from quant.plan import Plan

if TYPE_CHECKING:
    from training.start.describe import Checked


def parts(checked: "Checked", first: int = 0) -> Iterator[tuple[float, Plan]]:
    """(share of the steps from `first` on, the plan that they run under)."""
    steps = checked.numbers.steps - first
    counts = [sum(map(phase.acts, range(max(first, phase.first), phase.end))) for phase in checked.phases]
    yield 1 - sum(counts) / steps, checked.plan
    for phase, count in zip(checked.phases, counts, strict=True):
        yield count / steps, phase.plan


def shares(checked: "Checked", first: int = 0) -> tuple[float, float]:
    """(of the blocks' GEMMs' FLOPs, of all products' FLOPs) in 4 bits over the run; of a fork's own steps, from `first`
    on. ValueError for a recipe that doesn't say the bits of its GEMMs."""
    shape, tokens = checked.shape, checked.numbers.tokens_per_step
    four = blocks = everything = 0.0
    for share, plan in parts(checked, first):
        flops = price.block_flops(plan, tokens)
        four += share * sum(count for kind, count in flops.items() if kind.bits == 4)
        blocks += share * flops.total()
        attention = 12 * shape.layers * shape.width * checked.numbers.seq_len * tokens
        everything += share * (flops.total() + price.head_flops(plan, tokens) + attention)
    return four / blocks, four / everything


def told(checked: "Checked", first: int) -> str | None:
    """For the start screen; None where nothing is in 4 bits, or nobody knows."""
    try:
        blocks, everything = shares(checked, first)
    except ValueError:
        return None
    if not blocks:
        return None
    return f"{blocks:.1%} of the blocks' GEMM FLOPs, {everything:.1%} of all products' are in 4 bits"
