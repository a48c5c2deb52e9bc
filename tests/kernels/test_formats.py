"""Rounding to the small formats, known answers by hand and every representable value."""

import math

import pytest
import torch

from kernels.formats import nibbles
from kernels.formats.minifloat import (
    E2M1,
    E4M3,
    E5M2,
    next_power_of_two,
    round_bf16,
    round_nearest,
    round_stochastic,
)
from kernels.formats.nvfp4 import NVFP4Tensor

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FLOAT8 = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}


def every_finite(dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32)
    return values[values.isfinite()]


def test_e2m1_ties_go_to_even_codes():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(round_nearest(ties, E2M1), even)
    assert torch.equal(round_nearest(-ties, E2M1), -even)


def test_e2m1_next_to_ties_and_saturation():
    below = torch.nextafter(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]), torch.tensor(0.0))
    above = torch.nextafter(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]), torch.tensor(9.0))
    assert round_nearest(below, E2M1).tolist() == E2M1_VALUES[:-1]
    assert round_nearest(above, E2M1).tolist() == E2M1_VALUES[1:]
    assert round_nearest(torch.tensor([6.1, 7.0, 1e30, math.inf, -math.inf]), E2M1).tolist() == [6, 6, 6, 6, -6]
    assert round_nearest(torch.tensor([math.nan]), E2M1).isnan().all()


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_every_float8_value_rounds_to_itself(dtype):
    values = every_finite(dtype)
    assert torch.equal(round_nearest(values, FLOAT8[dtype]), values)
    noise = torch.zeros_like(values)  # the draw that rounds up whenever it may
    assert torch.equal(round_stochastic(values, FLOAT8[dtype], noise), values)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_rounding_matches_the_cast(dtype):
    values = every_finite(dtype).abs().unique()
    middle = (values[1:].double() + values[:-1].double()).div(2).float()  # all ties, exact in FP32
    normal = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    x = torch.cat((middle, torch.nextafter(middle, torch.tensor(0.0)), normal, normal * 2.0**-8, normal * 40))
    x = x.clamp(-FLOAT8[dtype].max_value, FLOAT8[dtype].max_value)
    assert torch.equal(round_nearest(x, FLOAT8[dtype]), x.to(dtype).to(torch.float32))


def test_float8_saturates_where_a_cast_would_give_nan():
    assert round_nearest(torch.tensor([449.0, 464.0, 1e9, math.inf]), E4M3).tolist() == [448.0] * 4


@pytest.mark.parametrize(
    ("z", "low", "high", "share"),
    [
        (1.0625, 1.0, 1.125, 0.5),  # a normal binade: step 1/8
        (3.3, 3.25, 3.5, 0.2),
        (1.9375, 1.875, 2.0, 0.5),  # into the next binade
        (2.0**-10, 0.0, 2.0**-9, 0.5),  # below the smallest subnormal
        (1.75 * 2.0**-9, 2.0**-9, 2.0**-8, 0.75),  # between subnormals: step 2^-9
        (440.0, 416.0, 448.0, 0.75),
    ],
)
def test_e4m3_stochastic_rounding_has_the_exact_distribution(z, low, high, share):
    """Over all 2^24 draws, by their boundary: exactly floor or ceil of share * 2^24 round up."""
    boundary = math.ceil(((torch.tensor(z).double() - low) / (high - low)).item() * 2**24)
    noise = torch.tensor([0, boundary - 1, boundary, 2**24 - 1], dtype=torch.float32)
    got = round_stochastic(torch.full((4,), z), E4M3, noise)
    assert got.tolist() == [high, high, low, low]
    assert abs(boundary / 2**24 - share) < 1e-6


def test_stochastic_rounding_keeps_signs_and_saturates():
    got = round_stochastic(torch.tensor([-0.3, 0.3, -7.0, 7.0]), E2M1, torch.zeros(4))
    assert got.tolist() == [-0.5, 0.5, -6.0, 6.0]
    got = round_stochastic(torch.tensor([-0.3, 2.9]), E2M1, torch.full((2,), float(2**24 - 1)))
    assert got.tolist() == [0.0, 2.0]


def test_bf16_rounding_matches_the_cast():
    x = torch.randn(100000, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.linspace(-38, 38, 100000)
    ties = (torch.arange(2000, dtype=torch.int32) * 0x8000 + 0x3F800000).view(torch.float32)
    for values in (x, ties, torch.tensor([math.inf, -math.inf, 0.0, -0.0])):
        assert torch.equal(round_bf16(values), values.to(torch.bfloat16).to(torch.float32))
    assert round_bf16(torch.tensor([math.nan])).isnan().all()


def test_next_power_of_two():
    x = torch.tensor([1.0, 1.0000001, 0.75, 2.0**-126, 3.0])
    assert next_power_of_two(x).tolist() == [1.0, 2.0, 1.0, 2.0**-126, 4.0]


def test_every_nvfp4_code_round_trips():
    codes = torch.arange(16, dtype=torch.uint8)
    values = nibbles.decode(codes)
    assert values.abs().tolist() == E2M1_VALUES * 2
    assert torch.equal(values.signbit(), codes >= 8)
    assert torch.equal(nibbles.encode(values, values.signbit()), codes)
    every_pair = torch.stack(torch.meshgrid(codes, codes, indexing="ij"), dim=-1).view(-1, 2)
    packed = nibbles.pack(every_pair)
    assert packed[1, 0] == 0x10 and packed[16, 0] == 0x01  # the even element is the low nibble
    assert torch.equal(nibbles.unpack(packed), every_pair)


def test_code_times_scale_is_exact_in_bf16():
    products = every_finite(torch.float8_e4m3fn)[:, None] * torch.tensor(E2M1_VALUES)
    assert torch.equal(products.to(torch.bfloat16).to(torch.float32), products)


def test_dequantize_applies_every_scale_and_transposes():
    codes = torch.full((16, 8), 0x72, dtype=torch.uint8)  # 1, 6, 1, 6, ...
    square = NVFP4Tensor(codes, torch.tensor([[2.0]]).to(torch.float8_e4m3fn), torch.tensor(0.25))
    assert square.is_square and square.shape == (16, 16)
    assert square.values()[3, :4].tolist() == [2.0, 12.0, 2.0, 12.0]
    assert square.dequantize()[3, :4].tolist() == [0.5, 3.0, 0.5, 3.0]
    assert torch.equal(square.transposed().values(), square.values().t())
    rows = NVFP4Tensor(codes, torch.ones(16, 1).to(torch.float8_e4m3fn), torch.tensor(1.0))
    with pytest.raises(ValueError, match="16x16"):
        rows.transposed()
