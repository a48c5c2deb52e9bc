"""Where errors come from, slot by slot, at a run's first and last look (probes.errors; quant/decompose.py).

In the report: the mean over a run's layers, and over the runs of a recipe.
"""

from collections.abc import Iterable
from statistics import fmean

from analysis import html
from analysis.compare import Group

# What of the terms is shown, under which head, times what.
SHOWN = {
    "mse": ("error", 1e3),
    "scale": ("scale", 1e3),
    "dead": ("dead zone", 1e3),
    "grid": ("grid", 1e3),
    "scale_grid": ("2<scale,grid>", 1e3),
    "scale_dead": ("2<scale,dead>", 1e3),
    "random": ("random bits", 1e3),
    "random_cross": ("2<random,error>", 1e3),
    "align": ("align", 1e3),
    "clipped": ("clipped %", 1e2),
    "underflowed": ("to zero %", 1e2),
}
NOTE = (
    "Squared error of each operand over its square, 1e-3, mean over layers, at the first and the last evaluation: what "
    "rounding the scales adds, what falls into the dead zone, what the grid costs, and cross terms; they add up. The "
    "terms are correlated, so none is a share. A slot that starts from what fprop made has its error on top of that."
)


def section(groups: list[Group]) -> list[str]:
    """Nothing where no run has looked."""
    rows = [row for group in groups for row in _rows(group)]
    if not rows:
        return []
    header = ["recipe", "slot", "step", *(head for head, _ in SHOWN.values())]
    return [html.heading("Where errors come from"), html.table(header, rows, "slot-errors"), html.note(NOTE)]


def _rows(group: Group) -> list[list[str]]:
    looks = [errors for run in group.members if (errors := run.looks_of("errors"))]
    if not looks:
        return []
    found = []
    for row in ([errors[0] for errors in looks], [errors[-1] for errors in looks]):
        layers = [layer for one in row for layer in one["errors"].values()]
        for slot in dict.fromkeys(slot for layer in layers for slot in layer):
            cells = [_cell(layer[slot].get(name) for layer in layers if slot in layer) for name in SHOWN]
            found.append([group.label, slot, str(row[0]["step"]), *map(_written, cells, SHOWN.values())])
    return sorted(dict.fromkeys(map(tuple, found)), key=lambda row: (row[1], int(row[2])))


def _cell(values: Iterable[float | None]) -> float | None:
    """The mean of those that are finite."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _written(value: float | None, how: tuple[str, float]) -> str:
    return "-" if value is None else f"{value * how[1]:.3f}"
