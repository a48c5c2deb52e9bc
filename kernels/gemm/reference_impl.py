"""The definition of the emulated NVFP4 and FP8 GEMM: exact values, FP32 sums, scales on the accumulator once."""

import torch
from torch import Tensor

from kernels.formats.minifloat import round_bf16
from kernels.quantize import Quantized

WANTS = "values"


def unavailable() -> str | None:
    """None: the reference runs wherever PyTorch does."""
    return None


def gemm(a: Quantized, b: Quantized, kind: str, alpha_const: float, out_dtype: torch.dtype) -> Tensor:
    left = a.values.t() if kind == "wgrad" else a.values
    right = b.values.t() if kind == "fprop" else b.values
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"{kind}: contraction dims differ: a {tuple(a.values.shape)}, b {tuple(b.values.shape)}")
    product = accumulate(left, right)
    alpha = accumulator_scale(a.scale, b.scale, kind, alpha_const)
    return round_output(product if alpha is None else product * alpha, out_dtype)


def accumulate(left: Tensor, right: Tensor) -> Tensor:
    """FP32 product of BF16-exact matrices. On a GPU the BF16 tensor cores do it: exact products, FP32 sums."""
    if left.is_cuda and left.dtype == right.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    return _exact(left) @ _exact(right)


def accumulator_scale(a: Tensor | None, b: Tensor | None, kind: str, alpha_const: float) -> Tensor | float | None:
    """a * b * alpha_const, per row of the output where a has one scale per row, per column where b has; None for 1."""
    if a is not None and a.ndim == 2:
        a = a.reshape(-1, 1)
    if b is not None and b.ndim == 2:
        b = b.reshape(1, -1)
    scales = [scale for scale in (a, b) if scale is not None]
    if not scales:
        return None if alpha_const == 1 else alpha_const
    product = scales[0] if len(scales) == 1 else scales[0] * scales[1]
    return product if alpha_const == 1 else product * alpha_const


def round_output(accumulator: Tensor, out_dtype: torch.dtype) -> Tensor:
    if out_dtype == torch.bfloat16 and torch.compiler.is_compiling():
        accumulator = round_bf16(accumulator)  # Inductor may drop the cast where a consumer in FP32 is fused with it
    return accumulator.to(out_dtype)


def _exact(values: Tensor) -> Tensor:
    """BF16 values in FP32. FP32 input passes: it holds BF16-exact codes, or a rotated operand that stays unrounded."""
    if values.dtype == torch.float32:
        return values
    values = values.to(torch.float32)
    return round_bf16(values) if torch.compiler.is_compiling() else values
