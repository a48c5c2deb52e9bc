"""Fused quantizers in Triton: the functions of reference_impl.py on any CUDA GPU, launched as torch custom operators.

Bits agree with the reference as docs/numerics.md#7-what-is-equal-what-is-bounded says. Every slot of 1x16, 1x32 or 1x64
blocks, rotated or not, along either axis, from BF16 or packed NVFP4, runs triton_kernels.quantize_kernel (rows_kernel
along rows without a rotation); maxima of rotated tensors its amax_kernel; 16x16 tiles and FP8 are in triton_tiles.py,
launches in triton_ops.py. Packed codes of other formats are turned into values first. The maximum of a tensor that
nothing rotates stays plain PyTorch, so that Inductor computes it inside the kernel that produces the tensor.
"""

import torch
from torch import Tensor

from kernels.formats.minifloat import FP8_DTYPES
from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.philox import Draw
from kernels.quantize import Quantized, reference_impl, triton_shaped, triton_tiles  # noqa: F401
from kernels.quantize.triton_ops import INTERPRET, form_of
from kernels.spec import BF16_BITS, NVFP4_BLOCK, QuantSpec


def unavailable() -> str | None:
    """Why this back end can't run: no CUDA GPU (unless Triton interprets), or one older than sm_80 (no BF16 dot)."""
    if INTERPRET:
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"needs sm_80 or newer; this is sm_{major}{minor}"


def supports(spec: QuantSpec, rounds: int) -> str | None:
    """Why a quantizer is left to the reference."""
    if spec.grid == "none":
        return None
    if not spec.is_blocked:
        return "FP8 behind a rotation has no kernel" if rounds else None
    if form_of(spec) is None:
        return None
    if spec.significant_bits > BF16_BITS:
        return f"{spec.family.name} has values that BF16 does not hold"
    if spec.is_square and len(spec.family.members) > 2:
        return f"16x16 blocks of {spec.family.name} have no kernel"
    if spec.rounds_every_candidate and len(spec.candidates) > 1:
        return f"{spec.select} with sr under {spec.scales[-1]} has no kernel"
    return None


def _rounds(signs: Tensor | None) -> int:
    """Of a rotation, by its shape (kernels.quantize.rotation)."""
    return 0 if signs is None else signs.ndim


def rht_signs(rng: Tensor, layer: Tensor, gemm: int, dim: int, fixed: bool) -> Tensor:
    return torch.ops.nibble.rht_signs(rng, layer, gemm, dim, fixed)


def amax(x: Tensor, axis: int, signs: Tensor | None, per_row: bool) -> Tensor:
    if signs is None or per_row:
        return reference_impl.amax(x, axis, signs, per_row)
    return torch.ops.nibble.amax(x, None, *((None, signs) if axis == 1 else (signs, None)))[1 - axis]


def amax_packed(p: NVFP4Tensor, axis: int, signs: Tensor | None, per_row: bool) -> Tensor:
    if not p.tensor_core:
        return amax(dequantize(p, 1).values, axis, signs, per_row)
    if signs is None or per_row:
        return reference_impl.amax_packed(p, axis, signs, per_row)
    return torch.ops.nibble.amax(p.codes, _scale_bytes(p), *((None, signs) if axis == 1 else (signs, None)))[1 - axis]


def quantize(
    x: Tensor,
    spec: QuantSpec,
    axis: int,
    amax: Tensor | None,
    signs: Tensor | None,
    draw: Draw | None,
    want: tuple[str, ...],
) -> Quantized:
    if spec.grid == "none" or supports(spec, _rounds(signs)):
        return reference_impl.quantize(x, spec, axis, amax, signs, draw, want)
    if not spec.is_blocked:
        return triton_tiles.quantize_fp8(x, spec, axis, amax)
    if not spec.is_square:
        return _nvfp4(x, None, None, spec, axis, amax, signs, draw, want)
    if signs is not None:
        raise ValueError("16x16 blocks can't be rotated along one axis; use 1x16 blocks in this slot, or rotation none")
    results = torch.ops.nibble.quantize_square(
        x, amax, *_random(draw), axis, spec.key, _slot(draw), "values" in want, "packed" in want
    )
    return _quantized(results, spec, want)


def quantize_shaped(x: Tensor, spec: QuantSpec, amax: Tensor, feedback: Tensor, want: tuple[str, ...]) -> Quantized:
    results = torch.ops.nibble.quantize_shaped(x, amax, feedback, spec.key, "values" in want, "packed" in want)
    return _quantized(results, spec, want)


def quantize_both(
    x: Tensor,
    specs: tuple[QuantSpec, QuantSpec],
    signs: tuple[Tensor | None, Tensor | None],
    draws: tuple[Draw, Draw],
    wants: tuple[tuple[str, ...], tuple[str, ...]],
) -> tuple[Quantized, Quantized]:
    """One operator where both are 1x16 NVFP4: Inductor writes a fused producer once for each operator that reads it.

    It launches one kernel for each axis: a kernel that read x once for both took as long (229 us against 114 + 116 for
    65,536 x 1,024 on an H100; with SR 330 against 165 + 167), since instructions and not bytes bound it.

    The maximum of a tensor that no axis rotates is plain PyTorch before it; others are made inside, from one read.
    """
    rotated = signs[0] is not None or signs[1] is not None  # not by ==: Dynamo would compare tensors
    if all(spec.grid in FP8_DTYPES for spec in specs) and not rotated:
        return triton_tiles.quantize_fp8_both(x, specs)
    if any(not spec.is_blocked or spec.is_square or supports(spec, max(map(_rounds, signs))) for spec in specs):
        return reference_impl.each_axis(quantize, amax, x, specs, signs, draws, wants)
    amaxes = (reference_impl.amax(x, 1, None, False),) * 2 if not rotated else (None, None)
    results = torch.ops.nibble.quantize_both(
        x,
        *amaxes,
        *signs,
        *_random(draws[0]),
        *(spec.key for spec in specs),
        [draw.slot for draw in draws],
        ["values" in want for want in wants],
        ["packed" in want for want in wants],
    )
    return _quantized(results[:5], specs[0], wants[0]), _quantized(results[5:], specs[1], wants[1])


def requantize(
    p: NVFP4Tensor,
    spec: QuantSpec,
    axis: int,
    amax: Tensor | None,
    signs: Tensor | None,
    draw: Draw | None,
    want: tuple[str, ...],
) -> Quantized:
    if not p.tensor_core or not spec.is_blocked or spec.is_square or supports(spec, _rounds(signs)):
        made = quantize(dequantize(p, 1).values, spec, axis, amax, signs, draw, want)
        return made.under(p.global_scale)
    return _nvfp4(p.codes, _scale_bytes(p), p.global_scale, spec, axis, amax, signs, draw, want)


def dequantize(p: NVFP4Tensor, axis: int) -> Quantized:
    if not p.tensor_core:
        values = torch.ops.nibble.unpack_form(p.codes, p.block_scales, p.members, axis, p.spec.key)
        return Quantized(values, p.global_scale)
    values = torch.ops.nibble.unpack_values(p.codes, _scale_bytes(p), axis)
    return Quantized(values, p.global_scale)


def _scale_bytes(p: NVFP4Tensor) -> Tensor:
    """The block scales of p, which the kernels read as bytes. ValueError for a layout that they would read wrongly."""
    scales, (rows, columns) = p.block_scales, p.shape
    row_major = [(rows, columns / NVFP4_BLOCK), (rows / NVFP4_BLOCK, columns / NVFP4_BLOCK)]
    if tuple(scales.shape) not in row_major or scales.dtype != torch.float8_e4m3fn or not scales.is_contiguous():
        raise ValueError(
            f"a packed [{rows}, {columns}] has {scales.dtype} block scales of shape {tuple(scales.shape)}, "
            f"strides {scales.stride()}; the Triton back end reads contiguous float8_e4m3fn scales of "
            "[rows, columns/16] (1x16) or [rows/16, columns/16] (16x16): pack it with kernels.quantize, or use "
            "backend=reference"
        )
    return scales.view(torch.uint8)


def _nvfp4(src, scales, outer, spec, axis, amax, signs, draw, want) -> Quantized:
    results = torch.ops.nibble.quantize(
        src, scales, outer, amax, signs, *_random(draw), axis, spec.key, _slot(draw), "values" in want, "packed" in want
    )
    return _quantized(results, spec, want)


def _random(draw: Draw | None) -> tuple[Tensor | None, Tensor | None]:
    """The tensors of a draw: a torch operator takes no object of ours."""
    return (None, None) if draw is None else (draw.rng, draw.layer)


def _slot(draw: Draw | None) -> int:
    return 0 if draw is None else draw.slot


def _quantized(results, spec: QuantSpec, want: tuple[str, ...]) -> Quantized:
    values, scale, codes, block_scales, members = results
    values = values if "values" in want else None
    if "packed" not in want:
        return Quantized(values, scale)
    stored = block_scales.view(torch.float8_e4m3fn) if spec.scaling.corrected else block_scales
    members = members if len(spec.family.members) > 2 else None
    packed = NVFP4Tensor(codes, stored, scale, members, None if spec.tensor_core else spec)
    return Quantized(values, scale, packed)
