"""One NVFP4 GEMM from packed operands, by tensor cores that compute in 4 bits (cutlass, scaled_mm) or emulated.

For the self-test and tests, which name the back end at each call. Training chooses one for all GEMMs
(`kernels.backend.use`) and comes by `gemm` of the same modules.
"""

import torch
from torch import Tensor

from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.gemm import cutlass_impl, packed_emulated_impl, scaled_mm_impl
from kernels.gemm.packed.contract import multiply

BACKENDS = {"cutlass": cutlass_impl, "scaled_mm": scaled_mm_impl, "packed_emulated": packed_emulated_impl}


def gemm_nvfp4(
    a: NVFP4Tensor,
    b: NVFP4Tensor,
    alpha_const: float = 1.0,
    out_dtype: torch.dtype = torch.bfloat16,
    kind: str = "fprop",
    backend: str = "packed_emulated",
) -> Tensor:
    """D = alpha_const * A B^T of NVFP4 operands a [M, K] and b [N, K], both stored as [rows, contraction] -> d [M, N].

    The products code * block_scale are exact in every back end; they are summed in FP32 and the accumulator is
    multiplied once by (a.global_scale * b.global_scale) * alpha_const and rounded once to out_dtype (bfloat16 or
    float32). So back ends differ only by the order of the FP32 sum. Block scales may be 1x16 or 16x16; M, N and K may
    be ragged (K a multiple of 16): operands are padded with zeros as kernels/formats/scale_layout.py says.

    kind: which GEMM of a linear layer this is. Tensor cores do not care; packed_emulated then makes the very
    library call of the emulated path, with operands in their natural layout, so that both train bitwise alike.
    backend: cutlass, scaled_mm or packed_emulated; each module's unavailable() says whether it runs here.
    Raises ValueError for a wrong dtype, shape, layout or device (it names the tensor and the rule) and RuntimeError
    for a kernel that fails. Source: NVFP4's definition (kernels/formats/nvfp4.py); kernels/csrc/AUDIT.md for the
    CUTLASS call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; need one of {', '.join(BACKENDS)}")
    return multiply(a, b, alpha_const, out_dtype, kind, BACKENDS[backend].gemm_nvfp4)
