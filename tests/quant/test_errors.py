"""Bias, noise and signal of made-up errors whose answers are known, and of operands with something planted."""

import pytest
import torch

from kernels.philox import Draw
from quant import library
from quant.errors import Errors, moments, numbers, signal_to_noise
from quant.held import Wish
from quant.operands import figures, named

SLICES, DRAWS, N = 4, 8, 1 << 14


def errors_of(bias: float, noise: float, shrink: float = 1.0) -> Errors:
    """Of two products alike, by the same draws."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(SLICES):
        reference, constant, *drawn = torch.randn((2 + DRAWS, N), generator=generator)
        made = torch.stack([shrink * reference + bias * constant + noise * one for one in drawn])
        found.append(moments(reference[None], made - reference))
    return Errors(torch.stack([torch.stack(found)] * 2))


def near(errors: Errors) -> dict:
    return both_alike(errors.near())


def spread(errors: Errors) -> dict:
    return both_alike(errors.spread())


def both_alike(found: dict) -> dict:
    one, other = numbers(found)
    assert one == other
    return one


@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_a_bias_is_told_from_noise(bias):
    found = spread(errors_of(bias, noise=0.3))
    assert found["variance"] == pytest.approx(0.09, rel=0.02)
    assert abs(found["bias"] - bias**2) < 3 * found["bias_se"] < 1e-3
    assert (found["bias"] > found["visible"]) == bool(bias)


def test_shrinkage_is_a_projection_below_one():
    found = errors_of(0.0, noise=0.01, shrink=0.9)
    assert near(found)["projection"] == pytest.approx(0.9, abs=1e-3)
    assert spread(found)["bias"] == pytest.approx(0.01, rel=0.02)  # 0.1 squared


def test_nothing_is_said_of_a_gradient_of_zeros():
    found = Errors(torch.zeros(2, SLICES, DRAWS, DRAWS + 2))
    assert set(near(found).values()) | set(spread(found).values()) == {None}


def test_signal_and_both_noises_at_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    common, planted, *rest = torch.randn((2 + 2 * SLICES, N), generator=generator)
    gradients = torch.stack([common + 2 * one for one in rest[:SLICES]])
    errors = torch.stack([0.1 * planted + 0.3 * one for one in rest[SLICES:]])
    [found] = ratios(gradients, errors, variance=0.09 * N, share=1 / 64)
    assert found["snr_sampling"] == pytest.approx(64**0.5 / 2, rel=0.05)
    assert found["snr_rounding"] == pytest.approx(64**0.5 / 0.3, rel=0.05)
    assert found["rho"] == pytest.approx(found["snr_rounding"] / 3**0.5, rel=1e-4)
    assert found["common"] == pytest.approx(0.01, abs=0.002)


def test_a_gradient_that_slices_do_not_share_has_no_ratio():
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    [found] = ratios(gradients, torch.zeros(2, 2), 1.0, 0.1)
    assert set(found.values()) == {None}


def ratios(gradients: torch.Tensor, errors: torch.Tensor, variance: float, share: float) -> list[dict]:
    grams = [(rows @ rows.t())[None] for rows in (gradients, errors)]
    return numbers(signal_to_noise(*grams, torch.tensor([variance]), share))


@pytest.fixture(scope="module")
def wish() -> Wish:
    rng = torch.zeros(3, dtype=torch.int64)
    spec = library.load("nvfp4_rtn").operand("fprop.x").spec
    return Wish(spec, 1, None, "exact", Draw(rng, torch.tensor(0), 0), False, ("values",))


def test_planted_outliers_and_a_dead_block_are_seen(wish):
    x = torch.randn((256, 256), generator=torch.Generator().manual_seed(0)).bfloat16()
    usual = named(figures(x, wish))
    assert usual["kurtosis"] == pytest.approx(3, abs=0.1) and usual["top_channels"] < 0.03
    x[:, 7] *= 30
    x[9, 16:32] *= 1e-6
    found = named(figures(x, wish))
    assert found["top_channels"] > 0.7 and found["kurtosis"] > 30
    assert usual["scales"][-1] == 0 and found["scales"][-1] == pytest.approx(1 / 4096, rel=1e-3)
    assert sum(found["scales"]) == pytest.approx(1)
