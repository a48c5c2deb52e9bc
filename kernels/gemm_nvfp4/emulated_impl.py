"""gemm_nvfp4 without 4-bit tensor cores: unpack to the exact values, multiply them as the emulated path does.

Operands come as [rows, contraction]; `kind` says which of them are transposed views of what the layer holds, and they
are turned back, so that `kernels.gemm` makes the same library call on the same layouts as without packing: same bits.
"""

from types import ModuleType

import torch
from torch import Tensor

from kernels.gemm import cublaslt_impl, reference_impl
from kernels.nvfp4 import NVFP4Tensor
from kernels.quantize import Quantized

# Of each GEMM: whether a and b are stored transposed (their contraction is dim 0 of the layer's own tensor).
TRANSPOSED = {"fprop": (False, False), "dgrad": (False, True), "wgrad": (True, True)}


def unavailable() -> str | None:
    """None: it runs wherever PyTorch does."""
    return None


def gemm_nvfp4(a: NVFP4Tensor, b: NVFP4Tensor, alpha: Tensor, out_dtype: torch.dtype, kind: str) -> Tensor:
    """alpha * A B^T on raw operands, checked by the public function (kernels/gemm_nvfp4)."""
    turn_a, turn_b = TRANSPOSED[kind]
    left, right = Quantized(_values(a, turn_a), alpha), Quantized(_values(b, turn_b), None)
    return values_gemm(left.values).gemm(left, right, kind, 1.0, out_dtype)


def values_gemm(values: Tensor) -> ModuleType:
    """The back end of kernels.gemm that multiplies values on their device."""
    return cublaslt_impl if values.is_cuda else reference_impl


def _values(operand: NVFP4Tensor, transposed: bool) -> Tensor:
    """In the layer's own layout, as the quantizers give it: row-major BF16 on a GPU, a transposed view on a CPU."""
    values = operand.values()
    if not values.is_cuda:
        return values.t() if transposed else values
    values = values.to(torch.bfloat16)  # exact: at most 6 significant bits
    return values.t().contiguous() if transposed else values
