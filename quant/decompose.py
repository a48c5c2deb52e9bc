"""Where a quantizer's squared error comes from: its scales, its dead zone, its grid, cross terms.

After arXiv 2605.20402. Of an operand x (as it is stored, rotated where its GEMM is) Q is what
rounding to nearest made of it, under the scales s that were used, and Q* the same grid under
s* = max|x| / top of each block in FP64, the scale that no number format has rounded. top is the
level that the candidate which won the block fits the block's reach to: for E2M1 6 or, by
Four-over-Six, 4. Then

    Q - x = (Q - Q*) + dead + grid   dead: Q* - x where Q* is 0 and x isn't; grid: Q* - x elsewhere
    |Q - x|^2 = |Q - Q*|^2 + |dead|^2 + |grid|^2 + 2 <Q - Q*, grid> + 2 <Q - Q*, dead>

since dead and grid have no element in common. Random bits come on top, or errors that are handed
on (kernels/quantize/feedback.py): with R = what the slot computed - Q, |R|^2 + 2 <R, Q - x>. The
terms are correlated: no one of them is a share of the error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.formats.minifloat import BY_NAME
from kernels.philox import Draw
from kernels.quantize import reference_impl as reference
from kernels.quantize.blocks import Blocks, best_of, quantize_blocks, round_blocks, settle_dead, shape_blocks
from kernels.spec import QuantSpec
from quant.held import Wish
from quant.stats import beyond_grid

# These add up to `mse`; all are relative to |x|^2.
TERMS = ("scale", "dead", "grid", "scale_grid", "scale_dead", "random", "random_cross")
# The others: alignment <x, made>/<x, x> - 1; the cosine between Q - Q* and grid; shares of the
# elements in the dead zone of Q*, beyond the ends of the grid, and that are not 0 and became 0; the
# mean of log2(s/s*) over blocks.
NAMES = ("mse", *TERMS, "align", "cos", "dead_share", "clipped", "underflowed", "log2_scale")


@dataclass(frozen=True)
class Parts:
    """An operand in FP64: x, Q, Q*, what the slot made; where it clipped; log2(s/s*) of blocks, NaN
    for dead ones; the blocks themselves, where the format has some."""

    x: Tensor
    nearest: Tensor
    ideal: Tensor
    made: Tensor
    clipped: Tensor
    log2_scale: Tensor
    blocks: Blocks | None = None


def decompose(x: Tensor, wish: Wish) -> dict[str, Tensor]:
    """{NAMES: FP64 []} of the operand that `wish` makes of x (bf16, natural layout). Not finite where
    amax isn't."""
    return terms(parts_of(x, wish))


def parts_of(x: Tensor, wish: Wish) -> Parts:
    """Nothing in it waits for the device."""
    y = reference.stored(x, wish.axis, wish.signs)
    largest = wish.largest(lambda y, axis, signs, per_row: reference.amax_stored(y, axis, per_row), y)
    scale = reference.tensor_scale(largest, wish.spec)
    if wish.spec.per_row and wish.axis == 0:
        scale = scale.t()
    dim = None if wish.signs is None else wish.signs.shape[-1]
    return stored_parts(y, wish.spec, scale, wish.draw, dim, wish.feedback)


def stored_parts(
    y: Tensor,
    spec: QuantSpec,
    scale: Tensor,
    draw: Draw | None = None,
    dim: int | None = None,
    feedback: Tensor | None = None,
) -> Parts:
    """Of a stored operand y (FP32 [rows, contraction]) under its tensor scale; dim: of its rotation."""
    return of_blocks(y, spec, scale, draw, dim, feedback) if spec.is_blocked else of_whole(y, spec, scale)


def terms(parts: Parts) -> dict[str, Tensor]:
    """{NAMES: FP64 []}"""
    energy = parts.x.square().sum()
    error, rest = parts.nearest - parts.x, parts.ideal - parts.x
    off_scale = parts.nearest - parts.ideal
    is_dead = (parts.ideal == 0) & (parts.x != 0)
    dead, grid = torch.where(is_dead, rest, 0.0), torch.where(is_dead, 0.0, rest)
    random = parts.made - parts.nearest
    sums = {
        "mse": (parts.made - parts.x).square().sum(),
        "scale": off_scale.square().sum(),
        "dead": dead.square().sum(),
        "grid": grid.square().sum(),
        "scale_grid": 2 * (off_scale * grid).sum(),
        "scale_dead": 2 * (off_scale * dead).sum(),
        "random": random.square().sum(),
        "random_cross": 2 * (random * error).sum(),
        "align": (parts.x * (parts.made - parts.x)).sum(),
    }
    shares = {
        "dead_share": is_dead.double().mean(),
        "clipped": parts.clipped.double().mean(),
        "underflowed": ((parts.made == 0) & (parts.x != 0)).double().mean(),
        "log2_scale": parts.log2_scale.nanmean(),
    }
    cosine = sums["scale_grid"] / 2 / (sums["scale"] * sums["grid"]).sqrt()
    cosine = cosine.nan_to_num(0.0)  # where one of both is 0
    found = {name: value / energy for name, value in sums.items()} | {"cos": cosine} | shares
    return {name: found[name] for name in NAMES}


def of_blocks(
    y: Tensor, spec: QuantSpec, scale: Tensor, draw: Draw | None, dim: int | None, feedback: Tensor | None
) -> Parts:
    """Of a quantizer whose blocks have scales."""
    groups = y.view(y.shape[0], -1, spec.scaling.group)
    blocks = best_of(groups, spec, scale)
    best = best_scales(groups, blocks, spec, scale)
    nearest = blocks if blocks.members is None else settle_dead(blocks, spec)
    if feedback is not None:
        made = shape_blocks(y, spec, scale, feedback)
    else:
        made = quantize_blocks(y, spec, scale, draw, dim, blocks) if spec.draws_random_bits else nearest
    x, outer = groups.double(), (scale * (1.0 / spec.prescale)).double()
    divisor = torch.where(best > 0, best, 1.0)
    ratio = (nearest.scales * outer / divisor).log2()
    return Parts(
        x=x,
        nearest=nearest.values.double() * outer,
        ideal=on_grid((x / divisor).float(), nearest.members, spec).double() * divisor,
        made=made.codes.double() * made.scales.double() * outer,
        clipped=beyond_grid(made, spec),
        log2_scale=torch.where(nearest.alive & (best > 0), ratio, float("nan")),
        blocks=made,
    )


def best_scales(groups: Tensor, blocks: Blocks, spec: QuantSpec, scale: Tensor) -> Tensor:
    """FP64 [rows, groups, 1]: s* of each block, of the first candidate that has the block's scale and member."""
    sides = any(c.up != c.down for c in spec.candidates)
    extent, exact = spec.scaling.extent(groups, sides), spec.scaling.extent(groups.double(), sides)
    best = None
    for candidate in reversed(spec.candidates):
        ends = candidate.up / candidate.stretch, candidate.down / candidate.stretch
        wanted = exact.over(*ends, 1.0)
        if best is None:
            best = wanted
            continue
        found = round_blocks(groups, extent, candidate, spec, scale, None)
        same = (found.scales == blocks.scales) & (found.alive == blocks.alive)
        if blocks.members is not None:
            same &= found.members == blocks.members
        best = torch.where(same, wanted, best)
    return best


def on_grid(elements: Tensor, members: Tensor | None, spec: QuantSpec) -> Tensor:
    """FP32 elements in units of their scales to the nearest level of each block's member."""
    codes = spec.family.members[0].nearest(elements)
    for number, grid in enumerate(spec.family.members[1:], start=1):
        codes = torch.where(members == number, grid.nearest(elements), codes)
    return codes


def of_whole(y: Tensor, spec: QuantSpec, scale: Tensor) -> Parts:
    """Of FP8: one scale for the tensor, or for each row of y."""
    grid, x = BY_NAME[spec.grid], y.double()
    largest = x.abs().amax(dim=1, keepdim=True) if spec.per_row else x.abs().amax()
    best = torch.where(largest > 0, largest / grid.max_value, 1.0)
    nearest = reference.round_nearest(y / scale, grid).double() * scale
    return Parts(
        x=x,
        nearest=nearest,
        ideal=reference.round_nearest((x / best).float(), grid).double() * best,
        made=nearest,
        clipped=(y / scale).abs() > grid.max_value,
        log2_scale=(scale.double() / best).log2(),
    )
