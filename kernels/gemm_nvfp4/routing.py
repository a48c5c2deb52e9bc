"""The `gemm` of back ends that multiply packed NVFP4 operands: which GEMMs they take, what becomes of the others."""

import torch
from torch import Tensor

from kernels.gemm import cublaslt_impl
from kernels.gemm_nvfp4 import BACKENDS, gemm_nvfp4
from kernels.gemm_nvfp4.emulated_impl import values_gemm
from kernels.quantize import Quantized


def unavailable(backend: str) -> str | None:
    """Why `backend` can't serve a training run: its own reason, or that of the GEMM it leaves the other products to."""
    if reason := BACKENDS[backend].unavailable():
        return reason
    return cublaslt_impl.unavailable() if torch.cuda.is_available() else None


def gemm(a: Quantized, b: Quantized, kind: str, alpha_const: float, out_dtype: torch.dtype, backend: str) -> Tensor:
    """kernels.gemm.gemm: GEMMs of two NVFP4 operands go to gemm_nvfp4's `backend`, GEMMs of none as anywhere.

    Raises ValueError where one operand is NVFP4 and the other is not: no tensor core multiplies FP4 by BF16, and a slot
    that the hardware can't do is emulated only when asked for.
    """
    if a.packed is not None and b.packed is not None:
        return gemm_nvfp4(a.packed, b.packed, alpha_const, out_dtype, kind, backend)
    if a.packed is not None or b.packed is not None:
        packed, other = ("first", "second") if a.packed is not None else ("second", "first")
        raise ValueError(
            f"{kind}: the {packed} operand is NVFP4, the {other} is not; FP4 tensor cores (gemm={backend}) need both. "
            "Quantize both slots or neither, or ask for the emulation: kernels.backend.use({'gemm': 'reference'})"
        )
    return values_gemm(a.values).gemm(a, b, kind, alpha_const, out_dtype)
