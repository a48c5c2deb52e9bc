"""Is a recipe different from a mixture of others, equivalent to it, or is that open? For claims made beforehand.

A contrast is a recipe's loss minus a weighted mean of others, `quartet2:.25,bf16:.75`: below zero, the recipe's gap to
bf16 is less than a quarter of quartet2's. Three outcomes, and never "equal" for want of runs:
    different    the two-sided test of zero rejects
    equivalent   both one-sided tests of a margin reject (Schuirmann 1987), whether or not zero is rejected, too
    open         neither
A claim, `arm<quartet2:.25,bf16:.75`, is of that arm alone and one-sided:
    below        the one-sided test of zero rejects
    not above    that of the margin does: non-inferior
    open         neither
Each family of p-values, the first and the second of these tests, is adjusted by Holm (1979) over all contrasts and
claims of the call. `recipe[nvfp4]` is the loss of its final weights under that forward (scripts/score.py).
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtr

from analysis import tables
from analysis.alike import same_rows
from analysis.compare import Group, common_step, losses_at, named, seed_means
from analysis.noise import paired
from analysis.pairing import CONFIDENCE, Floor, t_quantile
from base.runfolder import RunError

ALPHA = 1 - CONFIDENCE
DIFFERENT, EQUIVALENT, OPEN = "different", "equivalent", "open"
BELOW, NOT_ABOVE = "below", "not above"
PART = re.compile(r"(?P<side>.+?):(?P<weight>[^,:]*)(?:,|$)")  # a label may hold colons and commas
SERVED = re.compile(r"(?P<label>.+)\[(?P<forward>\w+)\]")
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
class Asked:
    """What is to be judged against `mixture` {side: weight}: `arm`, one-sided; None: every recipe that isn't in it."""

    mixture: dict[str, float]
    arm: str | None = None


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
    one_sided: bool = False
    holm_different: float = math.nan
    holm_equivalent: float = math.nan

    @property
    def half_width(self) -> float:
        """Of the 95 % interval, of this contrast alone."""
        return math.nan if self.spread is None else t_quantile(self.spread.df) * self.se

    @property
    def p_different(self) -> float:
        """Of zero: two-sided, of a claim one-sided."""
        if self.one_sided:
            return self.p_below(0.0)
        return 2 * min(self.p_below(0.0), self._p_above(0.0))

    @property
    def p_equivalent(self) -> float:
        """Two one-sided tests: the larger of both; of a claim the one that it is not above the margin."""
        if self.one_sided:
            return self.p_below(self.margin)
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
        if self.one_sided and self.holm_different < ALPHA:
            return BELOW
        if self.one_sided:
            return NOT_ABOVE if self.holm_equivalent < ALPHA else OPEN
        if self.holm_equivalent < ALPHA:
            return EQUIVALENT
        return DIFFERENT if self.holm_different < ALPHA else OPEN


def read(text: str, labels: Iterable[str]) -> Asked:
    """A contrast, "quartet2:.25,bf16:.75", or a claim, "arm<quartet2:.25,bf16:.75". ValueError as `parse`."""
    arm, less, mixture = text.rpartition("<")
    labels = list(labels)
    return Asked(parse(mixture, labels, text), side_of(arm.strip(), labels, text) if less else None)


def parse(mixture: str, labels: Iterable[str], text: str = "") -> dict[str, float]:
    """{side: weight} of "quartet2:.25,bf16:.75". ValueError for an unknown recipe, weights that are no numbers above
    0, and those that don't sum to 1: the level of the losses would enter."""
    labels, weights, text = list(labels), {}, text or mixture
    parts = list(PART.finditer(mixture))
    if not parts or parts[-1].end() < len(mixture):
        last = mixture[parts[-1].end() :] if parts else mixture
        raise ValueError(f"--contrast {text}: {last!r} has no weight; write {last}:1 or quartet2:.25,bf16:.75")
    for part in parts:
        name, weight = side_of(part["side"].strip(), labels, text), part["weight"]
        try:
            weights[name] = weights.get(name, 0.0) + float(weight)
        except ValueError:
            raise ValueError(
                f"--contrast {text}: {weight!r} is no weight; write {name}:1 or quartet2:.25,bf16:.75"
            ) from None
    if not all(0 < weight <= 1 for weight in weights.values()) or abs(sum(weights.values()) - 1) > 1e-9:
        raise ValueError(f"--contrast {text}: weights need to be above 0 and sum to 1, as in quartet2:.25,bf16:.75")
    return weights


def side_of(name: str, labels: list[str], text: str) -> str:
    """`name` with its recipe's whole label: "bf16[nvfp4]" as "bf16 (optim.lr=1)[nvfp4]". ValueError for none."""
    label, forward = split(name)
    try:
        return f"{named(labels, label)}{'' if forward is None else f'[{forward}]'}"
    except LookupError as error:
        raise ValueError(f"--contrast {text}: {error}") from None


def split(side: str) -> tuple[str, str | None]:
    """(label, the forward under which it is served, None for its own)."""
    found = SERVED.fullmatch(side)
    return (found["label"], found["forward"]) if found else (side, None)


def contrasts(groups: list[Group], asked: list[Asked], margin: float, floor: Floor | None) -> list[Contrast]:
    """Each claim, and each recipe that is not in a mixture against it, adjusted over all of them. RunError unless all
    that are compared were scored on the same text."""
    found = []
    for one in asked:
        mixed = {split(side)[0] for side in one.mixture}
        arms = [one.arm] if one.arm else [group.label for group in groups if group.label not in mixed]
        found += [c for arm in arms if (c := judged(groups, one, arm, margin, floor)) is not None]
    return adjusted(found)


def judged(groups: list[Group], asked: Asked, arm: str, margin: float, floor: Floor | None) -> Contrast | None:
    """`arm` against the mixture at the last step that all sides have; None without one."""
    by_label = {group.label: group for group in groups}
    names = [arm, *asked.mixture]
    sides = [by_label[split(name)[0]] for name in names]
    step = common_step(*sides)
    if step is None:
        return None
    same_rows((run, step) for side in {id(side): side for side in sides}.values() for run in side.runs)
    at_end = all(run.info["steps"] == step for side in sides for run in side.runs)
    losses = {name: losses_of(side, name, step, at_end) for name, side in zip(names, sides, strict=True)}
    # What tells how far runs scatter: each recipe once, those of the contrast as they are in it.
    mine = {split(name)[0]: name for name in reversed(names)}
    others = {group.label: losses_at(group, step) for group in groups if group.has(step)}
    scatter = others | {label: losses[name] for label, name in mine.items()}
    spread = spread_of(scatter, floor if at_end else None)
    return contrast(arm, asked.mixture, step, losses, spread, margin, one_sided=asked.arm is not None)


def losses_of(side: Group, name: str, step: int, at_end: bool) -> dict[int, float]:
    """{seed: loss at `step`} of a side; under another forward there are those of the end alone."""
    forward = split(name)[1]
    if forward is None:
        return losses_at(side, step)
    if not at_end:
        raise RunError(f"{name}: other forwards are scored at the end, and the last step in common is {step}")
    return seed_means(side, lambda run: run.served(forward))


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
    one_sided: bool = False,
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
    se = factor * judged.sd if judged else math.nan
    return Contrast(recipe, text, step, value, se, len(values), judged, margin, one_sided)


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
        what = (BELOW, f"{NOT_ABOVE} the margin") if c.one_sided else (DIFFERENT, EQUIVALENT)
        tests = f"p {c.holm_different:.2g} {what[0]}, {c.holm_equivalent:.2g} {what[1]}" if c.spread else why_open(c)
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
