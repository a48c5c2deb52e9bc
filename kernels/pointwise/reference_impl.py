"""The definition, in plain PyTorch with autograd's own derivatives."""

import torch
import torch.nn.functional as F
from torch import Tensor


def unavailable() -> str | None:
    """None: it runs wherever PyTorch does."""
    return None


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)


def turn(x_BTHK: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (x[2i], x[2i+1]) by position * theta^(-2i/K); in FP32, result in x's dtype.

    Written with a swap of neighbours, not with even and odd halves: one pointwise kernel.
    """
    cos, sin = table[:, : x_BTHK.shape[1], None, :]
    x = x_BTHK.float()
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x * cos + swapped * sin).to(x_BTHK.dtype)


def rope_heads(qkv: Tensor, table: Tensor, heads: int, kv_heads: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    if kv_heads in (None, heads):
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    else:
        q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=2)
    return turn(q, table).transpose(1, 2), turn(k, table).transpose(1, 2), v.transpose(1, 2)


def turn_norm(x_BTHK: Tensor, table: Tensor, eps: float) -> Tensor:
    turned = turn(x_BTHK, table).float()
    return (turned * inverse_rms(turned, eps)).to(x_BTHK.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * weight over the last dimension, in FP32, rounded once to `dtype`."""
    x = x.float()
    return (x * inverse_rms(x, eps) * weight.float()).to(dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def add_norm(residual: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # The sum takes the residual's dtype: a BF16 branch added to an FP32 stream loses nothing.
    total = residual + branch.to(residual.dtype)
    return total, rms_norm(total, weight, eps, dtype)
