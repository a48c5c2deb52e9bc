"""Scaling law loss(N, D, recipe) with a shared irreducible part and per-recipe efficiency factors.

coupled   loss = E + (A / (eff_N N)^alpha + B / (eff_D D)^beta)^gamma      (the form of Quartet v1)
additive  the same with gamma = 1                                          (Chinchilla's form)

The law is fitted on the baseline (eff_N = eff_D = 1). A recipe's factors are then fitted on its *gaps* to the baseline
at the same (N, D), so that whatever the law misses at a cell (and every recipe shares) doesn't leak into them. eff_N =
0.9 reads: a quantized model of N parameters does as well as an unquantized one of 0.9 N. N is non-embedding parameters.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from analysis.pairing import t_quantile
from analysis.published import Points, gaps
from analysis.runs import json_object
from base.runfolder import RunError

PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "law" / "law.json"  # fitted to the published runs
# Residuals beyond this count linearly (Huber): published exact reruns agree to 1e-5, seeds to about 1e-3.
HUBER_NATS = 1e-3
# Powers are taken of N/N0 and D/D0: keeps A and B of order 1 during the fit.
N0, D0 = 1e8, 1e10
FORMS = {"additive": 5, "coupled": 6}
MINIMUM_CELLS = 8
FACTOR_STARTS = ((0.95, 0.95), (0.7, 1.0), (0.6, 1.3))


@dataclass(frozen=True)
class Law:
    """Parameters of the base law. `a` and `b` refer to N in units of 1e8 and D in units of 1e10."""

    e: float
    a: float
    alpha: float
    b: float
    beta: float
    gamma: float = 1.0

    def loss(self, n: np.ndarray, d: np.ndarray, eff_n: float = 1.0, eff_d: float = 1.0) -> np.ndarray:
        """Predicted loss [nats/token]; n [parameters], d [tokens]."""
        inner = self.a * (eff_n * n / N0) ** -self.alpha + self.b * (eff_d * d / D0) ** -self.beta
        return self.e + inner**self.gamma

    def slope(self, n: float, low: float, high: float) -> float:
        """Nats that a factor e of the tokens is worth between two lengths: -dL / d ln D."""
        fewer, more = self.loss(np.array([n, n], float), np.array([low, high], float))
        return float((fewer - more) / np.log(high / low))

    def as_dict(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Factors:
    """A recipe's efficiency factors, with the root mean square of its gap residuals [nats] over `cells` points."""

    eff_n: float
    eff_d: float
    rms: float
    cells: int


def read_law(path: Path = PUBLISHED) -> Law:
    """The coupled law that fit_scaling_law.py wrote. RunError for another file."""
    try:
        return Law(**json_object(path)["laws"]["coupled"])
    except (OSError, KeyError, TypeError) as error:
        raise RunError(f"{path}: no law of fit_scaling_law.py in it ({error!r})") from None


def arrays(points: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D, loss as float arrays [cells]."""
    cells = sorted(points)
    return (
        np.array([n for n, _ in cells], dtype=float),
        np.array([d for _, d in cells], dtype=float),
        np.array([points[c] for c in cells]),
    )


def fit_law(points: Points, form: str = "coupled", start: Law | None = None) -> Law:
    """Huber fit of the base law, from many starts (or from `start` alone).

    ValueError when there are too few cells, sizes or token counts to tell the parameters apart.
    """
    n, d, loss = arrays(points)
    sizes, lengths = len(set(n)), len(set(d))
    if len(points) < MINIMUM_CELLS or sizes < 2 or lengths < 3:
        raise ValueError(
            f"a law needs {MINIMUM_CELLS} cells over 2 sizes and 3 token counts; "
            f"got {len(points)} cells, {sizes} sizes, {lengths} token counts"
        )

    def residuals(theta: np.ndarray) -> np.ndarray:
        return _law(theta).loss(n, d) - loss

    starts = [_theta(start, form)] if start else _starts(form, float(loss.min()))
    best = None
    for theta in starts:
        with np.errstate(over="ignore", invalid="ignore"):
            if not np.all(np.isfinite(residuals(theta))):
                continue
            found = least_squares(
                residuals,
                theta,
                lambda t: _jacobian(t, n, d),
                bounds=_bounds(form, loss),
                loss="huber",
                f_scale=HUBER_NATS,
                x_scale="jac",
                max_nfev=400,
            )
        if best is None or found.cost < best.cost:
            best = found
    if best is None:
        raise ValueError("no start of the law fit gave finite losses; are the losses finite and positive?")
    return _law(best.x)


def fit_factors(law: Law, points: Points, base: Points, start: Factors | None = None) -> Factors:
    """eff_N and eff_D of one recipe from its gaps. ValueError below three cells shared with the baseline."""
    gap = gaps(points, base)
    if len(gap) < 3:
        raise ValueError(f"two factors need three cells shared with the baseline, got {len(gap)}")
    n, d, value = arrays(gap)

    def residuals(log_factors: np.ndarray) -> np.ndarray:
        return law.loss(n, d, *np.exp(log_factors)) - law.loss(n, d) - value

    starts = [(start.eff_n, start.eff_d)] if start else FACTOR_STARTS
    fits = [least_squares(residuals, np.log(s), loss="huber", f_scale=HUBER_NATS, x_scale=0.1) for s in starts]
    found = min(fits, key=lambda fit: fit.cost)
    rms = float(np.sqrt(np.mean(residuals(found.x) ** 2)))
    return Factors(*(float(v) for v in np.exp(found.x)), rms=rms, cells=len(gap))


@dataclass(frozen=True)
class GapPower:
    """Another shape for a gap: scale * (N/1e8)^n_power * (D/1e10)^d_power, in nats, with its rms residual."""

    scale: float
    n_power: float
    d_power: float
    rms: float


def fit_gap_power(points: Points, base: Points) -> GapPower:
    """Huber fit of a power law to the gaps themselves; tells how much the two factors leave unexplained."""
    n, d, value = arrays(gaps(points, base))

    def residuals(theta: np.ndarray) -> np.ndarray:
        return theta[0] * (n / N0) ** theta[1] * (d / D0) ** theta[2] - value

    start = [float(np.median(value)), 0.0, 0.0]
    with np.errstate(over="ignore"):  # a step too far, where one size leaves the power of N open, is taken back
        found = least_squares(residuals, start, loss="huber", f_scale=HUBER_NATS, x_scale="jac")
    return GapPower(*(float(v) for v in found.x), rms=float(np.sqrt(np.mean(residuals(found.x) ** 2))))


def residuals(law: Law, points: Points) -> dict[tuple[int, int], float]:
    """{(N, D): measured - law} in nats/token."""
    n, d, loss = arrays(points)
    return dict(zip(sorted(points), (loss - law.loss(n, d)).tolist(), strict=True))


def rms(law: Law, points: Points) -> float:
    return float(np.sqrt(np.mean(np.square(list(residuals(law, points).values())))))


def bootstrap(
    law: Law, form: str, base: Points, recipes: dict[str, Points], draws: int
) -> tuple[list[Law], dict[str, list[Factors]]]:
    """Refit on `draws` synthetic data sets: the law plus residuals redrawn, for the base and for each recipe's gaps.

    Residuals, not cells, are redrawn: with four sizes, leaving out cells often leaves out a size. They are `widened`.
    """
    rng = np.random.default_rng(0)
    resid = widened(np.array(list(residuals(law, base).values())), FORMS[form])
    factors = {name: fit_factors(law, points, base) for name, points in recipes.items()}
    laws, drawn = [], {name: [] for name in recipes}
    for _ in range(draws):
        n, d, _ = arrays(base)
        noisy = law.loss(n, d) + rng.choice(resid, len(resid))
        again = fit_law(dict(zip(sorted(base), noisy.tolist(), strict=True)), form, start=law)
        laws.append(again)
        for name, points in recipes.items():
            noisy_gaps = _redraw(rng, law, factors[name], points, base)
            drawn[name].append(fit_factors(again, *noisy_gaps, start=factors[name]))
    return laws, drawn


def _redraw(
    rng: np.random.Generator, law: Law, factors: Factors, points: Points, base: Points
) -> tuple[Points, Points]:
    """A recipe's points with its gap residuals redrawn, over a baseline of zero."""
    gap = gaps(points, base)
    n, d, value = arrays(gap)
    predicted = law.loss(n, d, factors.eff_n, factors.eff_d) - law.loss(n, d)
    noisy = predicted + rng.choice(widened(value - predicted, 2), len(value))
    return dict(zip(sorted(gap), noisy.tolist(), strict=True)), dict.fromkeys(gap, 0.0)


def widened(resid: np.ndarray, parameters: int) -> np.ndarray:
    """Residuals of a fit [cells], so that percentiles of refits to redrawn ones are 95 % intervals for few cells, too.

    A fit with p parameters takes up p of n degrees of freedom: sqrt(n / (n - p)) restores the noise's size, and the
    ratio of Student's t to the normal quantile allows for that size being an estimate. Needs n > p.
    """
    n = len(resid)
    return resid * np.sqrt(n / (n - parameters)) * t_quantile(n - parameters) / t_quantile(np.inf)


def interval(values: list[float]) -> tuple[float, float]:
    """Central 95 % of bootstrap draws."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _law(theta: np.ndarray) -> Law:
    e, log_a, alpha, log_b, beta = theta[:5]
    gamma = theta[5] if len(theta) > 5 else 1.0
    return Law(*(float(v) for v in (e, np.exp(log_a), alpha, np.exp(log_b), beta, gamma)))


def _jacobian(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Derivatives of the loss [cells, parameters] by (e, log a, alpha, log b, beta, gamma): ten times faster fits."""
    law = _law(theta)
    x, y = law.a * (n / N0) ** -law.alpha, law.b * (d / D0) ** -law.beta
    outer = law.gamma * (x + y) ** (law.gamma - 1)
    columns = [np.ones_like(n), outer * x, -outer * x * np.log(n / N0), outer * y, -outer * y * np.log(d / D0)]
    return np.stack([*columns, (x + y) ** law.gamma * np.log(x + y)][: len(theta)], axis=1)


def _theta(law: Law, form: str) -> np.ndarray:
    return np.array([law.e, np.log(law.a), law.alpha, np.log(law.b), law.beta, law.gamma][: FORMS[form]])


def _bounds(form: str, loss: np.ndarray) -> tuple[list[float], list[float]]:
    count = FORMS[form]
    return [0, -20, 0.01, -20, 0.01, 0.02][:count], [float(loss.min()), 20, 3, 20, 3, 3][:count]


def _starts(form: str, lowest: float) -> list[np.ndarray]:
    """Few starts are enough: on the published points all of a grid of 32 ended in the same minimum."""
    grid = [
        (share * lowest, 1.0, alpha, 1.0, 0.4, gamma)
        for share in (0.1, 0.6)
        for alpha in (0.2, 0.5)
        for gamma in ((0.3, 1.0) if form == "coupled" else (1.0,))
    ]
    return [np.array(theta[: FORMS[form]]) for theta in grid]
