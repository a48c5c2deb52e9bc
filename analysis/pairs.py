"""Which differences between recipes are resolved: every pair over seeds, judged alone and together with all the others.

With k recipes there are k (k - 1) / 2 questions, and among nine equal ones half of all comparisons "resolve" some pair
at 95 % each. `all_pairs` widens an interval so that all of them hold at once in 95 %: Tukey-Kramer where one spread
judges all, Games-Howell where each pair has its own.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np

from analysis import tables
from analysis.compare import Group, common_step, compare_pair
from analysis.pairing import CONFIDENCE, NOT_RESOLVED, RESOLVED, Floor, SeedGap, own_half_width, t_quantile
from base.runfolder import RunError

CSV_HEADER = ("recipe", "other", "step", "gap", "half_width", "half_width_all_pairs", "half_width_own_differences")
CSV_HEADER += ("gaps_by_seed", "method", "verdict", "verdict_all_pairs")


@dataclass(frozen=True)
class Pair:
    """The gap of `recipe` to `other` at `step`, nats/token.

    `at_end`: that step is these runs' last one. `all_pairs`: the half width with which all pairs hold at once.
    """

    recipe: str
    other: str
    step: int
    at_end: bool
    gap: SeedGap
    all_pairs: float = math.nan

    @property
    def by_seed(self) -> dict[int, float]:
        return self.gap.by_seed

    @property
    def own(self) -> float:
        """The half width from the gaps seed by seed alone; NaN below two."""
        return own_half_width(np.array(list(self.by_seed.values())))

    @property
    def resolved(self) -> bool:
        return self.gap.verdict == RESOLVED

    @property
    def resolved_among_all(self) -> bool:
        return self.resolved and abs(self.gap.mean) > self.all_pairs

    @property
    def verdict_among_all(self) -> str:
        return NOT_RESOLVED if self.resolved and not self.resolved_among_all else self.gap.verdict


def pairs(groups: list[Group], floor: Floor | None) -> list[Pair]:
    """Each two of the groups once, the later one minus the earlier; those without a step or a text in common left out.

    One spread judges all pairs of recipes with two seeds; those with one have no interval and don't widen any.
    """
    found = [pair for one, other in combinations(groups, 2) if (pair := _pair(other, one, floor))]
    judged = {label for p in found if math.isfinite(p.gap.half_width) for label in (p.recipe, p.other)}
    return [replace(p, all_pairs=p.gap.half_width * widening(len(judged), p.gap.df)) for p in found]


def _pair(group: Group, other: Group, floor: Floor | None) -> Pair | None:
    step = common_step(group, other)
    if step is None:
        return None
    try:
        gap, _ = compare_pair(group, other, step, floor)
    except RunError:
        return None
    return Pair(group.label, other.label, step, step == group.runs[0].info["steps"], gap)


@cache
def widening(recipes: int, df: float) -> float:
    """How much wider than one pair's the interval of each pair of so many recipes has to be; NaN without df."""
    if math.isnan(df):
        return math.nan
    from scipy.stats import studentized_range  # here: it takes as long to import as the rest of compare.py

    return float(studentized_range.ppf(CONFIDENCE, recipes, df)) / math.sqrt(2) / t_quantile(df)


def text(found: list[Pair]) -> str:
    """How many pairs are resolved, and which not; nothing where no pair has two seeds."""
    judged = [p for p in found if math.isfinite(p.gap.half_width)]
    if not judged:
        return ""
    alone = [p for p in judged if p.resolved and not p.resolved_among_all]
    among = sum(p.resolved_among_all for p in judged)
    lines = [f"Resolved pairs of recipes, judged all {len(judged)} at once: {among}."]
    if alone:
        lines.append(f"Only if no other pair was in question: {_names(alone)}.")
    if not_told := [p for p in judged if not p.resolved]:
        lines.append(f"Not resolved: {_names(not_told)}.")
    return " ".join(lines)


def _names(found: list[Pair]) -> str:
    return ", ".join(f"{p.other} and {p.recipe}" for p in found)


def to_csv(found: list[Pair]) -> str:
    """Full precision, nats/token, empty where there is no value."""
    rows = []
    for p in found:
        by_seed = " ".join(f"{seed}:{gap:.6f}" for seed, gap in p.by_seed.items())
        values = [p.recipe, p.other, p.step, p.gap.mean, p.gap.half_width, p.all_pairs, p.own, by_seed]
        rows.append([*values, p.gap.method, p.gap.verdict, p.verdict_among_all])
    return tables.csv_text(CSV_HEADER, rows)
