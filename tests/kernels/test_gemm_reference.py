"""The emulated GEMM: layouts, scales on the accumulator once, one rounding; and the choice of back ends."""

import pytest
import torch

from kernels import backend
from kernels.gemm import gemm, wants
from kernels.quantize import Quantized

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def reference():
    backend.use("reference")


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small integers: every product and sum is exact, so the order of summation cannot matter."""
    return torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_layouts_of_the_three_products():
    x, w, dy = integers(32, 16), integers(48, 16, seed=1), integers(32, 48, seed=2)
    plain = [Quantized(t, None) for t in (x, w, dy)]
    assert torch.equal(gemm(plain[0], plain[1], "fprop", 1.0, FP32), x @ w.t())
    assert torch.equal(gemm(plain[2], plain[1], "dgrad", 1.0, FP32), dy @ w)
    assert torch.equal(gemm(plain[2], plain[0], "wgrad", 1.0, FP32), dy.t() @ x)
    assert wants() == "values"


def test_scales_multiply_the_accumulator_once_and_round_once():
    x, w = integers(32, 16), integers(48, 16, seed=1)
    sa, sb = torch.tensor(0.3), torch.tensor(0.7)
    alpha = (sa * sb) * 0.125
    accumulator = x @ w.t()
    got = gemm(Quantized(x, sa), Quantized(w, sb), "fprop", 0.125, BF16)
    assert torch.equal(got, (accumulator * alpha).to(BF16))
    twice = (accumulator.to(BF16) * alpha.to(BF16)).to(BF16)
    assert not torch.equal(got, twice)
    assert torch.equal(gemm(Quantized(x, sa), Quantized(w, None), "fprop", 1.0, FP32), accumulator * sa)
    assert torch.equal(gemm(Quantized(x, None), Quantized(w, None), "fprop", 0.5, FP32), accumulator * 0.5)


def test_row_scales_land_on_their_rows_and_columns():
    x, w, dy = integers(32, 16), integers(48, 16, seed=1), integers(32, 48, seed=2)
    rows = lambda n: torch.arange(1.0, n + 1)[:, None]  # noqa: E731
    got = gemm(Quantized(x, rows(32)), Quantized(w, rows(48)), "fprop", 1.0, FP32)
    assert torch.equal(got, (x * rows(32)) @ (w * rows(48)).t())
    got = gemm(Quantized(dy, rows(32)), Quantized(w, rows(16).t()), "dgrad", 1.0, FP32)
    assert torch.equal(got, (dy * rows(32)) @ (w * rows(16).t()))
    got = gemm(Quantized(dy, rows(48).t()), Quantized(x, rows(16).t()), "wgrad", 1.0, FP32)
    assert torch.equal(got, (dy * rows(48).t()).t() @ (x * rows(16).t()))


def test_errors():
    a, b = Quantized(torch.ones(4, 16), None), Quantized(torch.ones(4, 32), None)
    with pytest.raises(ValueError, match="contraction dims differ"):
        gemm(a, b, "fprop", 1.0, FP32)
    with pytest.raises(ValueError, match="use one of fprop, dgrad, wgrad"):
        gemm(a, a, "forward", 1.0, FP32)


def test_auto_on_a_cpu_is_the_reference():
    assert backend.use("auto", "cpu") == dict.fromkeys(backend.OPS, "reference")


def test_requests_that_cannot_be_met_raise_with_the_reason():
    with pytest.raises(ValueError, match="use one of auto, reference"):
        backend.use("fastest")
    with pytest.raises(ValueError, match=r"no operation \['conv'\]"):
        backend.use({"conv": "reference"})
    with pytest.raises(RuntimeError, match="gemm: back end 'abacus' can't be used: not implemented"):
        backend.use({"gemm": "abacus"})


def test_operations_need_a_choice(monkeypatch):
    monkeypatch.setattr(backend, "IMPL", {})
    with pytest.raises(RuntimeError, match=r"call kernels\.backend\.use"):
        wants()
