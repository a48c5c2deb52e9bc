"""The three GEMMs of a linear layer on quantized operands. The definition is `reference_impl.py`.

Each `*_impl.py` also has WANTS, "values" or "packed": the operand field of Quantized that it multiplies.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.quantize import Quantized
from kernels.spec import GEMMS


def gemm(a: Quantized, b: Quantized, kind: str, alpha_const: float, out_dtype: torch.dtype) -> Tensor:
    """One product of a linear layer, operands in their natural layouts:

    fprop: a = X [M,K], b = W [N,K] -> X W^T [M,N];  dgrad: a = dY [M,N], b = W [N,K] -> dY W [M,K];
    wgrad: a = dY [M,N], b = X [M,K] -> dY^T X [N,K].
    FP32 products and sums (the operands' values are exact in BF16, so products are exact in FP32); the accumulator is
    multiplied once by a.scale * b.scale * alpha_const and rounded once to out_dtype (bfloat16 or float32).
    alpha_const: 1/dim of the unnormalised rotation, else 1. Without scales and with alpha 1 it is the plain GEMM.
    Only the order of summation differs between back ends. Raises ValueError if the contraction dims differ.
    Source: docs/numerics.md#1-values-and-scales.
    """
    if kind not in GEMMS:
        raise ValueError(f"kind={kind!r}; use one of {', '.join(GEMMS)}")
    return backend.impl("gemm").gemm(a, b, kind, alpha_const, out_dtype)


def wants() -> str:
    """ "values" or "packed": what the chosen back end multiplies, to be asked of the quantizers."""
    return backend.impl("gemm").WANTS
