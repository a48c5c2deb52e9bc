"""Cross-entropy of soft-capped logits, cap tanh(l / cap), chunk by chunk: for models with a cap.

Same rounding as kernels.cross_entropy: logits BF16, everything after in FP32, dh and dW from the BF16 of dlogits with
FP32 sums.
"""

import torch
from torch import Tensor

from kernels.cross_entropy.reference_impl import CHUNK_TOKENS, head_bf16
from kernels.formats import round_bf16
from kernels.gemm.reference_impl import accumulate, round_output


def softcapped_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, cap: float, per_token: bool = False) -> Tensor:
    """Nats, float32 [] sum or [T] per token (without gradient). h [T, d] bf16, weight float32 [V, d], int64 [T]."""
    if per_token:
        with torch.no_grad():
            head = head_bf16(weight)
            return torch.cat([_nats(rows, head, part, cap)[0] for rows, part in _chunks(h, targets)])
    return _CappedLoss.apply(h, weight, targets, cap, torch.is_grad_enabled())


def _chunks(h: Tensor, targets: Tensor):
    for start in range(0, h.shape[0], CHUNK_TOKENS):
        rows = h[start : start + CHUNK_TOKENS]
        yield (rows if h.is_cuda else rows.float()), targets[start : start + CHUNK_TOKENS]


def _nats(rows: Tensor, head: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token nats, softmax of the capped logits, and tanh of the logits over the cap; FP32."""
    squashed = torch.tanh(round_bf16(accumulate(rows, head.t())) / cap)
    capped = cap * squashed
    logsumexp = capped.logsumexp(dim=-1)
    nats = logsumexp - capped.gather(1, targets[:, None]).squeeze(1)
    return nats, (capped - logsumexp[:, None]).exp(), squashed


class _CappedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor, cap: float, needs_grad: bool) -> Tensor:
        head = head_bf16(weight)
        total = torch.zeros((), device=h.device)
        dh, dweight = [], torch.zeros_like(weight) if needs_grad else None
        for rows, part in _chunks(h, targets):
            nats, softmax, squashed = _nats(rows, head, part, cap)
            total = total + nats.sum()
            if needs_grad:
                onehot = torch.zeros_like(softmax).scatter_(1, part[:, None], 1.0)
                dlogits = round_bf16((softmax - onehot) * (1 - squashed.square())).to(head.dtype)
                dh.append(accumulate(dlogits, head))
                dweight += accumulate(dlogits.t(), rows)
        if needs_grad:
            ctx.save_for_backward(torch.cat(dh), dweight)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        dh, dweight = ctx.saved_tensors
        return round_output(dh * grad, torch.bfloat16), dweight * grad, None, None, None
