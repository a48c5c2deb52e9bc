"""One NVFP4 GEMM from packed operands, by tensor cores that compute in 4 bits (cutlass, scaled_mm) or emulated.

`kernels.gemm` has a back end of the same name for each of these: choosing one there (`kernels.backend.use`) makes the
GEMMs of NVFP4 recipes come here. selftest and tests call this function directly.
"""

import torch
from torch import Tensor

from kernels.gemm_nvfp4 import cutlass_impl, emulated_impl, scaled_mm_impl
from kernels.nvfp4 import NVFP4Tensor
from kernels.spec import GEMMS, NVFP4_BLOCK

BACKENDS = {"cutlass": cutlass_impl, "scaled_mm": scaled_mm_impl, "emulated": emulated_impl}
OUT_DTYPES = (torch.bfloat16, torch.float32)


def gemm_nvfp4(
    a: NVFP4Tensor,
    b: NVFP4Tensor,
    alpha_const: float = 1.0,
    out_dtype: torch.dtype = torch.bfloat16,
    kind: str = "fprop",
    backend: str = "emulated",
) -> Tensor:
    """D = alpha_const * A B^T of NVFP4 operands a [M, K] and b [N, K], both stored as [rows, contraction] -> d [M, N].

    The products code * block_scale are exact in every back end; they are summed in FP32 and the accumulator is
    multiplied once by (a.global_scale * b.global_scale) * alpha_const and rounded once to out_dtype (bfloat16 or
    float32). So back ends differ only by the order of the FP32 sum. Block scales may be 1x16 or 16x16; M, N and K may
    be ragged (K a multiple of 16): operands are padded with zeros as kernels/scale_layout.py says.

    kind: which GEMM of a linear layer this is. Tensor cores do not care; the emulated back end then makes the very
    library call of the emulated path, with operands in their natural layout, so that both train bitwise alike.
    backend: cutlass, scaled_mm or emulated; each module's unavailable() says whether it runs here.
    Raises ValueError for a wrong dtype, shape, layout or device (it names the tensor and the rule) and RuntimeError
    for a kernel that fails. Source: NVFP4's definition (kernels/nvfp4.py); csrc/AUDIT.md for the CUTLASS call.
    """
    _check("a", a)
    _check("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a is {list(a.shape)} and b is {list(b.shape)}; their second extents (K) must agree")
    if a.codes.device != b.codes.device:
        raise ValueError(f"a is on {a.codes.device} and b on {b.codes.device}; move one of them")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype={out_dtype}; need torch.bfloat16 or torch.float32")
    if kind not in GEMMS or backend not in BACKENDS:
        raise ValueError(f"kind={kind!r}, backend={backend!r}; need one of {GEMMS} and one of {tuple(BACKENDS)}")
    alpha = (a.global_scale * b.global_scale) * alpha_const
    return BACKENDS[backend].gemm_nvfp4(a, b, alpha, out_dtype, kind)


def _check(name: str, operand: NVFP4Tensor) -> None:
    """Raise ValueError, naming the tensor and the rule, unless `operand` is a well-formed NVFP4Tensor."""
    codes, scales, scale = operand.codes, operand.block_scales, operand.global_scale
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
