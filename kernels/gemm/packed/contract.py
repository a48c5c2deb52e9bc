"""What every back end of packed NVFP4 operands promises: which GEMMs it takes, which operands, the scale of the result.

A back end is a module of kernels/gemm with `gemm_nvfp4(a, b, alpha, out_dtype, kind)`, the product of checked operands;
`training_gemm` makes of it the `gemm` that kernels.gemm asks for.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.gemm import cublaslt_impl, reference_impl
from kernels.quantize import Quantized
from kernels.spec import GEMMS, NVFP4_BLOCK

OUT_DTYPES = (torch.bfloat16, torch.float32)
Product = Callable[[NVFP4Tensor, NVFP4Tensor, Tensor, torch.dtype, str], Tensor]


def training_gemm(name: str, product: Product) -> Callable[..., Tensor]:
    """kernels.gemm.gemm of back end `name`, whose product is `product`."""
    return partial(_gemm, name=name, product=product)


def _gemm(
    a: Quantized, b: Quantized, kind: str, alpha_const: float, out_dtype: torch.dtype, name: str, product: Product
) -> Tensor:
    """GEMMs of two NVFP4 operands go to `product`, GEMMs of none where they go without packing.

    Raises ValueError where one operand is NVFP4 and the other is not: no tensor core multiplies FP4 by BF16, and a slot
    that the hardware can't do is emulated only when asked for.
    """
    left, right = (q.packed if q.packed is not None and q.packed.tensor_core else None for q in (a, b))
    if left is not None and right is not None:
        return multiply(left, right, alpha_const, out_dtype, kind, product)
    if left is not None or right is not None:
        packed, other = ("first", "second") if left is not None else ("second", "first")
        raise ValueError(
            f"{kind}: the {packed} operand is NVFP4, the {other} is not; FP4 tensor cores (gemm={name}) need both. "
            "Quantize both slots or neither, or ask for the emulation: kernels.backend.use({'gemm': 'reference'})"
        )
    return values_gemm(a.values).gemm(a, b, kind, alpha_const, out_dtype)


def multiply(
    a: NVFP4Tensor, b: NVFP4Tensor, alpha_const: float, out_dtype: torch.dtype, kind: str, product: Product
) -> Tensor:
    """`product` of checked operands under alpha = (a.global_scale * b.global_scale) * alpha_const.

    Raises ValueError, naming the tensor and the rule, for operands, output type or kind that no back end takes.
    """
    _check("a", a)
    _check("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a is {list(a.shape)} and b is {list(b.shape)}; their second extents (K) must agree")
    if a.codes.device != b.codes.device:
        raise ValueError(f"a is on {a.codes.device} and b on {b.codes.device}; move one of them")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype={out_dtype}; need torch.bfloat16 or torch.float32")
    if kind not in GEMMS:
        raise ValueError(f"kind={kind!r}; need one of {', '.join(GEMMS)}")
    return product(a, b, (a.global_scale * b.global_scale) * alpha_const, out_dtype, kind)


def values_gemm(values: Tensor) -> ModuleType:
    """The back end of kernels.gemm that multiplies values on their device."""
    return cublaslt_impl if values.is_cuda else reference_impl


def values_unavailable() -> str | None:
    """Why the products that a packed back end leaves to `values_gemm` can't run here, or None."""
    return cublaslt_impl.unavailable() if torch.cuda.is_available() else None


def _check(name: str, operand: NVFP4Tensor) -> None:
    """Raise ValueError, naming the tensor and the rule, unless `operand` is a well-formed NVFP4Tensor."""
    codes, scales, scale = operand.codes, operand.block_scales, operand.global_scale
    if not operand.tensor_core:
        raise ValueError(
            f"{name}: {operand.kind.label} is not NVFP4, which is all that tensor cores read; multiply values"
        )
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"{name}.codes: got {codes.dtype} {list(codes.shape)}; need uint8 [rows, K / 2]")
    rows, k = operand.shape
    if k == 0 or k % NVFP4_BLOCK:
        raise ValueError(f"{name}.codes: K={k} must be a positive multiple of {NVFP4_BLOCK}, the block of a scale")
    shapes = [(rows, k // NVFP4_BLOCK)]
    if rows % NVFP4_BLOCK == 0:
        shapes.append((rows // NVFP4_BLOCK, k // NVFP4_BLOCK))
    if scales.dtype != torch.float8_e4m3fn or tuple(scales.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}.block_scales: got {scales.dtype} {list(scales.shape)}; need float8_e4m3fn {wanted}")
    if scale.dtype != torch.float32 or scale.dim() != 0:
        raise ValueError(f"{name}.global_scale: got {scale.dtype} {list(scale.shape)}; need float32 []")
    for field, tensor in (("codes", codes), ("block_scales", scales)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}.{field}: stride {tensor.stride()} is not row-major; call .contiguous()")
    if not codes.device == scales.device == scale.device:
        raise ValueError(f"{name}: codes on {codes.device}, scales on {scales.device}, global scale on {scale.device}")
