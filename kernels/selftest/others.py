"""The fast kernels beside quantizers and FP4 GEMMs: products of values by cuBLASLt, and the cross-entropy."""

from importlib import import_module

import torch
from torch import Tensor

from kernels import backend
from kernels.gemm import reference_impl as reference_gemm
from kernels.quantize import Quantized
from kernels.selftest.shapes import RAGGED
from kernels.selftest.verdicts import NOT_HERE, Line, judge
from kernels.spec import GEMMS

# A logit is rounded to BF16 from a sum whose order is free: back ends may differ by one BF16 step of the largest logit.
LOGIT_STEP = 2.0**-8


def _operands(kind: str, m: int, n: int, k: int, device: str) -> tuple[Tensor, Tensor]:
    """Multiples of 1/2 up to 24 in BF16, in the natural layouts of a GEMM of `kind`: exact sums in any order."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = {"fprop": ((m, k), (n, k)), "dgrad": ((m, k), (k, n)), "wgrad": ((k, m), (k, n))}[kind]
    return tuple(
        torch.randint(-48, 49, s, generator=generator, device=device).mul(0.5).to(torch.bfloat16) for s in shapes
    )


def check_values_gemm(name: str, device: str) -> Line:
    """Back end `name` of kernels.gemm on BF16 values with FP32 scales: bit for bit the reference's product."""
    if reason := backend.unavailable("gemm", name):
        return Line(f"gemm {name}", NOT_HERE, reason)
    module = import_module(f"kernels.gemm.{name}_impl")
    failures, scale = [], torch.tensor(0.7310, device=device)
    for m, n, k in RAGGED:
        for kind in GEMMS:
            for out_dtype in (torch.bfloat16, torch.float32):
                left, right = (Quantized(values, scale) for values in _operands(kind, m, n, k, device))
                ours = module.gemm(left, right, kind, 1 / 128, out_dtype)
                expected = reference_gemm.gemm(left, right, kind, 1 / 128, out_dtype)
                if wrong := int((ours != expected).sum()):
                    failures.append(f"{kind} M={m} N={n} K={k} {out_dtype}: {wrong} of {ours.numel()} differ")
    return judge(f"gemm {name}", failures, f"equals the reference bit for bit, {6 * len(RAGGED)} cases")


def check_cross_entropy(name: str, device: str) -> Line:
    """Back end `name` of the cross-entropy: nats per token and both gradients against the reference."""
    kernel = f"cross_entropy {name}"
    if reason := backend.unavailable("cross_entropy", name):
        return Line(kernel, NOT_HERE, reason)
    results = []
    for module in (
        import_module(f"kernels.cross_entropy.{name}_impl"),
        import_module("kernels.cross_entropy.reference_impl"),
    ):
        generator = torch.Generator(device).manual_seed(0)
        h = torch.randn(300, 128, generator=generator, device=device).to(torch.bfloat16).requires_grad_()
        weight = torch.randn(1111, 128, generator=generator, device=device).mul_(0.2).requires_grad_()
        targets = torch.randint(0, 1111, (300,), generator=generator, device=device)
        per_token = module.linear_cross_entropy(h.detach(), weight.detach(), targets, True)
        module.linear_cross_entropy(h, weight, targets, False).backward()
        results.append((per_token, h.grad.float(), weight.grad))
    largest = float((h.detach().float() @ weight.detach().t()).abs().max())
    # nats: a logit and the log-sum-exp may each move by a step. Gradients: relative, against the largest entry.
    limits = (2 * LOGIT_STEP * largest, 2 * LOGIT_STEP, 2 * LOGIT_STEP)
    names, failures = ("nats", "dh", "dW"), []
    for label, ours, expected, limit in zip(names, *results, limits, strict=True):
        unit = 1.0 if label == "nats" else float(expected.abs().max())
        worst = float((ours - expected).abs().max()) / unit
        if not worst <= limit:
            failures.append(f"{label}: off by {worst:.1e}, {limit:.1e} allowed")
    return judge(kernel, failures, "nats and gradients within BF16 steps of the logits")
