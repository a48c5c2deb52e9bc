"""The fused loss against the reference: it compiles for each architecture (CPU), and gives the same numbers (GPU)."""

import pytest
import torch

from kernels.cross_entropy import reference_impl

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.cross_entropy import triton_impl  # noqa: E402


@pytest.mark.parametrize("target", [90, 100, 120])
@pytest.mark.parametrize("write_gradient", [True, False])
def test_kernel_compiles_without_spills(target: int, write_gradient: bool):
    signature = {"logits": "*bf16", "targets": "*i64", "nats": "*fp32", "vocab": "i32"}
    constants = {"LANES": triton_impl.LANES, "VECTOR": triton_impl.VECTOR, "WRITE_GRADIENT": write_gradient}
    source = ASTSource(
        fn=triton_impl.nats_kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": triton_impl.LANES // 32}
    )
    assert compiled.asm["cubin"] and ".local" not in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "vocab", "width"), [(4096, 32000, 640), (20000, 32000, 256), (384, 1024, 128)])
def test_loss_and_gradients_match_the_reference(tokens: int, vocab: int, width: int):
    generator = torch.Generator("cuda").manual_seed(tokens)
    h = torch.randn(tokens, width, device="cuda", generator=generator).to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab, width, device="cuda", generator=generator) * 0.05).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device="cuda", generator=generator)
    results = {}
    for name, impl in (("reference", reference_impl), ("triton", triton_impl)):
        loss = impl.linear_cross_entropy(h, weight, targets, False)
        (loss / tokens).backward()
        results[name] = loss.detach(), h.grad.float(), weight.grad
        h.grad = weight.grad = None
    (loss_a, dh_a, dw_a), (loss_b, dh_b, dw_b) = results["reference"], results["triton"]
    torch.testing.assert_close(loss_b, loss_a, rtol=1e-5, atol=0)
    # One BF16 rounding of a dlogit may fall the other way: 2^-9 relative, averaged over many terms.
    assert (dh_a - dh_b).norm() / dh_a.norm() < 1e-3
    assert (dw_a - dw_b).norm() / dw_a.norm() < 1e-3
    nats = triton_impl.linear_cross_entropy(h, weight, targets, True)
    torch.testing.assert_close(
        nats, reference_impl.linear_cross_entropy(h, weight, targets, True), rtol=1e-5, atol=1e-5
    )
