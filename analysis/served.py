"""The same final weights under other forwards than the one that trained them (score/<step>.json).

All over one number, the baseline's own final loss: of a recipe trained in 4 bits, `own` is its gap,
`bf16` what training did to its weights, own - bf16 what quantizing costs at that moment; of the
baseline, `nvfp4` is what rounding at the end costs.
"""

import math
from dataclasses import dataclass

from analysis import pages, tables
from analysis.compare import Group, mean_over_seeds
from base.runfolder import FORWARDS

OWN = "own"
NOTE = (
    "The same final weights under other forwards, minus the baseline's loss under its own, over the "
    "seeds that have been scored of both, 1e-3 nats/token. own - bf16: what quantizing costs at that "
    "moment; bf16: what training with it did to the weights. No intervals: compare.py --contrast "
    "'arm[nvfp4]<...' gives a verdict."
)
CSV_HEADER = ("recipe", "forward", "seeds", "loss", "over_baseline")


@dataclass(frozen=True)
class Served:
    """`losses`: {forward: nats/token} of a recipe's weights, mean over `seeds`; `over`: minus the baseline's own."""

    label: str
    seeds: int
    losses: dict[str, float]
    over: dict[str, float]


def served(groups: list[Group], base: Group) -> list[Served]:
    """One row a recipe that has been scored, with the seeds of which its runs and the baseline's have been."""
    reference = scored_seeds(base)
    found = []
    for group in groups:
        seeds = sorted(scored_seeds(group) & reference)
        names = [name for name in (OWN, *FORWARDS) if all(name in run.scores for run in of(group, seeds))]
        if not seeds or not names:
            continue
        losses = {name: mean(group, seeds, name) for name in names}
        own = mean(base, seeds, OWN)
        found.append(Served(group.label, len(seeds), losses, {name: loss - own for name, loss in losses.items()}))
    return found


def scored_seeds(group: Group) -> set[int]:
    """Of which every run has been scored under its own forward."""
    return {seed for seed, runs in group.by_seed().items() if all(OWN in run.scores for run in runs)}


def of(group: Group, seeds: list[int]) -> list:
    return [run for seed in seeds for run in group.by_seed()[seed]]


def mean(group: Group, seeds: list[int], forward: str) -> float:
    chosen = Group(group.label, tuple(of(group, seeds)))
    return mean_over_seeds(chosen, lambda run: run.served(forward))


def header(found: list[Served]) -> list[str]:
    return ["recipe", "seeds", *columns(found)]


def columns(found: list[Served]) -> list[str]:
    return [name for name in (OWN, *FORWARDS) if any(name in one.over for one in found)]


def cells(found: list[Served]) -> list[list[str]]:
    return [
        [one.label, str(one.seeds), *(tables.signed(1e3 * one.over.get(name, math.nan)) for name in columns(found))]
        for one in found
    ]


def text(found: list[Served]) -> str:
    """Aligned for a terminal; empty without any."""
    return tables.aligned([header(found), *cells(found)]) + f"\n\n{NOTE}" if found else ""


def markdown(found: list[Served]) -> str:
    return pages.table(header(found), cells(found)) + f"\n{NOTE}"


def to_csv(found: list[Served]) -> str:
    """Full precision, nats/token."""
    rows = [[one.label, name, one.seeds, one.losses[name], over] for one in found for name, over in one.over.items()]
    return tables.csv_text(CSV_HEADER, rows)
