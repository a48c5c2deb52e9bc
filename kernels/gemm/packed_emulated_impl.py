"""The path of 4-bit tensor cores, packed operands and all, on any machine: unpack to the exact values, multiply those.

Operands come as [rows, contraction]; `kind` says which of them are transposed views of what the layer holds, and they
are transposed back, so that `kernels.gemm` makes the same library call on the same layouts as without packing.
"""

import torch
from torch import Tensor

from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.gemm.packed.contract import training_gemm, values_gemm, values_unavailable
from kernels.quantize import Quantized

WANTS = "packed"
# Of each GEMM: whether a and b are stored transposed (their contraction is dim 0 of the layer's own tensor).
TRANSPOSED = {"fprop": (False, False), "dgrad": (False, True), "wgrad": (True, True)}


def unavailable() -> str | None:
    """None but for a GPU on which cublaslt can't run: it multiplies there."""
    return values_unavailable()


def gemm_nvfp4(a: NVFP4Tensor, b: NVFP4Tensor, alpha: Tensor, out_dtype: torch.dtype, kind: str) -> Tensor:
    """alpha * A B^T on raw operands, checked by packed.contract."""
    is_a_transposed, is_b_transposed = TRANSPOSED[kind]
    left, right = Quantized(_values(a, is_a_transposed), alpha), Quantized(_values(b, is_b_transposed), None)
    return values_gemm(left.values).gemm(left, right, kind, 1.0, out_dtype)


gemm = training_gemm("packed_emulated", gemm_nvfp4)


def _values(operand: NVFP4Tensor, transposed: bool) -> Tensor:
    """In the layer's own layout, as the quantizers give it: row-major BF16 on a GPU, a transposed view on a CPU."""
    values = operand.values()
    if not values.is_cuda:
        return values.t() if transposed else values
    values = values.to(torch.bfloat16)  # exact: at most 6 significant bits
    return values.t().contiguous() if transposed else values
