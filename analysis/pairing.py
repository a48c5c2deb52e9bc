"""Gaps between runs and how sure they are: over validation text (clustered by document) and over seeds.

Two sources of error, never mixed: the validation text is a sample (the document-clustered standard error says how far
the gap of *these two trained models* would move on other text), and a training run is a sample (the spread over seeds
says how far it would move if trained again). Only the second can give a verdict about recipes, so one seed gives none.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from analysis.runs import EvalRows

CONFIDENCE = 0.95
CORRELATED = 6  # seeds: of recipes that share nothing, three show a correlation beyond 0.65 more often than not
RESOLVED = "resolved"
NOT_RESOLVED = "not resolved: inside the noise"
ONE_SEED = "one seed: no verdict"
DIVERGED = "diverged: no verdict"


@dataclass(frozen=True)
class Gap:
    """Mean loss difference over the same validation tokens, nats/token, with its document-clustered standard error.

    `effective`: as many documents of equal length would weigh as evenly, (sum n)^2 / sum n^2. A handful of long ones
    says little about other text, however many short ones there are beside them.
    """

    value: float
    se: float
    documents: int
    effective: float


@dataclass(frozen=True)
class Floor:
    """What scripts/noise_floor.py measured, each (standard deviation of one run, its degrees of freedom).

    `seed`: between seeds of a recipe. `paired`: the same without what a seed does to all recipes alike. `conditions`:
    of the runs it was measured on (Run.conditions); it says nothing about others. None: said of any.
    """

    seed: tuple[float, float]
    paired: tuple[float, float] | None = None
    conditions: str | None = None


@dataclass(frozen=True)
class SeedGap:
    """A gap over training seeds: mean of the per-seed gaps, interval half-width (NaN below two seeds), how it was made.

    `by_seed`: {seed: gap} over the common seeds. `df`: the interval's degrees of freedom (NaN without one).
    `correlation` is that of the two recipes' losses over the common seeds: what pairing achieves (NaN for too few).
    """

    mean: float
    half_width: float
    df: float
    seeds: int
    by_seed: dict[int, float]
    method: str
    correlation: float
    verdict: str

    @property
    def interval(self) -> tuple[float, float]:
        return self.mean - self.half_width, self.mean + self.half_width


def t_quantile(df: float) -> float:
    """Two-sided 95 % quantile of Student's t."""
    return float(stdtrit(df, 0.5 + CONFIDENCE / 2))


def align(a: EvalRows, b: EvalRows) -> tuple[np.ndarray, np.ndarray]:
    """Indices that put both evaluations in one order of (sequence, document). ValueError unless rows are the same."""
    order = [np.lexsort((rows.document, rows.sequence)) for rows in (a, b)]
    for key in ("sequence", "document", "tokens"):
        left, right = getattr(a, key)[order[0]], getattr(b, key)[order[1]]
        if left.shape != right.shape or not np.array_equal(left, right):
            raise ValueError(f"evaluations differ in {key}: not the same validation tokens, so no paired gap")
    return order[0], order[1]


def paired_gap(runs: list[EvalRows], baselines: list[EvalRows]) -> Gap:
    """Token-weighted mean of (run - baseline), averaged over the given pairs (one pair a seed), clustered by document.

    Ratio estimator: gap = sum_d x_d / sum_d n_d over documents d. Its error is the delete-one jackknife's: the usual
    linear one counts a document that pulls the mean towards itself as close to it, and comes out too small.
    Raises ValueError when a pair was not evaluated on the same tokens.
    """
    first = None
    total = 0.0
    for run, base in zip(runs, baselines, strict=True):
        i, j = align(run, base)
        if first is None:
            first, order = run, i
        k = align(first, run)[1]
        total = total + (run.nats[k] - base.nats[j])
    _, document = np.unique(first.document[order], return_inverse=True)
    x = np.bincount(document, weights=total / len(runs))
    n = np.bincount(document, weights=first.tokens[order])
    return Gap(*_ratio(x, n), documents=len(n), effective=float(n.sum() ** 2 / (n @ n)))


def _ratio(x: np.ndarray, n: np.ndarray) -> tuple[float, float]:
    """sum x / sum n and its delete-one jackknife standard error."""
    mean = x.sum() / n.sum()
    if len(n) < 2:
        return float(mean), math.nan
    without = (x.sum() - x) / (n.sum() - n)
    return float(mean), float(math.sqrt((len(n) - 1) * without.var()))


def seed_gap(losses: dict[int, float], baseline: dict[int, float], floor: Floor | None = None) -> SeedGap:
    """Compare two recipes over seeds: {seed: loss} each.

    The rule is fixed beforehand, not picked for the narrower result:
    - a measured paired floor and n >= 2 common seeds: mean of the per-seed gaps +- t_df * sd * sqrt(2 / n);
    - else a measured floor and at least two runs on both sides: difference of means +- t_df * sd * sqrt(1/n_a + 1/n_b);
    - else two or more common seeds: paired t-interval of the per-seed gaps;
    - else two or more runs on both sides: Welch interval;
    - else no interval and no verdict.
    A loss that is not finite, of a seed that diverged, leaves neither gap nor verdict, also where it has no partner.
    """
    a, b = np.array(list(losses.values())), np.array(list(baseline.values()))
    common = sorted(losses.keys() & baseline.keys())
    by_seed = {s: losses[s] - baseline[s] for s in common}
    diff = np.array(list(by_seed.values()))
    correlation = _correlation([losses[s] for s in common], [baseline[s] for s in common])
    enough = len(a) >= 2 and len(b) >= 2
    if floor is not None and floor.paired is not None and len(common) >= 2:
        (sd, df), mean = floor.paired, diff.mean()
        half = t_quantile(df) * sd * math.sqrt(2 / len(common))
        method = f"paired noise floor sd {sd * 1e3:.2f}e-3, df {df:.3g}, {len(common)} seeds"
    elif floor is not None and enough:
        (sd, df), mean = floor.seed, a.mean() - b.mean()
        half = t_quantile(df) * sd * math.sqrt(1 / len(a) + 1 / len(b))
        method = f"noise floor sd {sd * 1e3:.2f}e-3, df {df:.3g}"
    elif len(common) >= 2:
        mean, half, df = diff.mean(), own_half_width(diff), len(common) - 1
        method = f"paired t, {len(common)} seeds"
    elif enough:
        mean, (half, df) = a.mean() - b.mean(), _welch(a, b)
        method = f"Welch t, {len(a)} and {len(b)} seeds"
    else:
        mean = diff.mean() if len(common) else a.mean() - b.mean()
        half, df, method = math.nan, math.nan, "one seed"
    if not np.isfinite([*a, *b]).all():
        mean = half = math.nan
    seeds, verdict = min(len(a), len(b)), _verdict(mean, half)
    return SeedGap(float(mean), float(half), float(df), seeds, by_seed, method, correlation, verdict)


def own_half_width(gaps: np.ndarray) -> float:
    """Of the 95 % interval of a mean gap from its gaps seed by seed [seeds] alone; NaN below two."""
    n = len(gaps)
    return float(t_quantile(n - 1) * np.std(gaps, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def _verdict(mean: float, half_width: float) -> str:
    if not math.isfinite(mean):
        return DIVERGED
    if math.isnan(half_width):
        return ONE_SEED
    return RESOLVED if abs(mean) > half_width else NOT_RESOLVED


def _welch(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(half width, degrees of freedom)."""
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if va + vb == 0:
        return 0.0, len(a) + len(b) - 2
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return t_quantile(df) * math.sqrt(va + vb), df


def _correlation(a: list[float], b: list[float]) -> float:
    if len(a) < CORRELATED or np.std(a) == 0 or np.std(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])
