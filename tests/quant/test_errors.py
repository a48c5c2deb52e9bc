"""Bias, noise and signal of made-up errors whose answers are known, and of operands with something planted."""

import pytest
import torch

from kernels.philox import Draw
from quant import library
from quant.errors import Errors, signal_to_noise
from quant.held import Wish
from quant.operands import figures

SLICES, DRAWS, N = 4, 8, 1 << 14


def errors_of(bias: float, noise: float, shrink: float = 1.0) -> Errors:
    generator, found = torch.Generator().manual_seed(0), Errors()
    for _ in range(SLICES):
        reference, constant, *drawn = torch.randn((2 + DRAWS, N), generator=generator)
        found.add([reference], [shrink * reference + bias * constant + noise * one for one in drawn])
    return found


@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_a_bias_is_told_from_noise(bias):
    found = errors_of(bias, noise=0.3).spread()
    assert found["variance"] == pytest.approx(0.09, rel=0.02)
    assert abs(found["bias"] - bias**2) < 3 * found["bias_se"] < 1e-3
    assert (found["bias"] > found["visible"]) == bool(bias)


def test_shrinkage_is_a_projection_below_one():
    found = errors_of(0.0, noise=0.01, shrink=0.9)
    assert found.near()["projection"] == pytest.approx(0.9, abs=1e-3)
    assert found.spread()["bias"] == pytest.approx(0.01, rel=0.02)  # 0.1 squared


def test_nothing_is_said_of_a_gradient_of_zeros():
    found = Errors()
    found.add([torch.zeros(N)], [torch.zeros(N)] * DRAWS)
    assert set(found.near().values()) | set(found.spread().values()) == {None}


def test_signal_and_both_noises_at_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    common, planted, *rest = torch.randn((2 + 2 * SLICES, N), generator=generator)
    gradients = torch.stack([common + 2 * one for one in rest[:SLICES]])
    errors = torch.stack([0.1 * planted + 0.3 * one for one in rest[SLICES:]])
    found = signal_to_noise(gradients, errors, variance=0.09 * N, share=1 / 64)
    assert found["snr_sampling"] == pytest.approx(64**0.5 / 2, rel=0.05)
    assert found["snr_rounding"] == pytest.approx(64**0.5 / 0.3, rel=0.05)
    assert found["rho"] == pytest.approx(found["snr_rounding"] / 3**0.5, rel=1e-4)
    assert found["common"] == pytest.approx(0.01, abs=0.002)


def test_a_gradient_that_slices_do_not_share_has_no_ratio():
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert set(signal_to_noise(gradients, torch.zeros(2, 2), 1.0, 0.1).values()) == {None}


@pytest.fixture(scope="module")
def wish() -> Wish:
    rng = torch.zeros(3, dtype=torch.int64)
    spec = library.load("nvfp4_rtn").operand("fprop.x").spec
    return Wish(spec, 1, None, "exact", Draw(rng, torch.tensor(0), 0), False, ("values",))


def test_planted_outliers_and_a_dead_block_are_seen(wish):
    x = torch.randn((256, 256), generator=torch.Generator().manual_seed(0)).bfloat16()
    usual = figures(x, wish)
    assert usual["kurtosis"] == pytest.approx(3, abs=0.1) and usual["top_channels"] < 0.03
    x[:, 7] *= 30
    x[9, 16:32] *= 1e-6
    found = figures(x, wish)
    assert found["top_channels"] > 0.7 and found["kurtosis"] > 30
    assert usual["scales"][-1] == 0 and found["scales"][-1] == pytest.approx(1 / 4096, rel=1e-3)
    assert sum(found["scales"]) == pytest.approx(1)
