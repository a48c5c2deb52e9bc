"""gemm_nvfp4 without 4-bit tensor cores: unpack to the exact values, multiply them as the emulated path does.

Operands come as [rows, contraction]; `kind` says which of them are transposed views of what the layer holds, and they
are turned back, so that `kernels.gemm` makes the same library call on the same layouts as without packing: the same
bits.
"""

import torch
from torch import Tensor

from kernels.gemm import reference_impl
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
    return reference_impl.gemm(
        Quantized(_values(a, turn_a), alpha), Quantized(_values(b, turn_b), None), kind, 1, out_dtype
    )


def _values(operand: NVFP4Tensor, transposed: bool) -> Tensor:
    values = operand.values()
    if values.is_cuda:
        values = values.to(torch.bfloat16)  # exact: at most 6 significant bits
    return values.t() if transposed else values
