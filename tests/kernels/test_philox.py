"""Philox4x32-10 against the known-answer vectors of Random123, and the counters of docs/numerics.md#5-random-bits."""

import pytest
import torch

from kernels import philox
from kernels.formats import minifloat

PI = "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0"


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (*PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter, key, expected):
    counter, key = ([torch.tensor(int(word, 16)) for word in text.split()] for text in (counter, key))
    assert [f"{int(word):08x}" for word in philox.philox4x32(tuple(counter), tuple(key))] == expected.split()


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Written from the paper with Python integers, independent of the module."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_counter_and_key_fields():
    seed, step, micro, layer, slot = 0x123456789ABCDEF0, 70000, 5, 33, 4
    rng = torch.tensor([seed, step, micro])
    got = philox.random24(rng, torch.tensor(layer), slot, 11)
    for element in range(11):
        counter = [element // 4, step, micro, (layer << 8) | (16 + slot)]
        word = scalar_philox(counter, [seed & 0xFFFFFFFF, seed >> 32])[element % 4]
        assert got[element] == word >> 8


def test_negative_seeds_use_all_64_bits():
    words = philox.random_words(torch.tensor([-1, 0, 0]), 0, 0, 4).tolist()
    assert words == scalar_philox([0, 0, 0, 0], [0xFFFFFFFF, 0xFFFFFFFF])


def test_signs_are_the_top_bit_of_the_gemm_stream():
    rng = torch.tensor([7, 3, 1])
    words = philox.random_words(rng, torch.tensor(2), 1, 32)
    assert torch.equal(philox.random_signs(rng, torch.tensor(2), 1, 32), torch.where(words >= 2**31, -1.0, 1.0))


def test_draws_look_uniform_and_independent():
    """Mean within 4 standard errors of 1/2 (1/sqrt(12 n)), and slots, steps, micro-batches, layers all differ."""
    n = 40000
    base = philox.random24(torch.tensor([1, 0, 0]), 0, 0, n) / 2**24
    assert abs(base.mean() - 0.5) < 4 / (12 * n) ** 0.5
    others = [([1, 1, 0], 0, 0), ([1, 0, 1], 0, 0), ([2, 0, 0], 0, 0), ([1, 0, 0], 1, 0), ([1, 0, 0], 0, 1)]
    for rng, layer, slot in others:
        other = philox.random24(torch.tensor(rng), layer, slot, n) / 2**24
        correlation = ((base - 0.5) * (other - 0.5)).mean() * 12
        assert abs(correlation) < 4 / n**0.5


def test_eight_bits_are_the_bytes_of_words_in_turn_centred():
    rng, layer = torch.tensor([9, 2, 1]), torch.tensor(4)
    words = philox.random_words(rng, layer, philox.ROUNDING_STREAM + 3, 5).tolist()
    drawn = [byte for word in words for byte in word.to_bytes(4, "little")][:18]
    got = philox.random24(rng, layer, 3, 18, bits=8)
    assert got.tolist() == [(byte + 0.5) * 2**16 for byte in drawn]


def test_eight_bits_round_to_no_side_and_miss_by_at_most_a_512th_of_a_step():
    x = torch.cat([(torch.arange(2048.0) + 0.5) / 4096, torch.tensor([0.0, 0.5])])  # a step of E2M1, and its levels
    every = (torch.arange(256.0)[:, None] + 0.5) * 2**16
    bias = (minifloat.round_stochastic(x.expand(256, -1), minifloat.E2M1, every).double().mean(0) - x.double()) / 0.5
    assert 2**-10 < float(bias.abs().max()) <= 2**-9 and float(bias.mean()) == 0
    assert bias[-2:].tolist() == [0, 0]
