"""The reference's quantizer of blocks: candidates compete, the best is rounded, MS-EDEN corrects its scale.

Words of the formulas: hi, lo the block's reaches up and down; T the tensor's scale; for each candidate c of the spec

    r_c = stretch * max( hi / (up_c * k * T), lo / (down_c * k * T) ),  k = target_max / top; one quotient if up = down
    s_c = round(r_c), `step` E4M3 steps further for a search; 0 is dead
    u   = y / (s_c * T);  q = the nearest level of c's grid
    e_c = s_c^2 * sum (q - u)^2; infinity if dead. The lowest wins, the earlier on a tie.
Then SR rounds u to a neighbouring level of the chosen grid instead, by word `element` of Philox. A block whose
candidates are all dead has scale 1 and level 0 of a member that has one.

Shaped rounding (`shape_blocks`) goes from left to right along a row, hands the error of each element on to those that
are still to be rounded, and lets the block's candidates compete when its turn comes:

    w_j = y_j - sum_(i<j) e_i F_ij,   e_i = bf16( w_i - q_i (s T) ),   q_i the nearest level to w_i / (s T)

With F as factors the sum over earlier blocks is bf16(a) . V_j, a = sum e_i G_i in FP32, block after block.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.formats.minifloat import E4M3, round_bf16, round_stochastic
from kernels.formats.scales import Extent, fold, from_bytes, over_tile, to_bytes
from kernels.formats.selects import Candidate
from kernels.philox import Draw
from kernels.quantize.feedback import parts
from kernels.spec import NVFP4_BLOCK, QuantSpec

E4M3_LAST = 126  # the byte of 448


@dataclass(frozen=True)
class Blocks:
    """Blocks as they were rounded: elements in units of their scales, levels, scales, who is not dead, which member.

    elements, codes: FP32 [rows, groups, n]; codes are levels of the grid. scales, alive, members: FP32, bool and uint8
    [rows, groups, 1], for square tiles repeated over the 16 rows of a tile; members is None in a family of one.
    """

    elements: Tensor
    codes: Tensor
    scales: Tensor
    alive: Tensor
    members: Tensor | None = None

    @property
    def values(self) -> Tensor:
        return self.codes * self.scales


def quantize_blocks(
    y: Tensor, spec: QuantSpec, scale: Tensor, draw: Draw | None, dim: int | None, best: Blocks | None = None
) -> Blocks:
    """The blocks of the stored operand y [rows, contraction] under tensor scale `scale`. dim: of its rotation. best:
    what `best_of` gives without random bits, where that is known."""
    groups = y.view(y.shape[0], -1, spec.scaling.group)
    if spec.rounding != "sr":
        blocks = best_of(groups, spec, scale) if best is None else best
    elif spec.rounds_every_candidate:
        noise = draw.random24(len(spec.candidates) * y.numel(), spec.random_bits)
        blocks = best_of(groups, spec, scale, noise.view(-1, *groups.shape))
    else:
        blocks = best_of(groups, spec, scale) if best is None else best
        blocks = round_again(blocks, spec, draw.random24(y.numel(), spec.random_bits).view(groups.shape))
    if spec.rounding == "ms_eden":
        blocks = correct(blocks, spec, draw.random24(blocks.scales.numel()).view(blocks.scales.shape), dim)
    return blocks if blocks.members is None else settle_dead(blocks, spec)


def shape_blocks(y: Tensor, spec: QuantSpec, scale: Tensor, feedback: Tensor) -> Blocks:
    """The blocks of y [rows, K], rounded to nearest, each error handed on by `feedback` (F, BF16 values, in either form
    of kernels/quantize/feedback.py). F of zeros gives `quantize_blocks`."""
    grid, size, F = spec.family.members[0], spec.scaling.group, feedback.to(y.dtype)
    is_whole = F.shape[1] == len(F)
    within, into, out = parts(F)
    errors, sums, done = torch.zeros_like(y), y.new_zeros(len(y), into.shape[1]), []
    for start in range(0, y.shape[1], size):
        own = slice(start, start + size)
        handed = errors[:, :start] @ F[:start, own] if is_whole else round_bf16(sums) @ out[own].t()
        left = y[:, own] - handed
        found = best_of(left.unsqueeze(1), spec, scale)
        divisor = found.scales.squeeze(1) * scale
        for i in range(size):
            rounded = left[:, i : i + 1]
            rounded = round_bf16(rounded - grid.nearest(rounded / divisor) * divisor)
            errors[:, start + i : start + i + 1] = rounded
            left = left - rounded * within[start + i]  # F is zero up to element i
        sums = sums + errors[:, own] @ into[own]
        elements = (left / divisor).unsqueeze(1)
        done.append(replace(found, elements=elements, codes=grid.nearest(elements)))
    names = ("elements", "codes", "scales", "alive")
    return Blocks(*(torch.cat([getattr(blocks, name) for blocks in done], dim=1) for name in names))


def best_of(groups: Tensor, spec: QuantSpec, scale: Tensor, noise: Tensor | None = None) -> Blocks:
    """Of each block the candidate with the lowest squared error. noise [candidates, ...]: for stochastic rounding."""
    extent = spec.scaling.extent(groups, any(c.up != c.down for c in spec.candidates))
    if spec.prescale != 1:  # scales are those of the elements as they came: nothing then reaches beyond the grid
        groups = groups * spec.prescale
    best = best_error = None
    for number, candidate in enumerate(spec.candidates):
        found = round_blocks(groups, extent, candidate, spec, scale, None if noise is None else noise[number])
        if len(spec.candidates) == 1:
            return found
        error = squared_error(found, spec.is_square)
        best, best_error = (found, error) if best is None else lower(best, best_error, found, error)
    return best


def round_blocks(
    groups: Tensor, extent: Extent, candidate: Candidate, spec: QuantSpec, scale: Tensor, noise: Tensor | None
) -> Blocks:
    """All blocks by one candidate."""
    up, down = (spec.target_max * (end / spec.family.top) for end in (candidate.up, candidate.down))
    wanted = spec.scaling.wanted(extent, up, down, scale)
    scales = spec.scaling.round(wanted if candidate.stretch == 1 else candidate.stretch * wanted)
    alive = scales > 0
    if candidate.step:
        scales = torch.where(alive, e4m3_neighbour(scales, candidate.step), 0.0)
    # Dividing by infinity gives the dead blocks levels 0 and keeps the sign.
    divisor = torch.where(alive, scales * scale if spec.scaling.has_tensor_scale else scales, float("inf"))
    elements = spec.scaling.elements(groups, divisor)
    grid = spec.family.members[candidate.member]
    codes = grid.nearest(elements) if noise is None else grid.stochastic(elements, noise)
    several = len(spec.family.members) > 1
    members = torch.full_like(alive, candidate.member, dtype=torch.uint8) if several else None
    return Blocks(elements, codes, torch.where(alive, scales, 1.0), alive, members)


def e4m3_neighbour(scales: Tensor, step: int) -> Tensor:
    """E4M3 numbers (positive FP32) `step` codes further, from the smallest to 448."""
    codes = torch.where(scales < 2.0**-6, (scales * 2.0**9).to(torch.int32), to_bytes(scales, 3, 7))
    codes = (codes + step).clamp(1, E4M3_LAST)
    return torch.where(codes < 8, codes * 2.0**-9, from_bytes(codes, 3, 7))


def squared_error(blocks: Blocks, square: bool) -> Tensor:
    """[rows, groups, 1]: of each block the sum of squared error in units of the tensor scale; a dead one loses."""
    squares = (blocks.codes - blocks.elements).square()
    total = over_tile(squares, lambda tiles: fold(tiles, 1)) if square else squares
    return torch.where(blocks.alive, blocks.scales.square() * fold(total, -1), float("inf"))


def lower(one: Blocks, one_error: Tensor, other: Blocks, other_error: Tensor) -> tuple[Blocks, Tensor]:
    """The better of two, block by block; `one` where they are equal."""
    take = other_error < one_error
    return merged(take, other, one), torch.where(take, other_error, one_error)


def merged(take: Tensor, first: Blocks, second: Blocks) -> Blocks:
    """Blocks of `first` where `take`, else of `second`."""
    names = ("elements", "codes", "scales", "alive") + ("members",) * (first.members is not None)
    return Blocks(*(torch.where(take, getattr(first, name), getattr(second, name)) for name in names))


def round_again(blocks: Blocks, spec: QuantSpec, noise: Tensor) -> Blocks:
    """Elements to a neighbour in the grid that was chosen, stochastically: the choice saw no random bits."""
    codes = blocks.codes
    for number, grid in enumerate(spec.family.members):
        codes = torch.where(blocks.members == number, grid.stochastic(blocks.elements, noise), codes)
    return replace(blocks, codes=codes)


def settle_dead(blocks: Blocks, spec: QuantSpec) -> Blocks:
    """Dead blocks get level 0 of a member that has one."""
    members = torch.where(blocks.alive, blocks.members, spec.family.zero_member)
    return replace(blocks, codes=torch.where(blocks.alive, blocks.codes, 0.0), members=members)


def correct(blocks: Blocks, spec: QuantSpec, noise: Tensor, dim: int | None) -> Blocks:
    """MS-EDEN: scale each block scale by S and round it stochastically; codes stay."""
    squares = blocks.elements.square().sum(dim=-1, keepdim=True)
    products = (blocks.elements * blocks.codes).sum(dim=-1, keepdim=True)
    if spec.eden_block == "rotation":
        weights = blocks.scales.square() if spec.eden_space == "tensor" else torch.ones_like(blocks.scales)
        squares = sum_groups(weights * squares, dim // NVFP4_BLOCK)
        products = sum_groups(weights * products, dim // NVFP4_BLOCK)
    correction = torch.where(products > 0, squares / products, 1.0)
    scales = round_stochastic(correction * blocks.scales, E4M3, noise)
    alive = blocks.alive & (scales > 0)
    codes = torch.where(alive, blocks.codes, 0.0)
    return Blocks(blocks.elements, codes, torch.where(alive, scales, 1.0), alive, blocks.members)


def sum_groups(per_group: Tensor, count: int) -> Tensor:
    """Sum [rows, groups, 1] over each `count` groups and repeat the sum over them."""
    blocks = per_group.view(per_group.shape[0], -1, count)
    return blocks.sum(dim=-1, keepdim=True).expand(blocks.shape).reshape(per_group.shape)
