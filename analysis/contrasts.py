"""Is a recipe different from a mixture of others, equivalent to it, or is that open? For claims made beforehand.

A contrast is a recipe's loss minus a weighted mean of others, `quartet2:.25,bf16:.75`: below zero, the recipe's gap to
bf16 is less than a quarter of quartet2's. Three outcomes, and never "equal" for want of runs:
    different    the two-sided test of zero rejects
    equivalent   both one-sided tests of a margin reject (Schuirmann 1987), whether or not zero is rejected, too
    open         neither
Each family of p-values, of difference and of equivalence, is adjusted by Holm (1979) over all contrasts of the call.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtr

from analysis import tables
from analysis.alike import same_rows
from analysis.compare import Group, losses_at
from analysis.noise import paired
from analysis.pairing import CONFIDENCE, Floor, t_quantile

ALPHA = 1 - CONFIDENCE
DIFFERENT, EQUIVALENT, OPEN = "different", "equivalent", "open"
CSV_HEADER = ("recipe", "minus", "step", "value", "half_width", "seeds", "sd", "df", "margin", "p_different")
CSV_HEADER += ("p_equivalent", "p_below_zero", "p_below_margin", "holm_different", "holm_equivalent", "outcome")


@dataclass(frozen=True)
class Spread:
    """Standard deviation of one run [nats/token] without what a seed does to all recipes, its degrees of freedom, and
    where it is from."""

    sd: float
    df: float
    source: str


@dataclass(frozen=True)
class Contrast:
    """`recipe` minus `mixture` at `step`: `value` with its standard error `se` [nats/token], over `seeds` that all
    have. `holm_*`: p-values adjusted for all contrasts of the call; NaN where there is no verdict."""

    recipe: str
    mixture: str
    step: int
    value: float
    se: float
    seeds: int
    spread: Spread | None
    margin: float
    holm_different: float = math.nan
    holm_equivalent: float = math.nan

    @property
    def half_width(self) -> float:
        """Of the 95 % interval, of this contrast alone."""
        return math.nan if self.spread is None else t_quantile(self.spread.df) * self.se

    @property
    def p_different(self) -> float:
        """Two-sided, of zero."""
        return 2 * min(self.p_below(0.0), self._p_above(0.0))

    @property
    def p_equivalent(self) -> float:
        """Two one-sided tests: the larger of both."""
        return max(self.p_below(self.margin), self._p_above(-self.margin))

    def p_below(self, bound: float) -> float:
        """One-sided: how likely so low a value is if the truth is `bound` or more."""
        return self._tail(self.value - bound)

    def _p_above(self, bound: float) -> float:
        return self._tail(bound - self.value)

    def _tail(self, distance: float) -> float:
        if self.spread is None or not math.isfinite(distance):
            return math.nan
        if self.se == 0:
            return float(distance >= 0)
        return float(stdtr(self.spread.df, distance / self.se))

    @property
    def outcome(self) -> str:
        """By the adjusted p-values. Equivalent goes first: what is resolved within the margin is no loss."""
        if self.holm_equivalent < ALPHA:
            return EQUIVALENT
        return DIFFERENT if self.holm_different < ALPHA else OPEN


def parse(text: str, labels: Iterable[str]) -> dict[str, float]:
    """{recipe: weight} of "quartet2:.25,bf16:.75". ValueError for an unknown recipe, weights that are no numbers above
    0, and those that don't sum to 1: the level of the losses would enter."""
    labels, weights = list(labels), {}
    for part in text.split(","):
        name, _, weight = part.rpartition(":")
        if name not in labels:
            raise ValueError(f"--contrast {text}: {name or part!r} is not among the recipes: {', '.join(labels)}")
        try:
            weights[name] = weights.get(name, 0.0) + float(weight)
        except ValueError:
            raise ValueError(
                f"--contrast {text}: {weight!r} is no weight; write {name}:1 or quartet2:.25,bf16:.75"
            ) from None
    if not all(0 < weight <= 1 for weight in weights.values()) or abs(sum(weights.values()) - 1) > 1e-9:
        raise ValueError(f"--contrast {text}: weights need to be above 0 and sum to 1, as in quartet2:.25,bf16:.75")
    return weights


def contrasts(
    groups: list[Group], mixtures: list[dict[str, float]], margin: float, floor: Floor | None
) -> list[Contrast]:
    """Each recipe that is not in a mixture against it, adjusted over all of them. RunError unless all that are compared
    were scored on the same text."""
    named = {group.label: group for group in groups}
    found = []
    for mixture in mixtures:
        parts = [named[label] for label in mixture]
        for group in groups:
            if group.label not in mixture and (step := last_step([group, *parts])) is not None:
                same_rows((run, step) for side in (group, *parts) for run in side.runs)
                losses = {side.label: losses_at(side, step) for side in groups if _was_there(side, step)}
                at_end = all(run.info["steps"] == step for side in (group, *parts) for run in side.runs)
                spread = spread_of(losses, floor if at_end else None)
                found.append(contrast(group.label, mixture, step, losses, spread, margin))
    return adjusted(found)


def last_step(sides: list[Group]) -> int | None:
    """The last step at which every run of all sides was evaluated; None without one."""
    shared = set.intersection(*(set(run.evals["step"].astype(int)) for side in sides for run in side.runs))
    return max(shared) if shared else None


def _was_there(side: Group, step: int) -> bool:
    return all(step in run.evals["step"] for run in side.runs)


def spread_of(losses: dict[str, dict[int, float]], floor: Floor | None) -> Spread | None:
    """The measured floor, else what these recipes show themselves, pooled over all; None without two seeds of any."""
    if floor is not None and floor.paired is not None:
        return Spread(*floor.paired, "noise floor")
    finite = {label: row for label, row in losses.items() if np.isfinite(list(row.values())).all()}
    own = paired(finite) if finite else None
    return None if own is None else Spread(own.sd, own.df, f"residuals of {len(finite)} recipes here")


def contrast(
    recipe: str,
    mixture: dict[str, float],
    step: int,
    losses: dict[str, dict[int, float]],
    spread: Spread | None,
    margin: float,
) -> Contrast:
    """From {recipe: {seed: loss}}. Over the seeds that all have; of fewer than two there is a value and no verdict.

    Runs are independent but for their seed, which cancels since weights sum to 1: the variance of one seed's value is
    sd^2 (1 + sum of squared weights).
    """
    seeds = set.intersection(*(set(losses[label]) for label in (recipe, *mixture)))
    values = [losses[recipe][s] - sum(w * losses[label][s] for label, w in mixture.items()) for s in sorted(seeds)]
    value = float(np.mean(values)) if values else math.nan
    factor = math.sqrt((1 + sum(weight**2 for weight in mixture.values())) / max(len(values), 1))
    judged = spread if len(values) > 1 and math.isfinite(value) else None
    text = " + ".join(label if weight == 1 else f"{weight:g} {label}" for label, weight in mixture.items())
    return Contrast(recipe, text, step, value, factor * judged.sd if judged else math.nan, len(values), judged, margin)


def adjusted(found: list[Contrast]) -> list[Contrast]:
    """With Holm's p-values over those that have a verdict."""
    judged = [c for c in found if c.spread is not None]
    columns = [holm([getattr(c, name) for c in judged]) for name in ("p_different", "p_equivalent")]
    by_id = {id(c): pair for c, pair in zip(judged, zip(*columns, strict=True), strict=True)}
    return [
        replace(c, holm_different=by_id[id(c)][0], holm_equivalent=by_id[id(c)][1]) if id(c) in by_id else c
        for c in found
    ]


def holm(p: list[float]) -> list[float]:
    """Adjusted p-values, in the order given: the k-th smallest times the number of those not smaller, not falling."""
    order = sorted(range(len(p)), key=p.__getitem__)
    out, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        out[i] = largest
    return out


def text(found: list[Contrast]) -> str:
    """One line a contrast, nats/token in 1e-3, and how it was judged."""
    if not found:
        return "No contrast: each recipe is in the mixture, or none has an evaluation step in common with it."
    lines = []
    for c in found:
        interval = f"{1e3 * c.value:+.2f}" + (f" +- {1e3 * c.half_width:.2f}" if c.spread else "")
        tests = f"p {c.holm_different:.2g} different, {c.holm_equivalent:.2g} equivalent" if c.spread else why_open(c)
        lines.append(
            f"{c.outcome:10}  {c.recipe} - ({c.mixture}): {interval} e-3 at step {c.step}, {c.seeds} seeds; {tests}"
        )
    spreads = {c.spread for c in found if c.spread}
    shown = "; ".join(f"sd of a run {1e3 * s.sd:.2f}e-3, df {s.df:.3g}, {s.source}" for s in sorted(spreads, key=str))
    judged = sum(c.spread is not None for c in found)
    by = f"Margin {1e3 * found[0].margin:g}e-3; p-values by Holm over {judged}; {shown}."
    return "\n".join([*lines, by if spreads else "No contrast has two seeds that all sides share: no verdict."])


def why_open(c: Contrast) -> str:
    if not c.seeds:
        return "no seed in common"
    return "diverged: no verdict" if not math.isfinite(c.value) else "one seed or no spread: no verdict"


def to_csv(found: list[Contrast]) -> str:
    """Full precision, nats/token, empty where there is no value."""
    rows = []
    for c in found:
        sd, df = (c.spread.sd, c.spread.df) if c.spread else (math.nan, math.nan)
        tests = [c.p_different, c.p_equivalent, c.p_below(0.0), c.p_below(c.margin)]
        rows.append([c.recipe, c.mixture, c.step, c.value, c.half_width, c.seeds, sd, df, c.margin, *tests])
        rows[-1] += [c.holm_different, c.holm_equivalent, c.outcome]
    return tables.csv_text(CSV_HEADER, rows)
