"""Chunked cross-entropy of a linear head against autograd over all logits in FP64."""

import pytest
import torch

from kernels import backend
from kernels.cross_entropy import linear_cross_entropy, reference_impl


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    backend.use("reference")
    monkeypatch.setattr(reference_impl, "CHUNK_TOKENS", 48)  # several chunks, the last one shorter


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    h = torch.randn(100, 64, generator=g).bfloat16()
    weight = torch.randn(300, 64, generator=g) * 0.2
    return h, weight, torch.randint(0, 300, (100,), generator=g)


def exact(h, weight, targets, factor: float = 1.0, softcap: float | None = None):
    """FP64 with the same BF16 operands and logits; returns per-token nats, dh, dW."""
    h, w = h.double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    logits = h @ w.t()
    rounded = logits + (logits.detach().float().bfloat16().double() - logits.detach())  # straight-through rounding
    if softcap is not None:
        rounded = softcap * torch.tanh(rounded / softcap)
    nats = torch.nn.functional.cross_entropy(rounded, targets, reduction="none")
    (nats.sum() * factor).backward()
    return nats.detach(), h.grad, w.grad


@pytest.mark.parametrize("softcap", [None, 2.0, 15.0])
def test_sum_and_gradients(softcap):
    h, weight, targets = problem()
    nats, dh, dw = exact(h, weight, targets, 0.01, softcap)
    h, weight = h.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(h, weight, targets, softcap=softcap)
    (loss * 0.01).backward()
    assert loss.dtype == torch.float32 and weight.grad.dtype == torch.float32 and h.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), nats.sum(), rtol=1e-6, atol=0)
    # dlogits are rounded to BF16 (2^-9 on average less), dh once more.
    assert (h.grad.double() - dh).norm() / dh.norm() < 2**-8
    assert (weight.grad.double() - dw).norm() / dw.norm() < 2**-9


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_per_token_nats_have_no_gradient(softcap):
    h, weight, targets = problem()
    nats = linear_cross_entropy(h.requires_grad_(), weight, targets, per_token=True, softcap=softcap)
    assert nats.shape == (100,) and not nats.requires_grad
    torch.testing.assert_close(
        nats.double(), exact(h.detach(), weight, targets, softcap=softcap)[0], rtol=1e-5, atol=1e-5
    )


def test_large_logits_do_not_overflow():
    h = torch.full((1, 16), 200.0).bfloat16().requires_grad_()
    weight = torch.zeros(4, 16)
    weight[2] = 10.0
    loss = linear_cross_entropy(h, weight, torch.tensor([1]))
    loss.backward()
    assert loss == 32000.0 and h.grad.isfinite().all()


def test_errors():
    h, weight, targets = problem()
    with pytest.raises(ValueError, match="need h"):
        linear_cross_entropy(h, weight[:, :32], targets)
    with pytest.raises(ValueError, match="h bfloat16 and targets int64"):
        linear_cross_entropy(h.float(), weight, targets)
