"""Cross-entropy of a linear head without ever holding all logits. The definition is `reference_impl.py`."""

import math

import torch
from torch import Tensor

from kernels import backend


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, per_token: bool = False, softcap: float | None = None
) -> Tensor:
    """Cross-entropy of the logits h @ bf16(weight)^T in nats: float32 [] sum, or [T] per token (then without gradient).

    h: [T, d] bf16; weight: float32 [V, d]; targets: int64 [T], 0 <= target < V; softcap c: of logits c tanh(l / c).
    Logits are BF16, rounded from FP32 sums; cap, softmax and loss are FP32. dh and dW come from dlogits in BF16 with
    FP32 sums and are made in the forward, chunk by chunk; dh is rounded once to BF16, dW stays FP32.
    Raises ValueError for shapes or dtypes other than these, and for a cap that is not positive.
    """
    if h.ndim != 2 or h.shape[1] != weight.shape[1] or targets.shape != h.shape[:1]:
        raise ValueError(
            "need h [T, d], weight [V, d], targets [T]; "
            f"got {tuple(h.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    if h.dtype != torch.bfloat16 or targets.dtype != torch.int64:
        raise ValueError(f"need h bfloat16 and targets int64; got {h.dtype} and {targets.dtype}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap:g}: needs a positive number, or None for no cap")
    return backend.impl("cross_entropy").linear_cross_entropy(h, weight, targets, per_token, softcap)
