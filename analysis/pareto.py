"""Loss against predicted time to equal loss: what a recipe costs where time is what is paid.

A recipe that ends `gap` nats above the baseline needs more tokens to come down to the baseline's
loss, by the slope s of the loss over ln(tokens) exp(gap / s) times as many; its step takes `step`
times the baseline's, predicted. So

    time = step * exp(gap / s)

over the baseline's. s is of the published law at this size and length (results/law: other text, one
epoch), unless it is given. It is the largest doubt: its error enters the bars as a share of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from analysis import plots, tables
from analysis.law import PUBLISHED, read_law
from base.runfolder import RunError

DOUBT = 0.25  # of the slope: one standard deviation, a guess
STEP_D = 1.01  # the ratio of two lengths between which the slope is read off
CSV_HEADER = ("recipe", "gpu", "seeds", "gap", "gap_half", "step", "time", "time_low", "time_high")


@dataclass(frozen=True)
class Point:
    """A recipe on one GPU: `gap` and half of its 95 % interval [nats/token; NaN of one seed], `step` and `time` over
    the baseline's."""

    label: str
    gpu: str
    seeds: int
    gap: float
    half: float
    step: float
    slope: float
    doubt: float

    @property
    def time(self) -> float:
        return self.step * math.exp(self.gap / self.slope)

    @property
    def interval(self) -> tuple[float, float]:
        """95 %: of the seeds' gap, where it is known, and of the slope."""
        of_slope = 1.96 * self.doubt * self.gap / self.slope
        of_seeds = 0.0 if math.isnan(self.half) else self.half / self.slope
        factor = math.exp(math.hypot(of_slope, of_seeds))
        return self.time / factor, self.time * factor


def slope_of_law(parameters: int, tokens: int, path: Path = PUBLISHED) -> float:
    """Nats a factor e of tokens that the published BF16 law says, as a positive number. RunError for another file."""
    try:
        return read_law(path).slope(parameters, tokens, tokens * STEP_D)
    except RunError as error:
        raise RunError(f"{error}; give --slope") from None


def front(points: list[Point]) -> list[Point]:
    """Those that no other beats in both, by time."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.time, p.gap)):
        if not best or point.gap < best[-1].gap:
            best.append(point)
    return best


def figure(points: Mapping[str, list[Point]]) -> Figure:
    """A panel a GPU, the same recipes in the same colours."""
    drawn, axes = plt.subplots(1, len(points), figsize=(5.2 * len(points), 4.6), sharey=True, layout="constrained")
    for ax, (gpu, those) in zip([axes] if len(points) == 1 else axes, points.items(), strict=True):
        along = front(those)
        ax.plot([p.time for p in along], [1e3 * p.gap for p in along], color="#999999", lw=0.8, zorder=1)
        for number, point in enumerate(those):
            low, high = point.interval
            half = None if math.isnan(point.half) else [[1e3 * point.half]] * 2
            sides = [[point.time - low], [high - point.time]]
            style = {"color": "black" if number == 0 else plots.COLOURS[(number - 1) % len(plots.COLOURS)], "ms": 5}
            ax.errorbar(
                [point.time], [1e3 * point.gap], half, sides, fmt="o", lw=1, capsize=2, label=point.label, **style
            )
        ax.set_title(gpu, fontsize=10)
        ax.set_xlabel("predicted time to the baseline's loss, over its own")
        ax.axvline(1, color="#cccccc", lw=0.8, zorder=0)
        ax.margins(x=0.15)
        ax.spines[["top", "right"]].set_visible(False)
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    drawn.axes[0].set_ylabel("loss over the baseline's, 1e-3 nats/token")
    return drawn


def to_csv(points: Mapping[str, list[Point]]) -> str:
    """Full precision, nats/token."""
    rows = [
        [p.label, p.gpu, p.seeds, p.gap, p.half, p.step, p.time, *p.interval]
        for those in points.values()
        for p in those
    ]
    return tables.csv_text(CSV_HEADER, rows)


def text(points: Mapping[str, list[Point]]) -> str:
    """Aligned for a terminal, the GPUs beside each other."""
    lines = [["recipe", "seeds", "gap e-3", *(f"{gpu}: step, time (95 %)" for gpu in points)]]
    for those in zip(*points.values(), strict=True):
        one = those[0]
        half = "" if math.isnan(one.half) else f" ± {1e3 * one.half:.1f}"
        each = [f"{p.step:.3f}, {p.time:.3f} ({p.interval[0]:.2f} to {p.interval[1]:.2f})" for p in those]
        lines.append([one.label, str(one.seeds), f"{tables.signed(1e3 * one.gap, 1)}{half}", *each])
    return tables.aligned(lines)
