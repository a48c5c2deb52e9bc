"""What is measured of each operand slot: counters of values beyond the grid, blocks whose scale vanished, elements
rounded to zero; or anything else that a function of the operand and its `Wish` finds (quant/decompose.py).

For evaluations: eager and off the training path. Numbers come from the reference's arithmetic on the very operands,
amax and random bits of the step, whichever back end the GEMMs use.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernels.formats.minifloat import BY_NAME
from kernels.quantize import reference_impl as reference
from kernels.quantize.blocks import Blocks, quantize_blocks, shape_blocks
from kernels.spec import QuantSpec
from quant.held import Held, Wish
from quant.plan import quant_linears

# (x bf16 in its natural layout, wish) -> {name: tensor []}
Measure = Callable[[Tensor, Wish], dict[str, Tensor]]


class SlotCounter:
    """Collects what `measure` finds in one layer. `count` is called by quant.slots just before each quantization."""

    def __init__(self, measure: Measure):
        self.measure = measure
        self.slots: dict[str, dict[str, Tensor]] = {}

    def count(self, slot: str, held: Held, wish: Wish) -> None:
        """Measure one operand, made from `held`.

        Once a slot: with recompute=true a block's forward runs a second time, on the same numbers.
        """
        if wish.spec.grid == "none" or slot in self.slots:
            return
        with torch.no_grad():
            self.slots[slot] = self.measure(held.values(), wish)


def count_operand(x: Tensor, wish: Wish) -> dict[str, Tensor]:
    """int64 [] counts of one operand: elements, clipped, zeroed, blocks, underflow_blocks, non_finite, member_1 to 3,
    beyond_amax.

    clipped: elements beyond the ends of the grid. zeroed: non-zero elements that became 0. underflow_blocks: blocks
    that hold a non-zero element and whose scale rounded to zero. non_finite: 1 if amax was NaN or Inf. member_i: blocks
    that took member i of a family that has one. beyond_amax: elements above a fixed amax, which no scale then reaches.
    """
    spec, axis, signs = wish.spec, wish.axis, wish.signs
    y = reference.stored(x, axis, signs)
    largest = wish.largest(reference.amax, x)
    scale = reference.tensor_scale(largest, spec)
    counts = {"elements": y.new_tensor(y.numel()), "non_finite": (~largest.isfinite()).any()}
    if wish.amax != "exact":
        counts["beyond_amax"] = (y.abs() > wish.amax).sum()
    if not spec.is_blocked:
        elements = y / (scale if axis == 1 else scale.t())
        zero = reference.round_nearest(elements, BY_NAME[spec.grid]) == 0
        clipped = elements.abs() > BY_NAME[spec.grid].max_value
        counts |= {"clipped": clipped.sum(), "zeroed": (zero & (y != 0)).sum()}
        return {name: value.to(torch.int64) for name, value in counts.items()}
    dim = None if signs is None else signs.shape[-1]
    if wish.feedback is None:
        blocks = quantize_blocks(y, spec, scale, wish.draw, dim)
    else:
        blocks = shape_blocks(y, spec, scale, wish.feedback)
    non_zero = (y != 0).view(blocks.codes.shape)
    counts["clipped"] = beyond_grid(blocks, spec).sum()
    counts["zeroed"] = ((blocks.codes == 0) & non_zero).sum()
    counts["blocks"] = y.new_tensor(blocks.scales.numel())
    vanished = ~blocks.alive & non_zero.any(dim=-1, keepdim=True) & largest.isfinite()
    counts["underflow_blocks"] = vanished.sum()
    for number in range(1, len(spec.family.members)):
        counts[f"member_{number}"] = (blocks.members == number).sum()
    return {name: value.to(torch.int64) for name, value in counts.items()}


def beyond_grid(blocks: Blocks, spec: QuantSpec) -> Tensor:
    """Which elements lie beyond the ends of the grid that their block took."""
    beyond = torch.zeros_like(blocks.elements, dtype=torch.bool)
    for number, grid in enumerate(spec.family.members):
        here = (blocks.elements > grid.up) | (blocks.elements < -grid.down)
        beyond |= here if blocks.members is None else here & (blocks.members == number)
    return beyond


def slot_stats(
    model: nn.Module, step_fn: Callable[[], Any], measure: Measure = count_operand
) -> dict[str, dict[str, dict[str, int | float]]]:
    """{layer: {slot: {name: number}}} of what one forward, or one with its backward, quantizes: step_fn().

    Runs step_fn eagerly. The caller sets the random state and discards the gradients. Synchronizes the device.
    """
    layers = quant_linears(model)
    for module in layers.values():
        module.watch = SlotCounter(measure)
    try:
        with torch.compiler.set_stance("force_eager"):
            step_fn()
        return {
            name: {
                slot: {key: value.item() for key, value in found.items()} for slot, found in module.watch.slots.items()
            }
            for name, module in layers.items()
            if module.watch.slots
        }
    finally:
        for module in layers.values():
            module.watch = None
