"""The definition: logits = bf16(h W^T), loss = logsumexp - logit[target] in FP32, dlogits = bf16(softmax - onehot).

With a soft-cap c, loss and softmax are of l' = c tanh(l / c) in FP32, and dlogits = bf16((softmax - onehot) dl'/dl).
"""

import torch
from torch import Tensor

from kernels.formats.minifloat import to_bf16_values
from kernels.gemm.reference_impl import accumulate, round_output

# Tokens whose logits are held at once: 1,024 x 32,000 x 4 bytes = 131 MB in FP32.
CHUNK_TOKENS = 1024


def unavailable() -> str | None:
    """None: the reference runs wherever PyTorch does."""
    return None


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, per_token: bool, softcap: float | None = None
) -> Tensor:
    if per_token:
        with torch.no_grad():
            head = head_bf16(weight)
            return torch.cat([_nats(*part, softcap)[0] for part in _chunks(h, head, targets)])
    needs_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return _SumLoss.apply(h, weight, targets, softcap, needs_grad)


def head_bf16(weight: Tensor) -> Tensor:
    """The head as the GEMMs read it: BF16 of the FP32 master, on a CPU in FP32."""
    return weight.to(torch.bfloat16) if weight.is_cuda else to_bf16_values(weight)


def _chunks(h: Tensor, head: Tensor, targets: Tensor):
    for start in range(0, h.shape[0], CHUNK_TOKENS):
        rows = h[start : start + CHUNK_TOKENS]
        yield (rows if h.is_cuda else rows.to(torch.float32)), head, targets[start : start + CHUNK_TOKENS]


def _nats(h: Tensor, head: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token nats, the (capped) logits and their logsumexp, FP32."""
    logits = to_bf16_values(accumulate(h, head.t()))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logsumexp = logits.logsumexp(dim=-1)
    picked = logits.gather(1, targets[:, None]).squeeze(1)
    return logsumexp - picked, logits, logsumexp


class _SumLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, needs_grad: bool) -> Tensor:
        head = head_bf16(weight)
        total = torch.zeros((), device=h.device)
        dh, dweight = [], torch.zeros_like(weight) if needs_grad else None
        for rows, _, part in _chunks(h, head, targets):
            nats, logits, logsumexp = _nats(rows, head, part, softcap)
            total = total + nats.sum()
            if needs_grad:
                onehot = torch.zeros_like(logits).scatter_(1, part[:, None], 1.0)
                gradient = (logits - logsumexp[:, None]).exp() - onehot
                if softcap is not None:
                    gradient *= 1 - (logits / softcap).square()
                dlogits = to_bf16_values(gradient).to(head.dtype)
                dh.append(accumulate(dlogits, head))
                dweight += accumulate(dlogits.t(), rows)
        if needs_grad:
            # dh waits in FP32 (4 bytes x T x d), so that the factor of the backward is applied before its one rounding.
            ctx.save_for_backward(torch.cat(dh), dweight)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        dh, dweight = ctx.saved_tensors
        return round_output(dh * grad, torch.bfloat16), dweight * grad, None, None, None
