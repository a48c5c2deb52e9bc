import torch

from kernels import backend
from kernels.cross_entropy import linear_cross_entropy
from kernels.formats import round_bf16
from training.softcap import softcapped_cross_entropy


def inputs(tokens: int = 40, width: int = 24, vocabulary: int = 90):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, width, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    return h, weight, torch.randint(0, vocabulary, (tokens,), generator=generator)


def test_loss_and_gradients_agree_with_autograd_in_fp64():
    h, weight, targets = inputs()
    loss = softcapped_cross_entropy(h, weight, targets, cap=3.0)
    loss.backward()
    h64, w64 = h.detach().double().requires_grad_(), round_bf16(weight.detach()).double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(3.0 * torch.tanh(h64 @ w64.T / 3.0), targets, reduction="sum")
    exact.backward()
    # Logits up to 15 rounded to BF16 (2^-9 relative) move a capped logit by at most .03, in either direction.
    assert abs(loss.item() - exact.item()) < 2e-3 * exact.item()
    for ours, theirs in ((h.grad.double(), h64.grad), (weight.grad.double(), w64.grad)):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_chunks_do_not_change_anything_and_rows_add_up(monkeypatch):
    h, weight, targets = inputs()
    whole = softcapped_cross_entropy(h, weight, targets, 15.0)
    rows = softcapped_cross_entropy(h, weight, targets, 15.0, per_token=True)
    assert rows.shape == (40,) and not rows.requires_grad
    monkeypatch.setattr("training.softcap.CHUNK_TOKENS", 7)
    torch.testing.assert_close(softcapped_cross_entropy(h, weight, targets, 15.0), whole)
    torch.testing.assert_close(rows.sum(), whole.detach())


def test_a_huge_cap_is_no_cap():
    backend.use("reference", "cpu")
    h, weight, targets = inputs()
    capped, plain = softcapped_cross_entropy(h, weight, targets, 1e6), linear_cross_entropy(h, weight, targets)
    torch.testing.assert_close(capped, plain, rtol=1e-5, atol=1e-3)
