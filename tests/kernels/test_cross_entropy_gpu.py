"""The fused loss against the reference: compiled for each architecture and interpreted on a CPU, run on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.cross_entropy import reference_impl

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.cross_entropy import triton_impl  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("target", [90, 100, 120])
@pytest.mark.parametrize("write_gradient", [True, False])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_kernel_compiles_without_spills(target: int, write_gradient: bool, softcap: float | None):
    signature = {"logits": "*bf16", "targets": "*i64", "nats": "*fp32", "vocab": "i32"}
    constants = {"LANES": triton_impl.LANES, "VECTOR": triton_impl.VECTOR}
    constants |= {"WRITE_GRADIENT": write_gradient, "SOFTCAP": softcap}
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


INTERPRETED = """
import torch
from kernels.cross_entropy import reference_impl, triton_impl
# The identity as hidden states makes the weights the logits; 9,000 of them are more than one pass of the lanes.
logits = (torch.randn(4, 9000, generator=torch.Generator().manual_seed(0)) * 8).bfloat16()
targets = torch.tensor([0, 8191, 8192, 8999])
for softcap in (None, 2.0):
    weight = logits.t().float().contiguous().requires_grad_()
    expected = reference_impl.linear_cross_entropy(torch.eye(4).bfloat16(), weight, targets, True, softcap)
    reference_impl.linear_cross_entropy(torch.eye(4).bfloat16(), weight, targets, False, softcap).backward()
    written = logits.clone()
    nats = triton_impl.nats_of(written, targets, softcap, True)
    torch.testing.assert_close(nats, expected, rtol=1e-5, atol=1e-5)
    # One step of BF16: the interpreter truncates what a GPU rounds (docs/kernels.md#5-triton).
    torch.testing.assert_close(written.float(), weight.grad.t(), rtol=2**-7, atol=1e-6)
print("same")
"""


def test_kernel_is_right_in_the_interpreter():
    """In a process of its own: whether kernels are interpreted is fixed when they are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "same\n", done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize(("tokens", "vocab", "width"), [(4096, 32000, 640), (20000, 32000, 256), (384, 1024, 128)])
def test_loss_and_gradients_match_the_reference(tokens: int, vocab: int, width: int, softcap: float | None):
    generator = torch.Generator("cuda").manual_seed(tokens)
    h = torch.randn(tokens, width, device="cuda", generator=generator).to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocab, width, device="cuda", generator=generator) * 0.05).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device="cuda", generator=generator)
    results = {}
    for name, impl in (("reference", reference_impl), ("triton", triton_impl)):
        loss = impl.linear_cross_entropy(h, weight, targets, False, softcap)
        (loss / tokens).backward()
        results[name] = loss.detach(), h.grad.float(), weight.grad
        h.grad = weight.grad = None
    (loss_a, dh_a, dw_a), (loss_b, dh_b, dw_b) = results["reference"], results["triton"]
    torch.testing.assert_close(loss_b, loss_a, rtol=1e-5, atol=0)
    # One BF16 rounding of a dlogit may fall the other way: 2^-9 relative, averaged over many terms.
    assert (dh_a - dh_b).norm() / dh_a.norm() < 1e-3
    assert (dw_a - dw_b).norm() / dw_a.norm() < 1e-3
    nats = triton_impl.linear_cross_entropy(h, weight, targets, True, softcap)
    expected = reference_impl.linear_cross_entropy(h, weight, targets, True, softcap)
    torch.testing.assert_close(nats, expected, rtol=1e-5, atol=1e-5)
