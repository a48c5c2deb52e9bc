"""Parts of the backward's gap: what is planted is found."""

import numpy as np
import pytest

from analysis.backward_parts import PARTS, part
from analysis.law import Law
from analysis.published import load

LAW = Law(e=1.0, a=0.0, alpha=0.3, b=0.5, beta=0.25)  # loss 1 + b (D/1e10)^-beta: steepness beta (loss - 1)
CELLS = [(n * 10**7, n * ratio * 10**7) for n in (3, 5) for ratio in (25, 100, 400)]


def arms():
    base = {cell: float(LAW.loss(*map(np.float64, cell))) for cell in CELLS}
    fewer = {(n, d): float(LAW.loss(np.float64(n), 0.98 * d)) for n, d in CELLS}  # 2 % of the tokens are lost
    grows = {(n, d): base[n, d] + 1e-3 * np.log(d / n) for n, d in CELLS}
    return {"bf16": base, "fewer": fewer, "grows": grows, "few": dict(list(fewer.items())[:3])}


def test_fewer_tokens_are_found_as_such_at_every_length():
    found = part(arms(), ["fewer"], ["bf16"], LAW)
    assert found.tokens == pytest.approx((2.03, 2.03), abs=0.01)  # -100 log .98, and half its square
    assert found.cells == 6 and found.rise < 0 < found.mean


def test_what_goes_with_the_ratio_is_found_and_sums_cancel():
    found = part(arms(), ["grows"], ["bf16"], LAW)
    assert (found.mean, found.rise) == (pytest.approx(np.log(100)), pytest.approx(1.0))
    assert found.rise_se < 1e-9 < found.se == pytest.approx(np.log(4) * np.sqrt(4 / 5) / np.sqrt(6))
    assert part(arms(), ["grows", "bf16"], ["bf16", "grows"], LAW).mean == pytest.approx(0, abs=1e-9)


def test_the_error_is_that_of_the_mean():
    rng = np.random.default_rng(1)
    base = arms()["bf16"]
    draws = [
        {"other": {cell: loss + 1e-3 * rng.normal() for cell, loss in base.items()}, "bf16": base} for _ in range(200)
    ]
    found = [part(every, ["other"], ["bf16"], LAW) for every in draws]
    assert np.mean([one.se for one in found]) == pytest.approx(np.std([one.mean for one in found]), rel=0.15)
    assert np.mean([one.rise_se for one in found]) == pytest.approx(np.std([one.rise for one in found]), rel=0.15)


def test_the_slope_is_the_derivative():
    n, d = CELLS[0]
    assert LAW.slope(n, d / 1.001, d * 1.001) == pytest.approx(
        0.25 * (float(LAW.loss(np.float64(n), np.float64(d))) - 1), rel=1e-5
    )


def test_too_few_cells_are_refused():
    with pytest.raises(ValueError, match="few, bf16 share 3 cells; needed: 4"):
        part(arms(), ["few"], ["bf16"], LAW)


def test_every_part_has_published_runs():
    points = load()
    for name, (plus, minus) in PARTS.items():
        assert part(points, plus, minus, LAW).cells >= 17, name
