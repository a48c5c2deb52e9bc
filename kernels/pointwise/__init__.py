"""The memory-bound parts of the decoder between its GEMMs. The definition is `reference_impl.py`: plain PyTorch.

A model may run before a back end is chosen (export, inference): then it takes the definition.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.pointwise import reference_impl


def _impl():
    return backend.IMPL.get("pointwise", reference_impl)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 F], gate first -> [..., F]. In FP32, rounded once to the input's dtype."""
    return _impl().swiglu(gate_up)


def rope_heads(qkv: Tensor, table: Tensor, heads: int, kv_heads: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q and k turned by position, and v: qkv [B, T, (H + 2 H_kv) K], all of q, then k, then v -> [B, H, T, K] and twice
    [B, H_kv, T, K] (views of [B, T, H, K]). `kv_heads`: H_kv; None: H. table: float32 [2, >= T, K] of
    models.llama.rope_table. In FP32, rounded once."""
    return _impl().rope_heads(qkv, table, heads, kv_heads)


def turn_norm(x_BTHK: Tensor, table: Tensor, eps: float) -> Tensor:
    """q or k turned by position, then divided by its rms over K: [B, T, H, K] -> the same. Each in FP32, rounded to the
    input's dtype. table: float32 [2, >= T, K] of models.llama.rope_table."""
    return _impl().turn_norm(x_BTHK, table, eps)


def add_norm(residual: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(sum, y): sum = residual + branch in the residual's dtype; y = RMSNorm(sum) * weight, in FP32, rounded to dtype.

    residual, branch: [..., D]; weight: float32 [D]. The gradient of `branch` is that of `residual`, rounded to the
    branch's dtype.
    """
    return _impl().add_norm(residual, branch, weight, eps, dtype)
