"""The definition of the quantizers: pure PyTorch, any device, IEEE FP32, true division, parentheses as written.

With y the stored operand [rows, contraction] after rotation, v = target_max, C = scale_cap, blocks g of 16 (or 16x16),
for NVFP4 (the general form is in blocks.py, other formats in kernels/formats):

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

import torch
from torch import Tensor

from kernels import philox
from kernels.formats.minifloat import BY_NAME, FP32_TINY, next_power_of_two, round_bf16, round_nearest
from kernels.formats.nvfp4 import NVFP4Tensor, pack_levels
from kernels.philox import Draw
from kernels.quantize import Quantized
from kernels.quantize.blocks import Blocks, quantize_blocks, shape_blocks
from kernels.rotation import rotated
from kernels.spec import QuantSpec


def unavailable() -> str | None:
    """None: the reference runs wherever PyTorch does."""
    return None


def supports(spec: QuantSpec, rounds: int) -> str | None:
    """None: it has every quantizer."""
    return None


def rht_signs(rng: Tensor, layer: Tensor, gemm: int, dim: int, fixed: bool) -> Tensor:
    if fixed:
        rng, layer = torch.cat((rng[:1], torch.zeros_like(rng[1:]))), 0
    return philox.random_signs(rng, layer, gemm, dim)


def stored(x: Tensor, axis: int, signs: Tensor | None) -> Tensor:
    """FP32 [rows, contraction], contiguous, rotated in blocks along the contraction, unnormalised (rotation.py)."""
    y = (x if axis == 1 else x.t()).to(torch.float32).contiguous()
    if torch.compiler.is_compiling():
        y = round_bf16(y)  # Inductor drops a BF16 rounding that is fused with this read; a no-op on BF16 values
    return y if signs is None else rotated(y, signs)


def amax(x: Tensor, axis: int, signs: Tensor | None, per_row: bool) -> Tensor:
    if per_row or signs is not None:
        return amax_stored(stored(x, axis, signs), axis, per_row)
    # A reduction of rows and then of the result lets Inductor fuse the first into whatever produced x. It may then see
    # x before its rounding to BF16; rounding is monotone, so rounding the maximum gives the same number.
    return round_bf16(x.abs().amax(-1).amax().to(torch.float32))


def amax_stored(y: Tensor, axis: int, per_row: bool) -> Tensor:
    """`amax` from what `stored` gives."""
    if not per_row:
        return y.abs().amax()
    rows = y.abs().amax(dim=1, keepdim=True)
    return rows if axis == 1 else rows.t()


def amax_packed(p: NVFP4Tensor, axis: int, signs: Tensor | None, per_row: bool) -> Tensor:
    return amax(p.values(), axis, signs, per_row)


def tensor_scale(amax: Tensor, spec: QuantSpec) -> Tensor:
    """FP32, shaped like amax: T. Where the format has none it is 1, or NaN for a tensor that isn't finite."""
    if spec.is_blocked and not spec.scaling.has_tensor_scale:
        return torch.where(amax.isfinite(), torch.ones_like(amax), float("nan"))
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
    draw: Draw | None,
    want: tuple[str, ...],
) -> Quantized:
    if spec.grid == "none" and signs is None:
        return Quantized(x, None)
    y = stored(x, axis, signs)
    if spec.grid == "none":
        return Quantized(y if axis == 1 else y.t(), None)
    scale = tensor_scale(amax, spec)
    if not spec.is_blocked:
        codes = round_nearest(y / (scale if axis == 1 else scale.t()), BY_NAME[spec.grid])
        return Quantized(_operand(codes, axis), scale)
    blocks = quantize_blocks(y, spec, scale, draw, None if signs is None else signs.shape[-1])
    outer = scale if spec.prescale == 1 else scale * (1.0 / spec.prescale)
    return _wanted(blocks, outer, spec, axis, want)


def quantize_shaped(x: Tensor, spec: QuantSpec, amax: Tensor, feedback: Tensor, want: tuple[str, ...]) -> Quantized:
    scale = tensor_scale(amax, spec)
    return _wanted(shape_blocks(stored(x, 1, None), spec, scale, feedback), scale, spec, 1, want)


def _wanted(blocks: Blocks, scale: Tensor, spec: QuantSpec, axis: int, want: tuple[str, ...]) -> Quantized:
    values = _operand(blocks.values.flatten(1), axis) if "values" in want else None
    return Quantized(values, scale, _pack(blocks, scale, spec) if "packed" in want else None)


def quantize_both(
    x: Tensor,
    specs: tuple[QuantSpec, QuantSpec],
    signs: tuple[Tensor | None, Tensor | None],
    draws: tuple[Draw, Draw],
    wants: tuple[tuple[str, ...], tuple[str, ...]],
) -> tuple[Quantized, Quantized]:
    return each_axis(quantize, amax, x, specs, signs, draws, wants)


def each_axis(quantize, amax, x, specs, signs, draws, wants) -> tuple[Quantized, Quantized]:
    """`quantize_both` as two calls of the functions that are handed in."""
    made = []
    for axis, spec, sign, draw, want in zip((1, 0), specs, signs, draws, wants, strict=True):
        largest = None if spec.grid == "none" else amax(x, axis, sign, spec.per_row)
        made.append(quantize(x, spec, axis, largest, sign, draw, want))
    return made[0], made[1]


def requantize(
    p: NVFP4Tensor,
    spec: QuantSpec,
    axis: int,
    amax: Tensor | None,
    signs: Tensor | None,
    draw: Draw | None,
    want: tuple[str, ...],
) -> Quantized:
    return quantize(p.values(), spec, axis, amax, signs, draw, want).under(p.global_scale)


def dequantize(p: NVFP4Tensor, axis: int) -> Quantized:
    return Quantized(_operand(p.values(), axis), p.global_scale)


def _operand(values: Tensor, axis: int) -> Tensor:
    """Back to x's own layout; BF16 on a GPU, FP32 on a CPU (whose FP32 GEMM is the faster one)."""
    values = values if values.device.type == "cpu" else values.to(torch.bfloat16)
    return values if axis == 1 else values.t()


def _pack(blocks: Blocks, scale: Tensor, spec: QuantSpec) -> NVFP4Tensor:
    levels, elements = (part.view(part.shape[0], -1) for part in (blocks.codes, blocks.elements))
    members = None if blocks.members is None else blocks.members.squeeze(-1)
    return pack_levels(levels, elements, blocks.scales.squeeze(-1), members, scale, spec)
