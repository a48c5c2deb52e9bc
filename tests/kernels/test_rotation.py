"""Rotations of several rounds: by hand, exactness, how near a normal distribution they bring one element, bias."""

import math

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.philox import random_words
from kernels.quantize import rht_signs, rotation, rotation_by_need
from kernels.rotation import hadamard, is_heavy, merged, partner, restored, rotated, two_parts
from kernels.spec import NVFP4_SCALES, QuantSpec
from quant import audit, library
from quant.audit import Quantizer

LAYER = torch.tensor(4)
DIMS, COUNTS = (16, 32, 64, 128), (1, 2, 3)


@pytest.fixture(autouse=True)
def reference():
    backend.use("reference")


def rng(step: int = 1) -> Tensor:
    return torch.tensor([3, step, 2])


def whole(matrix: Tensor) -> Tensor:
    """The matrix of what `rotation` returns."""
    return rotated(torch.eye(matrix.shape[-1]), matrix)


def test_two_rounds_by_hand():
    signs = torch.ones(32)
    signs[16] = -1.0  # D_1 at index 0
    matrix = merged(signs, 16)
    assert torch.equal(matrix, 16 * torch.eye(16) - 2 * torch.ones(16, 16))
    assert torch.equal(matrix @ matrix.t(), 256 * torch.eye(16))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rounds", COUNTS)
def test_rotations_are_orthogonal_integers_that_bf16_holds(dim, rounds):
    given = rotation(rng(), LAYER, 1, dim, rounds, "random")
    assert given.ndim == rounds and torch.equal(given.bfloat16().float(), given)
    matrix = whole(given)
    assert torch.equal(matrix, matrix.round())
    exact = matrix.double()
    assert torch.equal(exact @ exact.t(), float(dim) ** rounds * torch.eye(dim).double())
    assert matrix.abs().max() <= dim if rounds < 3 else matrix.abs().max() <= dim**1.5
    x = torch.randn(8, 2 * dim, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(restored(rotated(x, given), given), x, atol=1e-5)


def test_rounds_go_on_in_the_words_of_the_first():
    """Signs of round r are words r * dim + i of the stream; round 0 keeps the bits that it always had."""
    dim = 32
    words = 1.0 - 2.0 * (random_words(rng(), LAYER, 2, 3 * dim) >> 31).float()
    assert torch.equal(rotation(rng(), LAYER, 2, dim, 1, "random"), words[:dim])
    assert torch.equal(rotation(rng(), LAYER, 2, dim, 1, "random"), rht_signs(rng(), LAYER, 2, dim))
    h, step = hadamard(dim, torch.device("cpu")), torch.eye(dim)
    for r in range(3):
        step = (step * words[r * dim : (r + 1) * dim]) @ h
        assert torch.equal(whole(rotation(rng(), LAYER, 2, dim, r + 1, "random")), step)
    fixed = rotation(rng(), LAYER, 2, dim, 2, "fixed")
    assert torch.equal(fixed, rotation(rng(9), torch.tensor(7), 2, dim, 2, "fixed"))
    assert not torch.equal(fixed, rotation(rng(), LAYER, 2, dim, 2, "random"))


def test_parts_of_three_rounds_are_exact_where_the_whole_is_not():
    matrix = torch.tensor([[488.0, -257.0], [1448.0, 3.0]])
    assert not torch.equal(matrix.bfloat16().float(), matrix)
    parts = two_parts(matrix)
    assert torch.equal(parts.bfloat16().float(), parts) and torch.equal(parts.sum(0), matrix)


def ks(samples: Tensor) -> float:
    """Kolmogorov-Smirnov distance of samples from N(0,1)."""
    x = samples.double().sort().values
    exact = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    n = torch.arange(len(x)).double() / len(x)
    return float(torch.maximum((exact - n).abs(), (exact - n - 1 / len(x)).abs()).max())


@pytest.mark.parametrize(("dim", "distances"), [(16, (0.35, 0.10, 0.08)), (128, (0.34, 0.043, 0.022))])
def test_one_element_becomes_normal_with_the_rounds(dim, distances):
    """A row of the matrix is a rotated single element; one matrix serves all blocks of a GEMM, so many are drawn."""
    for rounds, expected in zip(COUNTS, distances, strict=True):
        rows = [whole(rotation(rng(step), LAYER, 1, dim, rounds, "random")) for step in range(300)]
        found = ks(
            torch.stack([row[step % dim] for step, row in enumerate(rows)]).flatten() / float(dim) ** ((rounds - 1) / 2)
        )
        assert found == pytest.approx(expected, abs=0.012)


def test_heavy_blocks_are_found():
    normal = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    one_hot = torch.zeros(64, 256)
    one_hot[:, ::128] = 1.0
    assert not is_heavy(normal, 1, 128) and is_heavy(one_hot, 1, 128) and not is_heavy(torch.zeros(64, 256), 1, 128)
    assert is_heavy(one_hot.t().contiguous(), 0, 128)
    mixed = normal.clone()
    mixed[0] = 100 * one_hot[0]  # 2 * 10^4 of 3.6 * 10^4 of the energy
    assert is_heavy(mixed, 1, 128)
    mixed[0] = 10 * one_hot[0]  # 1 %
    assert not is_heavy(mixed, 1, 128)
    assert is_heavy(one_hot * 1e-30, 1, 128)


@pytest.mark.parametrize(("dim", "first", "second"), [(16, 4, 4), (32, 4, 8), (64, 8, 8), (128, 8, 16)])
def test_auto_is_two_rounds_or_one_up_to_powers_of_two(dim, first, second):
    two, one = (rotation(rng(), LAYER, 1, dim, rounds, "random") for rounds in (2, 1))
    needed = [rotation_by_need(rng(), LAYER, 1, dim, "random", torch.tensor(heavy)) for heavy in (True, False)]
    assert torch.equal(needed[0], two) and torch.equal(partner(two), two)
    assert torch.equal(needed[1], first * whole(one)) and torch.equal(partner(needed[1]), second * whole(one))
    for matrix in needed:
        assert torch.equal(matrix @ partner(matrix).t(), float(dim) ** 2 * torch.eye(dim))


EDEN = QuantSpec.resolve("e2m1", NVFP4_SCALES, rounding="ms_eden")


@pytest.mark.parametrize(("rounds", "bias", "mse"), [(1, 1452e-6, 2.90e-3), (2, 2.9e-6, 9.12e-3)])
def test_a_second_round_takes_the_bias_from_sparse_blocks_and_adds_variance(rounds, bias, mse, monkeypatch):
    """Two normal entries in each 128, MS-EDEN: mean of many draws."""
    monkeypatch.setattr(audit, "DRAWS", (1, 48))
    quantizer = Quantizer(EDEN, 128, rounds=rounds)
    x = audit.sparse((32, 1024), 1)
    curve = audit.bias_curve(quantizer, x)
    assert curve.bias == pytest.approx(bias, rel=0.15, abs=9e-6)
    assert curve.errors[0] == pytest.approx(mse, rel=0.1)
    assert curve.is_biased == (rounds == 1)


def test_auto_rotates_sparse_operands_twice():
    sparse, normal = audit.sparse((32, 1024), 1), audit.gaussian((32, 1024), 1)
    by_need, once, twice = (Quantizer(EDEN, 128, rounds=rounds) for rounds in ("auto", 1, 2))
    assert torch.equal(audit.estimate(by_need, sparse, 1), audit.estimate(twice, sparse, 1))
    assert torch.equal(audit.estimate(by_need, normal, 1), audit.estimate(once, normal, 1))


@pytest.mark.parametrize(
    ("rotation_of", "message"),
    [
        ({"dim": 128, "rounds": 4}, "rounds=4; use one of 1, 2, 3, auto"),
        ({"dim": 128, "rounds": 2, "signs": "none"}, "undo each other; use rotation.signs=random"),
        ({"dim": 128, "rounds": True}, "rounds=True; use one of"),
    ],
)
def test_rotations_that_make_no_sense_are_refused(rotation_of, message):
    mapping = library.mapping("quartet2")
    mapping["dgrad"]["rotation"] = rotation_of
    with pytest.raises(ValueError, match=message):
        library.build(mapping)


def test_auto_needs_what_it_looks_at():
    mapping = library.mapping("quartet2")
    mapping["wgrad"] |= {"rotation": {"dim": 128, "rounds": "auto"}}
    assert library.build(mapping).wgrad.alpha == 1 / 128**2
    mapping["wgrad"]["dy"]["amax"] = 3.0
    with pytest.raises(ValueError, match=r"amax=3\.0 and rotation\.rounds=auto: .* use 2"):
        library.build(mapping)
    del mapping["wgrad"]["dy"]["amax"]
    mapping["wgrad"]["x"]["source"] = "input"
    with pytest.raises(ValueError, match="this X is quantized in the forward; set source=fprop"):
        library.build(mapping)
