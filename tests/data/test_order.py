"""The shuffle: a permutation for any size, another for any key, and evenly spread."""

import numpy as np
import pytest

from data.order import Permutation


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 1000, 4097])
def test_is_a_bijection(count):
    image = Permutation(count, "key")(np.arange(count))
    assert sorted(image.tolist()) == list(range(count))


def test_is_the_same_everywhere():
    """Frozen values: another numpy, machine or refactoring must not reshuffle anybody's run."""
    assert Permutation(1000, "order/7/0")(np.arange(5)).tolist() == [786, 867, 653, 33, 335]


def test_single_positions_agree_with_the_whole():
    permutation = Permutation(777, "key")
    whole = permutation(np.arange(777))
    assert [int(permutation(np.array([i]))[0]) for i in range(0, 777, 50)] == whole[::50].tolist()


def test_a_thousand_million_elements_need_no_memory():
    permutation = Permutation(10**9, "key")
    image = permutation(np.arange(10**9 - 5000, 10**9))
    assert image.min() >= 0 and image.max() < 10**9 and len(set(image.tolist())) == 5000
    # Uniform on 0 .. 1e9: the mean of 5,000 has a standard deviation of 1e9 / sqrt(12 * 5000) = 4.1e6; five of them.
    assert abs(image.mean() - 5e8) < 5 * 4.1e6


def test_keys_give_unrelated_permutations():
    one, other = (Permutation(10_000, key)(np.arange(10_000)) for key in ("order/1/1", "order/2/0"))
    # Two random permutations agree in 1 place on average (Poisson): 10 or more has probability 1e-7.
    assert (one == other).sum() < 10


def test_every_element_is_as_likely_at_every_place():
    """Chi-square over 800 keys on a size that is no power of two; 400 cells of expectation 40."""
    count, keys = 20, 800
    seen = np.zeros((count, count))
    for key in range(keys):
        seen[np.arange(count), Permutation(count, f"k{key}")(np.arange(count))] += 1
    statistic = ((seen - keys / count) ** 2 / (keys / count)).sum()
    degrees = (count - 1) ** 2
    assert abs(statistic - degrees) < 4 * np.sqrt(2 * degrees)


def test_neighbours_land_far_apart():
    """Steps between images of neighbours are count / 3 long on average, within 5 standard errors."""
    count = 50_000
    steps = np.abs(np.diff(Permutation(count, "key")(np.arange(count))))
    # A step's standard deviation is count / sqrt(18).
    assert abs(steps.mean() - count / 3) < 5 * count / np.sqrt(18 * count)


def test_no_elements_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        Permutation(0, "key")
