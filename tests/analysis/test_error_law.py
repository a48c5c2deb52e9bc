"""The law of errors: what is planted is found, and what can't be told apart has a wide interval."""

import numpy as np
import pytest

from analysis import error_law

CELLS = [(n, d) for n in (1, 2, 4) for d in (10, 20)]
# Arms that differ in X alone, in W alone and in both: e_X, e_W.
ARMS = {"a": (7, 7), "b": (9, 9), "c": (7, 12), "d": (9, 12), "e": (12, 9), "f": (5, 8), "g": (8, 5)}
MEASURED = {arm: {"x": x, "w": w, "other": 10.0 * len(arm)} for arm, (x, w) in ARMS.items()}


def published(theta: float, p: float, noise: float = 0.0, arms=ARMS, extra: dict | None = None):
    """{arm: {cell: loss}} over a baseline; the cells' own gaps differ by a factor of five."""
    rng = np.random.default_rng(3)
    base = {cell: 3.0 for cell in CELLS}
    found = {}
    for arm, (x, w) in arms.items():
        mixed = (theta * x + (1 - theta) * w) ** p * np.exp((extra or {}).get(arm, 0.0))
        found[arm] = {
            (n, d): 3.0 + 1e-3 * (1 + n) * mixed + noise * rng.normal() for n, d in CELLS if (arm, n) != ("g", 4)
        }
    return found, base


def test_planted_weight_and_exponent_are_found_from_cells_that_arms_do_not_share():
    found = error_law.effects(*published(0.7, 0.8))
    assert found["a"].cells == 6 and found["g"].cells == 4 and found["a"].se < 1e-9
    assert found["b"].value - found["a"].value == pytest.approx(0.8 * np.log(9 / 7))
    law = error_law.fit(found, MEASURED)
    assert (law.theta, law.p) == (pytest.approx(0.7), pytest.approx(0.8))
    assert law.rms < 1e-9 and law.left_out < 1e-9 and law.extra is None


def test_a_third_regressor_is_found_where_it_acts():
    extra = {"c": 0.2, "f": -0.1}
    measured = {arm: row | {"other": extra.get(arm, 0.0)} for arm, row in MEASURED.items()}
    found = error_law.effects(*published(0.5, 0.7, extra=extra))
    with_it, without = error_law.fit(found, measured, extra="other"), error_law.fit(found, measured)
    assert with_it.extra == pytest.approx(1.0) and with_it.left_out < 1e-9 < without.rms
    assert without.left_out > 1.2 * without.rms  # an arm that is predicted has no say in the fit


def test_intervals_tell_what_arms_can_not_tell():
    """Arms whose errors of X and W go together say nothing of theta, and their p all the same."""
    alike = {arm: (v, v * (1 + 0.01 * i)) for i, (arm, v) in enumerate(zip("abcdefg", range(5, 12), strict=True))}
    measured = {arm: {"x": x, "w": w} for arm, (x, w) in alike.items()}
    wide = error_law.bootstrap(error_law.effects(*published(0.7, 0.8, 3e-4, alike)), measured)
    narrow = error_law.bootstrap(error_law.effects(*published(0.7, 0.8, 3e-4)), MEASURED)
    spread = [np.ptp(np.percentile(found["theta"], [2.5, 97.5])) for found in (wide, narrow)]
    assert spread[0] > 0.9 and spread[1] < 0.4
    low, high = np.percentile(narrow["p"], [2.5, 97.5])
    assert low < 0.8 < high and high - low < 0.5


def test_a_gap_below_zero_is_refused():
    arms, base = published(0.5, 1.0)
    arms["a"][CELLS[0]] = 2.9
    with pytest.raises(ValueError, match="leave the arm out"):
        error_law.effects(arms, base)
