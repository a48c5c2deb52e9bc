"""The definition of the quantizers: pure PyTorch, any device, IEEE FP32, true division, parentheses as written.

With y the stored operand [rows, contraction] after rotation, v = target_max, C = scale_cap, blocks g of 16 (or 16x16):

    T   = amax / (C * v); at least 2^-126; 1 if amax = 0; NaN if amax is not finite; pow2: rounded up
    s_g = rne_e4m3( max_g|y| / (v * T) ); 0 is replaced by 1 and the block's codes are 0 ("dead")
    u   = y / (s_g * T);  q = round_e2m1(u), to nearest even or stochastically by word `element` of Philox
    4/6:     also s4_g = rne_e4m3( 1.5 * (max_g|y| / (v * T)) ); with e = s_g^2 * sum_g (q - u)^2 the lower e wins, six
             wins ties; a dead branch loses to a live one; with SR the second branch rounds by words count .. 2 count-1
    MS-EDEN: S = sum u^2 / sum u q over the group of 16; over the rotation block both sums are weighted by s_g^2
             (tensor space) or not (scaled space); 1 if the denominator is 0;
             s_g <- sr_e4m3( min(S * s_g, 448) ) by word `block` of Philox, 0 replaced by 1 and codes 0; q and T stay
    value = q * s_g (exact), scale = T

The sums of MS-EDEN and of rotations run over FP32 in an order that may differ between devices, those of 4/6 in that of
`fold`; all else is the same everywhere, bit for bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import philox
from kernels.formats import nvfp4
from kernels.formats.minifloat import (
    BY_NAME,
    E2M1,
    E4M3,
    FP32_TINY,
    next_power_of_two,
    round_bf16,
    round_nearest,
    round_stochastic,
)
from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.quantize import Quantized
from kernels.spec import NVFP4_BLOCK, QuantSpec


@dataclass(frozen=True)
class Blocks:
    """One rounding of the blocks: scaled elements, codes, block scales, and which blocks have a non-zero scale.

    elements, codes: FP32 [rows, groups, 16]. scales, alive: FP32 and bool, [rows, groups, 1], for square tiles repeated
    over the 16 rows of a tile.
    """

    elements: Tensor
    codes: Tensor
    scales: Tensor
    alive: Tensor


def unavailable() -> str | None:
    """None: the reference runs wherever PyTorch does."""
    return None


def rht_signs(rng: Tensor, layer: Tensor, gemm: int, dim: int, fixed: bool) -> Tensor:
    if fixed:
        rng, layer = torch.cat((rng[:1], torch.zeros_like(rng[1:]))), 0
    return philox.random_signs(rng, layer, gemm, dim)


def hadamard(dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """[dim, dim] of +1 and -1 in Sylvester's order: entry (i, j) is -1 to the number of bits that i and j share."""
    matrix = torch.ones(1, 1, device=device, dtype=dtype)
    while matrix.shape[0] < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def stored(x: Tensor, axis: int, signs: Tensor | None) -> Tensor:
    """FP32 [rows, contraction], contiguous, rotated: (signs * x) @ H in blocks along the contraction, unnormalised."""
    y = (x if axis == 1 else x.t()).to(torch.float32).contiguous()
    if torch.compiler.is_compiling():
        y = round_bf16(y)  # Inductor drops a BF16 rounding that is fused with this read; a no-op on BF16 values
    if signs is None:
        return y
    rotated = (y.view(-1, signs.shape[0]) * signs) @ hadamard(signs.shape[0], y.device)
    return rotated.view(y.shape)


def amax(x: Tensor, axis: int, signs: Tensor | None, per_row: bool) -> Tensor:
    if per_row:
        rows = stored(x, axis, signs).abs().amax(dim=1, keepdim=True)
        return rows if axis == 1 else rows.t()
    if signs is not None:
        return stored(x, axis, signs).abs().amax()
    # A reduction of rows and then of the result lets Inductor fuse the first into whatever produced x. It may then see
    # x before its rounding to BF16; rounding is monotone, so rounding the maximum gives the same number.
    return round_bf16(x.abs().amax(-1).amax().to(torch.float32))


def amax_packed(p: NVFP4Tensor, axis: int, signs: Tensor | None, per_row: bool) -> Tensor:
    return amax(p.values(), axis, signs, per_row)


def tensor_scale(amax: Tensor, spec: QuantSpec) -> Tensor:
    """FP32, shaped like amax: T."""
    # A tensor as divisor: on CUDA torch multiplies by the reciprocal where the divisor is a Python number.
    scale = (amax / torch.full_like(amax, spec.scale_cap * spec.target_max)).clamp(min=FP32_TINY)
    if spec.tensor_scale == "pow2":
        scale = next_power_of_two(scale)
    scale = torch.where(amax == 0, torch.ones_like(scale), scale)
    return torch.where(amax.isfinite(), scale, torch.full_like(scale, float("nan")))


def quantize(
    x: Tensor,
    spec: QuantSpec,
    axis: int,
    amax: Tensor | None,
    signs: Tensor | None,
    rng: Tensor | None,
    layer: Tensor | None,
    slot: int,
    want: tuple[str, ...],
) -> Quantized:
    if spec.grid == "none" and signs is None:
        return Quantized(x, None)
    y = stored(x, axis, signs)
    if spec.grid == "none":
        return Quantized(y if axis == 1 else y.t(), None)
    scale = tensor_scale(amax, spec)
    if not spec.is_nvfp4:
        codes = round_nearest(y / (scale if axis == 1 else scale.t()), BY_NAME[spec.grid])
        return Quantized(_operand(codes, axis), scale)
    blocks = quantize_blocks(y, spec, scale, rng, layer, slot, signs)
    values = _operand((blocks.codes * blocks.scales).view(y.shape), axis) if "values" in want else None
    return Quantized(values, scale, _pack(y, blocks, scale, spec.is_square) if "packed" in want else None)


def quantize_both(
    x: Tensor,
    specs: tuple[QuantSpec, QuantSpec],
    signs: tuple[Tensor | None, Tensor | None],
    rng: Tensor,
    layer: Tensor,
    slots: tuple[int, int],
    wants: tuple[tuple[str, ...], tuple[str, ...]],
) -> tuple[Quantized, Quantized]:
    return each_axis(quantize, amax, x, specs, signs, rng, layer, slots, wants)


def each_axis(quantize, amax, x, specs, signs, rng, layer, slots, wants) -> tuple[Quantized, Quantized]:
    """`quantize_both` as two calls of the functions that are handed in."""
    made = []
    for axis, spec, sign, slot, want in zip((1, 0), specs, signs, slots, wants, strict=True):
        largest = None if spec.grid == "none" else amax(x, axis, sign, spec.per_row)
        made.append(quantize(x, spec, axis, largest, sign, rng, layer, slot, want))
    return made[0], made[1]


def requantize(
    p: NVFP4Tensor,
    spec: QuantSpec,
    axis: int,
    amax: Tensor | None,
    signs: Tensor | None,
    rng: Tensor | None,
    layer: Tensor | None,
    slot: int,
    want: tuple[str, ...],
) -> Quantized:
    out = quantize(p.values(), spec, axis, amax, signs, rng, layer, slot, want)
    scale = p.global_scale if out.scale is None else out.scale * p.global_scale
    packed = out.packed and NVFP4Tensor(out.packed.codes, out.packed.block_scales, scale)
    return Quantized(out.values, scale, packed)


def dequantize(p: NVFP4Tensor, axis: int) -> Quantized:
    return Quantized(_operand(p.values(), axis), p.global_scale)


def quantize_blocks(
    y: Tensor,
    spec: QuantSpec,
    scale: Tensor,
    rng: Tensor | None,
    layer: Tensor | None,
    slot: int,
    signs: Tensor | None,
) -> Blocks:
    """Codes and block scales of the stored, rotated operand y [rows, contraction] under tensor scale `scale`."""
    groups = y.view(y.shape[0], -1, NVFP4_BLOCK)
    ratio = _block_max(groups, spec.is_square) / (spec.target_max * scale)
    branches = 2 if spec.select == "four_over_six" else 1
    noise = (None,) * branches
    if spec.rounding == "sr":  # each branch rounds by words of its own
        noise = philox.random24(rng, layer, slot, branches * y.numel()).view(branches, *groups.shape)
    blocks = _round_blocks(groups, ratio, scale, noise[0])
    if spec.select == "four_over_six":
        blocks = _lower_error(blocks, _round_blocks(groups, 1.5 * ratio, scale, noise[1]), spec.is_square)
    if spec.rounding == "ms_eden":
        noise = philox.random24(rng, layer, slot, ratio.numel()).view(ratio.shape)
        return _correct(blocks, spec, noise, signs)
    return blocks


def _round_blocks(groups: Tensor, ratio: Tensor, scale: Tensor, noise: Tensor | None) -> Blocks:
    scales = round_nearest(ratio, E4M3)
    alive = scales > 0
    # Dividing by infinity gives the dead blocks codes 0 and keeps the sign.
    elements = groups / torch.where(alive, scales * scale, float("inf"))
    codes = round_nearest(elements, E2M1) if noise is None else round_stochastic(elements, E2M1, noise)
    return Blocks(elements, codes, torch.where(alive, scales, 1.0), alive)


def _block_max(groups: Tensor, square: bool) -> Tensor:
    """[rows, groups, 1]; the maximum of a 16x16 tile is repeated over its rows."""
    row_max = groups.abs().amax(dim=-1, keepdim=True)
    return _over_tile(row_max, lambda tiles: tiles.amax(dim=1, keepdim=True)) if square else row_max


def _over_tile(per_row: Tensor, reduce) -> Tensor:
    """Reduce [rows, groups, n] over each 16 rows and repeat the result over them."""
    tiles = per_row.view(per_row.shape[0] // NVFP4_BLOCK, NVFP4_BLOCK, -1)
    return reduce(tiles).expand(tiles.shape).reshape(per_row.shape)


def _lower_error(six: Blocks, four: Blocks, square: bool) -> Blocks:
    """Four-over-Six: of each block the branch with the lower sum of squared error, in units of the tensor scale."""

    def error(blocks: Blocks) -> Tensor:
        squares = (blocks.codes - blocks.elements).square()
        total = _over_tile(squares, lambda tiles: fold(tiles, 1)) if square else squares
        return torch.where(blocks.alive, blocks.scales.square() * fold(total, -1), float("inf"))

    take_four = error(four) < error(six)
    return Blocks(
        torch.where(take_four, four.elements, six.elements),
        torch.where(take_four, four.codes, six.codes),
        torch.where(take_four, four.scales, six.scales),
        torch.where(take_four, four.alive, six.alive),
    )


def fold(x: Tensor, dim: int) -> Tensor:
    """Sum over `dim`, a power of two kept as size 1, by adding its upper half to its lower half until one is left.

    An order that every back end repeats: the errors of both branches are often equal, and then last bits would decide.
    """
    while x.shape[dim] > 1:
        low, high = x.chunk(2, dim=dim)
        x = low + high
    return x


def _correct(blocks: Blocks, spec: QuantSpec, noise: Tensor, signs: Tensor | None) -> Blocks:
    """MS-EDEN: scale each block scale by S and round it stochastically; codes stay."""
    squares = blocks.elements.square().sum(dim=-1, keepdim=True)
    products = (blocks.elements * blocks.codes).sum(dim=-1, keepdim=True)
    if spec.eden_block == "rotation":
        weights = blocks.scales.square() if spec.eden_space == "tensor" else torch.ones_like(blocks.scales)
        per_block = signs.shape[0] // NVFP4_BLOCK
        squares = _sum_groups(weights * squares, per_block)
        products = _sum_groups(weights * products, per_block)
    correction = torch.where(products > 0, squares / products, 1.0)
    scales = round_stochastic(correction * blocks.scales, E4M3, noise)
    alive = blocks.alive & (scales > 0)
    codes = torch.where(alive, blocks.codes, 0.0)
    return Blocks(blocks.elements, codes, torch.where(alive, scales, 1.0), alive)


def _sum_groups(per_group: Tensor, count: int) -> Tensor:
    """Sum [rows, groups, 1] over each `count` groups and repeat the sum over them."""
    blocks = per_group.view(per_group.shape[0], -1, count)
    return blocks.sum(dim=-1, keepdim=True).expand(blocks.shape).reshape(per_group.shape)


def _operand(values: Tensor, axis: int) -> Tensor:
    """Back to x's own layout; BF16 on a GPU, FP32 on a CPU (whose FP32 GEMM is the faster one)."""
    values = values if values.device.type == "cpu" else values.to(torch.bfloat16)
    return values if axis == 1 else values.t()


def _pack(y: Tensor, blocks: Blocks, scale: Tensor, square: bool) -> NVFP4Tensor:
    codes = nvfp4.encode(blocks.codes.view(y.shape), y.signbit())
    scales = blocks.scales.squeeze(-1).to(torch.float8_e4m3fn)
    return NVFP4Tensor(nvfp4.pack(codes), scales[::NVFP4_BLOCK].contiguous() if square else scales, scale)
