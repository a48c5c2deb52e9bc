"""Figures of the scaling-law fit: losses with the law, gaps by size, efficiency factors with bootstrap intervals."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from analysis.law import Factors, Law, arrays
from analysis.plots import COLOURS, end_labels, style_axes
from analysis.published import Points, gaps

Intervals = dict[str, tuple[tuple[float, float], tuple[float, float]]]  # {recipe: (eff_N low/high, eff_D low/high)}


def figure(
    law: Law,
    base: Points,
    recipes: dict[str, Points],
    factors: dict[str, Factors],
    spread: Intervals,
    ours: dict[str, Points],
) -> Figure:
    """One page: law on the baseline, factors, and one panel of gaps per model size.

    The gaps of `ours` are drawn as stars. Their losses are not: of other text, they mean nothing beside these.
    """
    sizes = sorted({n for n, _ in base})
    fig = plt.figure(figsize=(13, 9.5), dpi=110, layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(1.15, 1))
    left, right = top.subplots(1, 2)
    draw_law(left, law, base)
    draw_factors(right, factors, spread)
    panels = bottom.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for ax, size in zip(panels, sizes, strict=True):
        draw_gaps(ax, size, law, base, recipes, factors, ours)
    stars = "; stars: ours, gaps on our own text" if any(ours.values()) else ""
    panels[0].set_ylabel(f"gap to bf16 [1e-3 nats/token]{stars}")
    return fig


def draw_law(ax: Axes, law: Law, base: Points) -> None:
    n, d, loss = arrays(base)
    ends = []
    for i, size in enumerate(sorted(set(n))):
        mine, colour = n == size, COLOURS[i % len(COLOURS)]
        x = np.geomspace(d[mine].min(), d[mine].max(), 60)
        ax.plot(x, law.loss(size, x), color=colour, linewidth=1.3)
        ax.plot(d[mine], loss[mine], "o", color=colour, markersize=4)
        ends.append((x[-1], float(law.loss(size, x[-1:])[0]), f"{size / 1e6:.0f}M", colour))
    ax.set_xscale("log")
    style_axes(ax, "final validation loss [nats/token]", "bf16: measured and law")
    end_labels(ax, ends)


def draw_factors(ax: Axes, factors: dict[str, Factors], spread: Intervals) -> None:
    names = sorted(factors, key=lambda name: factors[name].eff_n)
    for y, name in enumerate(names):
        for value, (low, high), colour, offset, marker in (
            (factors[name].eff_n, spread[name][0], COLOURS[0], 0.12, "o"),
            (factors[name].eff_d, spread[name][1], COLOURS[1], -0.12, "s"),
        ):
            ax.plot([low, high], [y + offset] * 2, color=colour, linewidth=1.5)
            ax.plot(value, y + offset, marker, color=colour, markersize=4)
    ax.axvline(1, color="#000000", linewidth=0.8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    style_axes(ax, "", "● eff_N, ■ eff_D, 95 % bootstrap", x="factor (1 = as bf16)")


def draw_gaps(ax: Axes, size: int, law: Law, base: Points, recipes, factors, ours) -> None:
    ends = []
    for i, (name, points) in enumerate(recipes.items()):
        gap = {cell: v for cell, v in gaps(points, base).items() if cell[0] == size}
        if not gap:
            continue
        _, d, value = arrays(gap)
        colour = COLOURS[i % len(COLOURS)]
        x = np.geomspace(d.min(), d.max(), 40)
        curve = law.loss(size, x, factors[name].eff_n, factors[name].eff_d) - law.loss(size, x)
        ax.plot(x, 1e3 * curve, color=colour, linewidth=1)
        ax.plot(d, 1e3 * value, "o", color=colour, markersize=3.5)
        ends.append((x[-1], float(1e3 * value[-1]), name, colour))
        mine = gaps(ours.get(name, {}), ours.get("bf16", {}))
        for (own_size, tokens), value in mine.items():
            if abs(own_size / size - 1) < 0.01:
                ax.plot(tokens, 1e3 * value, "*", color=colour, markersize=10)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # decades alone may be one tick, which makes no scale
    ax.tick_params(axis="x", labelsize=7)
    style_axes(ax, "", f"{size / 1e6:.0f}M: gap, measured and law")
    end_labels(ax, ends, fontsize=7)
