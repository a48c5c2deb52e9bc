"""Quantizers of one GEMM operand. The definition of every result is `reference_impl.py`.

Layouts are natural: an operand stays in the layout of the tensor it comes from and `axis` names its contraction dim.
"Stored" below means the operand as [rows, contraction]: x itself for axis 1, x transposed for axis 0. Packed tensors
and the element and block numbers of random bits refer to the stored operand.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import backend
from kernels import rotation as rotations
from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.philox import Draw
from kernels.spec import QuantSpec


@dataclass(frozen=True)
class Quantized:
    """An operand ready for `kernels.gemm.gemm`.

    values: x's own layout; exact levels * block_scales (BF16 on a GPU; on a CPU the same BF16-exact values in FP32), or
    codes of FP8, or x itself for grid none (FP32 if it was rotated). None if only "packed" was wanted.
    scale: FP32 for the accumulator: [] or, per row, [rows, 1] / [1, columns]; None means exactly 1 and no operation.
    packed: the stored operand as 4-bit codes and their scales, if wanted and the spec has blocks.
    """

    values: Tensor | None
    scale: Tensor | None
    packed: NVFP4Tensor | None = None

    def under(self, outer: Tensor) -> "Quantized":
        """What was made of a tensor without its outer scale, with that scale."""
        scale = outer if self.scale is None else self.scale * outer
        return Quantized(self.values, scale, self.packed and replace(self.packed, global_scale=scale))


def supports(spec: QuantSpec, rounds: int = 0) -> str | None:
    """Why the chosen back end leaves a quantizer behind so many rounds of rotation to the reference, or None."""
    return backend.impl("quantize").supports(spec, rounds)


def rht_signs(rng: Tensor, layer: Tensor, gemm: int, dim: int, fixed: bool = False) -> Tensor:
    """float32 [dim] of +1 and -1: the diagonal D of the rotation x -> (D x) H, the same for both operands of a GEMM.

    rng: int64 [3] (seed, step, micro-batch); layer: int64 []; gemm: 0 fprop, 1 dgrad, 2 wgrad. fixed drops step,
    micro-batch and layer (all 0). Word i of Philox decides sign i: -1 if its top bit is set. Source:
    docs/numerics.md#5-random-bits.
    """
    return backend.impl("quantize").rht_signs(rng, layer, gemm, dim, fixed)


def rotation(rng: Tensor, layer: Tensor, gemm: int, dim: int, rounds: int, signs: str) -> Tensor:
    """What the quantizers below take as `signs`: for one round signs [dim]; for two a matrix [dim, dim] of integers,
    exact in BF16; for three [2, dim, dim], whose parts are. signs: random, fixed or none."""
    if signs == "none":
        return torch.ones(dim, device=rng.device)
    drawn = rht_signs(rng, layer, gemm, dim if rounds == 1 else dim * 2 ** (rounds - 1), signs == "fixed")
    if rounds == 1:
        return drawn
    matrix = rotations.merged(drawn[: rounds * dim], dim)
    return matrix if rounds == 2 else rotations.two_parts(matrix)


def rotation_by_need(rng: Tensor, layer: Tensor, gemm: int, dim: int, signs: str, heavy: Tensor) -> Tensor:
    """`rotation` of two rounds where `heavy` (bool []), else of one, as a matrix for a GEMM's first operand; its second
    takes kernels.rotation.partner of it, and the scalar is 1/dim^2 either way."""
    return rotations.chosen(rht_signs(rng, layer, gemm, 2 * dim, signs == "fixed"), dim, heavy)


def amax(x: Tensor, axis: int, signs: Tensor | None = None, per_row: bool = False) -> Tensor:
    """float32 max |x| of the rotated operand: [] or, per row of the stored operand, [rows, 1] / [1, columns].

    x: [R, C] bf16. With signs (`rotation`): of x times the unnormalised rotation in blocks of dim along
    `axis`, in FP32. NaN and Inf propagate. Raises ValueError if dim does not divide the contraction.
    """
    _check(x, axis, signs)
    return backend.impl("quantize").amax(x, axis, signs, per_row)


def amax_packed(p: NVFP4Tensor, axis: int, signs: Tensor | None = None, per_row: bool = False) -> Tensor:
    """`amax` of p.values(): the global scale of p is left out, as in `requantize`. axis refers to p's own [R, C]."""
    _check(p, axis, signs)
    return backend.impl("quantize").amax_packed(p, axis, signs, per_row)


def quantize(
    x: Tensor,
    spec: QuantSpec,
    axis: int,
    amax: Tensor | None,
    signs: Tensor | None = None,
    draw: Draw | None = None,
    want: tuple[str, ...] = ("values",),
) -> Quantized:
    """Rotate (if signs) and quantize x along `axis`.

    x: [R, C] bf16 (FP32 holding BF16 values is accepted). amax: from `amax`, or a fixed value; None for grid none.
    signs: from `rotation`, or None. draw: random bits, needed if spec.draws_random_bits.
    want: "values", "packed" or both. The rotation is unnormalised: 1/dim per GEMM
    and round belongs in gemm's alpha_const.
    NaN or Inf in amax gives scale NaN (codes unspecified), so every output is NaN; amax 0 gives tensor scale 1.
    Raises ValueError for shapes that the block (16) or the rotation does not divide, or missing random state.
    Source: docs/numerics.md#8-limits and #9-ms-eden.
    """
    _check(x, axis, signs)
    _check_spec(x.shape, spec, axis, signs, draw)
    return backend.impl("quantize").quantize(x, spec, axis, amax, signs, draw, want)


def quantize_shaped(
    x: Tensor, spec: QuantSpec, amax: Tensor, feedback: Tensor, want: tuple[str, ...] = ("values",)
) -> Quantized:
    """`quantize` along axis 1, unrotated, with each element's error handed on to those right of it in its row, so that
    what is left lies where a product doesn't see it (blocks.py; kernels/quantize/feedback.py makes F).

    x: [R, C] bf16 or FP32. feedback: bf16 [C, C] or its factors [C, 16 + 2 r]; zeros give `quantize`, bit for bit.
    Sums of errors run over FP32 in an order that differs between back ends; one code that differs moves those after it.
    Raises ValueError for a spec that isn't NVFP4 in 1x16 blocks rounded to nearest, and for shapes.
    """
    _check(x, 1, None)
    _check_spec(x.shape, spec, 1, None, None)
    if not spec.tensor_core or spec.is_square or spec.rounding != "rtn":
        raise ValueError(f"shaped rounding is for e2m1 in [tensor fp32, 1x16 e4m3], rtn; got {spec.key}")
    if len(feedback) != x.shape[1] or feedback.shape[1] > x.shape[1] or feedback.shape[1] % 2:
        raise ValueError(
            f"feedback of shape {tuple(feedback.shape)} for {x.shape[1]} columns; needs as many rows, and as many "
            "columns or those of its factors"
        )
    return backend.impl("quantize").quantize_shaped(x, spec, amax, feedback, want)


def quantize_both(
    x: Tensor,
    specs: tuple[QuantSpec, QuantSpec],
    signs: tuple[Tensor | None, Tensor | None],
    draws: tuple[Draw, Draw],
    wants: tuple[tuple[str, ...], tuple[str, ...]],
) -> tuple[Quantized, Quantized]:
    """`quantize` along axis 1 and along axis 0, as dY needs: each argument is a pair in that order.

    The same results as two calls with the exact amax; a back end may read x fewer times.
    """
    for axis, spec, sign, draw in zip((1, 0), specs, signs, draws, strict=True):
        _check(x, axis, sign)
        _check_spec(x.shape, spec, axis, sign, draw)
    return backend.impl("quantize").quantize_both(x, specs, signs, draws, wants)


def requantize(
    p: NVFP4Tensor,
    spec: QuantSpec,
    axis: int,
    amax: Tensor | None,
    signs: Tensor | None = None,
    draw: Draw | None = None,
    want: tuple[str, ...] = ("values",),
) -> Quantized:
    """Quantize a packed tensor again, usually along its other axis: codes * block_scales in, without the global scale.

    As `quantize` of p.values(), with amax from `amax_packed`; p.global_scale multiplies the resulting scale (of the
    packed result too). axis refers to p's own [R, C].
    """
    _check(p, axis, signs)
    _check_spec(p.shape, spec, axis, signs, draw)
    return backend.impl("quantize").requantize(p, spec, axis, amax, signs, draw, want)


def dequantize(p: NVFP4Tensor, axis: int = 1) -> Quantized:
    """p as an operand whose contraction is `axis`: p.values() in p's own [R, C] for 1, transposed for 0. Exact.

    scale = p.global_scale.
    """
    return backend.impl("quantize").dequantize(p, axis)


def _check(x: Tensor | NVFP4Tensor, axis: int, signs: Tensor | None) -> None:
    if len(x.shape) != 2 or axis not in (0, 1):
        raise ValueError(f"an operand is [rows, columns] with axis 0 or 1; got shape {tuple(x.shape)}, axis {axis}")
    if isinstance(x, Tensor) and x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"quantizers read bfloat16; got {x.dtype}")
    if signs is not None and x.shape[axis] % signs.shape[-1]:
        raise ValueError(
            f"contraction of {x.shape[axis]} is not a multiple of the rotation's dim {signs.shape[-1]}; choose a "
            "smaller rotation.dim for this GEMM, a batch whose tokens it divides, or bf16 for this layer (quant.rules)"
        )


def _check_spec(shape: tuple[int, int], spec: QuantSpec, axis: int, signs: Tensor | None, draw: Draw | None) -> None:
    if shape[axis] % spec.multiple or shape[1 - axis] % spec.rows:
        raise ValueError(
            f"shape {tuple(shape)} can't be cut in {spec.grid} blocks of {spec.multiple} along axis {axis}"
            f"{' and 16x16 tiles' if spec.is_square else ''}; keep the layer in bf16 (quant.rules)"
        )
    if spec.draws_random_bits and draw is None:
        raise ValueError(f"rounding={spec.rounding} draws random bits; pass draw=Draw(rng, layer, slot)")
    if spec.eden_block == "rotation" and spec.rounding == "ms_eden" and signs is None:
        raise ValueError("eden_block=rotation needs a rotation: pass signs, or use eden_block=16")
