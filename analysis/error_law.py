"""The law of errors: how a forward's gap goes with the errors of X and of W.

An arm is a forward quantizer of which runs are published at several cells (N, D). Of its gap g to BF16

    log g(arm, cell) = cell + effect(arm)                     two-way, weighted by g^2: noise is in g
    effect(arm) = c + p log(theta e_X + (1 - theta) e_W)      e: relative squared errors of X and W

theta says how X's error weighs against W's (0.5: alike), p how the gap follows. Intervals are bootstraps over arms,
since a law of recipes must hold for other recipes. Beside it one number more of each arm (its alignment, say) is tried
as a third regressor; what that gains is judged by predicting each arm from the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.published import Points, gaps

Measured = Mapping[str, Mapping[str, float]]  # {arm: {name: number}}
THETAS = np.linspace(0, 1, 101)
DRAWS = 1000
LEAST_ARMS = 4  # different ones of a bootstrap draw: theta, p and c take up three


@dataclass(frozen=True)
class Effect:
    """Of an arm, relative to the mean over arms, as a logarithm of the gap; se: over cells."""

    value: float
    se: float
    cells: int


@dataclass(frozen=True)
class ErrorLaw:
    """rms: of residuals of effects. left_out: the same of each arm predicted from the others. extra: the third
    regressor's coefficient, None without one."""

    theta: float
    p: float
    c: float
    rms: float
    left_out: float
    extra: float | None = None


def effects(arms: Mapping[str, Points], base: Points) -> dict[str, Effect]:
    """The two-way fit over every cell of every arm. ValueError for a gap that isn't positive."""
    names = list(arms)
    rows = [(i, cell, gap) for i, name in enumerate(names) for cell, gap in gaps(arms[name], base).items()]
    if any(gap <= 0 for *_, gap in rows):
        raise ValueError("a gap is not positive: its logarithm says nothing; leave the arm out")
    cells = sorted({cell for _, cell, _ in rows})
    design = np.zeros((len(rows), len(names) + len(cells)))
    for row, (i, cell, _) in enumerate(rows):
        design[row, i] = design[row, len(names) + cells.index(cell)] = 1
    gap = np.array([g for *_, g in rows])
    logs, weights = np.log(gap), gap / gap.mean()
    found = np.linalg.lstsq(design * weights[:, None], logs * weights, rcond=None)[0]
    left = logs - design @ found
    value = found[: len(names)] - found[: len(names)].mean()
    out = {}
    for i, name in enumerate(names):
        own = np.array([left[row] for row, (j, *_) in enumerate(rows) if j == i])
        out[name] = Effect(float(value[i]), float(own.std(ddof=1) / len(own) ** 0.5), len(own))
    return out


def fit(
    found: Mapping[str, Effect], measured: Measured, x: str = "x", w: str = "w", extra: str | None = None
) -> ErrorLaw:
    """x, w, extra: names of the numbers in `measured`."""
    value, numbers = columns_of(found, measured, x, w, extra)
    theta, coefficients = best(value, numbers)
    left = value - predicted(theta, coefficients, numbers)
    alone = []
    for out in range(len(value)):
        keep = np.arange(len(value)) != out
        others = best(value[keep], numbers[:, keep])
        alone.append(value[out] - predicted(*others, numbers[:, [out]])[0])
    rest = float(coefficients[2]) if extra else None
    c, p = map(float, coefficients[:2])
    return ErrorLaw(theta, p, c, rms(left), rms(np.array(alone)), rest)


def columns_of(
    found: Mapping[str, Effect], measured: Measured, x: str, w: str, extra: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Effects [arms] and numbers [2 or 3, arms]."""
    names = (x, w) if extra is None else (x, w, extra)
    value = np.array([effect.value for effect in found.values()])
    return value, np.array([[measured[arm][name] for arm in found] for name in names])


def regressors(theta: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """[thetas, 1 or 2, arms]: log(theta x + (1 - theta) w) and, if there is one, the third."""
    x, w, *extra = numbers
    mixed = np.log(theta[:, None] * x + (1 - theta[:, None]) * w)
    return np.stack([mixed, *(np.broadcast_to(one, mixed.shape) for one in extra)], axis=1)


def predicted(theta: float, coefficients: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    return coefficients[0] + coefficients[1:] @ regressors(np.array([theta]), numbers)[0]


def best(value: np.ndarray, numbers: np.ndarray) -> tuple[float, np.ndarray]:
    """(theta, [c, p] or [c, p, extra]) of the least squares over a grid of theta."""
    columns = regressors(THETAS, numbers)
    means = columns.mean(axis=2, keepdims=True)
    centred, about = columns - means, value - value.mean()
    squares = centred @ centred.swapaxes(1, 2)
    squares += 1e-14 * np.eye(squares.shape[1])  # arms that are all alike leave a slope of zero
    slopes = np.linalg.solve(squares, (centred @ about)[:, :, None])[:, :, 0]
    left = about - (slopes[:, None] @ centred)[:, 0]
    chosen = int(np.square(left).sum(axis=1).argmin())
    intercept = value.mean() - slopes[chosen] @ means[chosen, :, 0]
    return float(THETAS[chosen]), np.array([intercept, *slopes[chosen]])


def bootstrap(
    found: Mapping[str, Effect], measured: Measured, x: str = "x", w: str = "w", extra: str | None = None
) -> dict[str, np.ndarray]:
    """{theta, p[, extra]: DRAWS values} of refits to arms drawn with replacement; draws of fewer than LEAST_ARMS
    different arms are drawn again."""
    rng, rows = np.random.default_rng(0), []
    value, numbers = columns_of(found, measured, x, w, extra)
    while len(rows) < DRAWS:
        drawn = rng.integers(len(value), size=len(value))
        if len(set(drawn)) < LEAST_ARMS + (extra is not None):
            continue
        theta, coefficients = best(value[drawn], numbers[:, drawn])
        rows.append((theta, *coefficients[1:]))
    return dict(zip(("theta", "p", "extra"), np.array(rows).T, strict=False))


def rms(left: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(left))))
