"""Loss and gap curves as PNG (matplotlib, Agg). Okabe-Ito colours, names written at the ends of the lines."""

from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.compare import Group, Row, shared_seeds
from analysis.runs import Run
from analysis.tables import tokens
from base.files import atomic_write

# Okabe-Ito without yellow (unreadable on white); the baseline is black. Line styles repeat with another period, so
# that two lines never share both.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLES = ("-", "--", "-.", ":")
BASELINE = ("#000000", "-")
Curve = tuple[np.ndarray, np.ndarray]  # steps, losses
Band = tuple[np.ndarray, np.ndarray, np.ndarray]  # steps, means, standard errors
SMOOTHING = 0.02  # width of the moving average of training losses, as a share of the run


def styles(groups: list[Group], base: Group) -> dict[str, tuple[str, str]]:
    """{label: (colour, line style)}, by position among the non-baseline groups."""
    others = [g.label for g in groups if g is not base]
    found = {
        label: (COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]) for i, label in enumerate(others)
    }
    return {base.label: BASELINE, **found}


def figure(
    groups: list[Group], base: Group, rows: Iterable[Row] = (), published: dict[str, float] | None = None
) -> Figure:
    """Validation and training loss against tokens (left), gap to the baseline over training (right; without one, none).

    `rows`: of the table, whose intervals are drawn as bars. `published`: {label: gap in nats} of published runs of this
    size and length, drawn as hollow diamonds.
    """
    style = styles(groups, base)
    panels = 2 if len(groups) > 1 else 1
    fig, axes = plt.subplots(
        1, panels, figsize=(13 if panels > 1 else 7, 5.2), dpi=120, layout="constrained", squeeze=False
    )
    draw_losses(axes[0, 0], groups, style, unlike_text(groups, base))
    intervals = [row for row in rows if row.gap is not None and np.isfinite(row.gap.half_width)]
    if panels > 1:
        draw_gaps(axes[0, 1], groups, base, style, intervals, published or {})
    return fig


def unlike_text(groups: list[Group], base: Group) -> list[str]:
    """Labels of groups whose validation curves are of more or less text than the baseline's, or of several kinds."""

    def scored(group: Group) -> set[float]:
        return {float(count) for run in group.runs for count in run.targets[:1]}

    return [group.label for group in groups if len(scored(group) | scored(base)) > 1]


def draw_losses(ax: Axes, groups: list[Group], style: dict[str, tuple[str, str]], unlike: list[str]) -> None:
    """`unlike`: groups whose validation curve is named instead of drawn: it is of other text than the baseline's."""
    ends, squares = [], ""
    for group in groups:
        colour, dash = style[group.label]
        for run in group.runs:
            x, y = smoothed(run)
            ax.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
        if group.label in unlike:
            continue
        per_step = group.runs[0].info["tokens_per_step"]
        steps, mean, _ = group_curve(group)
        ax.plot(steps * per_step, mean, color=colour, linestyle=dash, linewidth=1.6, marker="o", markersize=3)
        every, losses, _ = group_curve(group, all_evaluations)
        if len(every) > len(steps):  # the last one is of more text: the table's loss, but no point of the curve
            ax.plot(every[-1:] * per_step, losses[-1:], "s", color=colour, markersize=4)
            squares = ", ■ on the final validation text"
        if len(every):
            ends.append((every[-1] * per_step, losses[-1], group.caption, colour))
    left_out = f"; scored on other text, so not drawn: {', '.join(unlike)}" if unlike else ""
    title = f"Loss: validation (thick, mean over seeds{squares}), training (thin){left_out}"
    style_axes(ax, "loss [nats/token]", title)
    _zoom(ax, groups)
    end_labels(ax, ends)


def draw_gaps(
    ax: Axes,
    groups: list[Group],
    base: Group,
    style: dict[str, tuple[str, str]],
    intervals: list[Row],
    published: dict[str, float],
) -> None:
    """Validation loss minus the baseline's of the same seed; the band is one standard error over seeds."""
    ends, bands = [], False
    ax.axhline(0, color="#000000", linewidth=1)
    for group in groups:
        if group is base:
            continue
        colour, dash = style[group.label]
        steps, mean, se = gap_curve(group, base)
        x = steps * base.runs[0].info["tokens_per_step"]
        ax.plot(x, mean * 1e3, color=colour, linestyle=dash, linewidth=1.6, marker="o", markersize=3)
        if np.all(np.isfinite(se)) and len(se):
            ax.fill_between(x, (mean - se) * 1e3, (mean + se) * 1e3, color=colour, alpha=0.15, linewidth=0)
            bands = True
        if len(x):
            ends.append((x[-1], mean[-1] * 1e3, group.caption, colour))
        if group.label in published:
            diamond = {"color": colour, "fillstyle": "none", "markersize": 7, "clip_on": False}
            ax.plot(base.runs[0].info["tokens"], published[group.label] * 1e3, "D", **diamond)
    found = ["band: standard error over seeds"] * bands + ["bars: 95 % intervals"] * bool(intervals)
    found = found or ["one seed: no error bar"]
    found += ["◇ published"] * bool(published)
    style_axes(ax, f"gap to {base.label} [1e-3 nats/token]", f"Gap to {base.label} ({', '.join(found)})")
    _gap_limits(ax, [y for _, y, _, _ in ends] + [1e3 * gap for gap in published.values()])
    draw_intervals(ax, intervals, style)
    end_labels(ax, ends)


def draw_intervals(ax: Axes, rows: list[Row], style: dict[str, tuple[str, str]]) -> None:
    """The verdicts' intervals, side by side where the curves end: a band of two seeds may be far narrower."""
    step, (bottom, top) = 0.008 * np.ptp(ax.get_xlim()), ax.get_ylim()
    low, high = bottom, top
    for i, row in enumerate(rows):
        middle, half = 1e3 * row.gap.mean, 1e3 * row.gap.half_width
        x, colour = row.tokens - i * step, style[row.label][0]
        ax.plot([x, x], [middle - half, middle + half], color=colour, linewidth=1.2, alpha=0.8)
        low, high = min(low, middle - 1.05 * half), max(high, middle + 1.05 * half)
    ax.set_ylim(max(low, bottom - top + bottom), min(high, top + top - bottom))  # a bar of no use flattens no curve


def gap_curve(group: Group, base: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean gap and its standard error over seeds [nats/token]. No common seed: difference of the means. Only
    where both were evaluated on equally much text: how much that is may differ from step to step, and between runs."""
    ours, theirs, common = group.by_seed(), base.by_seed(), shared_seeds(group, base)
    if not common:
        means = [group_curve(side, all_evaluations)[:2] for side in (group, base)]
        steps, gaps = _difference(*means, (*group.runs, *base.runs))
        return steps, gaps, np.full(len(steps), np.nan)
    curves = []
    for seed in common:
        means = [mean_curve([all_evaluations(run) for run in side[seed]])[:2] for side in (ours, theirs)]
        curves.append(_difference(*means, (*ours[seed], *theirs[seed])))
    return mean_curve(curves)


def _difference(one: Curve, other: Curve, runs: Iterable[Run]) -> Curve:
    """one - other at the steps that both have and at which all `runs` scored equally many tokens."""
    shared, i, j = np.intersect1d(one[0], other[0], return_indices=True)
    same = np.array([len({run.targets_at(step) for run in runs}) == 1 for step in shared], bool)
    return shared[same], (one[1][i] - other[1][j])[same]


def all_evaluations(run: Run) -> Curve:
    """Unlike `run.curve` with the last one, which may be of more text: for differences at equal steps."""
    return run.evals["step"], run.evals["loss"]


def group_curve(group: Group, curve: Callable[[Run], Curve] = lambda run: run.curve) -> Band:
    """Steps, mean and standard error over seeds; reruns of a seed are averaged first, as in the table."""
    return mean_curve([mean_curve([curve(run) for run in runs])[:2] for runs in group.by_seed().values()])


def mean_curve(curves: list[Curve]) -> Band:
    """Mean and standard error at the steps that every curve has (NaN error for a single curve)."""
    shared = curves[0][0]
    for steps, _ in curves[1:]:
        shared = np.intersect1d(shared, steps)
    values = np.array([y[np.isin(steps, shared)] for steps, y in curves])
    n = len(curves)
    se = values.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.full(len(shared), np.nan)
    return shared, values.mean(axis=0), se


def smoothed(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Training loss as a centred moving average over 2 % of the logged steps; x in tokens."""
    y, x = run.train["loss"], run.train["tokens"]
    width = max(1, round(SMOOTHING * len(y)))
    if width < 2:
        return x, y
    return np.convolve(x, np.ones(width) / width, "valid"), np.convolve(y, np.ones(width) / width, "valid")


def _zoom(ax: Axes, groups: list[Group]) -> None:
    """The first steps fall by several nats and would flatten everything else: start the axis at 10 % of the run.
    So would the spike of one that diverges: above ln(vocabulary), what knowing nothing costs, nothing is shown."""
    values = []
    for group in groups:
        for run in group.runs:
            x, y = smoothed(run)
            values.extend(y[x >= 0.1 * run.info["tokens"]])
            steps, losses = all_evaluations(run)
            values.extend(losses[steps >= 0.1 * run.info["steps"]])
    nothing = max(np.log(run.info["vocab_size"]) for group in groups for run in group.runs)
    shown = [v for v in values if v <= nothing]
    if shown:
        low, high = min(shown), max(shown)
        ax.set_ylim(low - 0.05 * (high - low + 1e-3), high + 0.05 * (high - low + 1e-3))


def _gap_limits(ax: Axes, gaps: list[float]) -> None:
    """Early gaps are large and of no interest: show all that is drawn within half the final range around it."""
    finals = [gap for gap in gaps if np.isfinite(gap)]
    if finals:
        low, high = min(0, *finals), max(0, *finals)
        size = high - low + 1e-6
        bottom, top = max(ax.dataLim.y0, low - size / 2), min(ax.dataLim.y1, high + size / 2)
        ax.set_ylim(min(bottom, low) - 0.1 * size, max(top, high) + 0.1 * size)


def style_axes(ax: Axes, label: str, title: str, x: str = "training tokens") -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(label)
    ax.set_title(title, fontsize=10, loc="left", wrap=True)
    if x == "training tokens":
        ax.xaxis.set_major_formatter(lambda value, _: tokens(value))
        ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def end_labels(ax: Axes, ends: list[tuple[float, float, str, str]], fontsize: float = 9) -> None:
    """Names of lines (x, y, name, colour) right of the axes, pushed apart so that they never overlap."""
    ends = sorted((e for e in ends if np.isfinite(e[1])), key=lambda e: e[1])
    if not ends:
        return
    low, high = ax.get_ylim()
    inches = ax.bbox.height / ax.get_figure(root=True).dpi
    room = 1.35 * fontsize / 72 / inches * (high - low)  # one line of text
    heights = [float(np.clip(y, low, high)) for _, y, _, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + room)
    heights[-1] = min(heights[-1], high)
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = min(heights[i], heights[i + 1] - room)
    x_end = ax.dataLim.x1  # of everything drawn: training goes on behind the last evaluation of the same list
    if ax.get_xscale() == "linear":
        ax.set_xlim(right=x_end + 0.01 * (x_end - ax.get_xlim()[0]))  # the last marker whole
    for (x, y, name, colour), height in zip(ends, heights, strict=True):
        anchor = {"xycoords": "data", "textcoords": ax.get_yaxis_transform(), "annotation_clip": False}
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 2, "shrinkB": 0, "relpos": (0, 0.5)}
        at = (x, float(np.clip(y, low, high)))
        ax.annotate(name, at, (1.03, height), color=colour, fontsize=fontsize, va="center", arrowprops=arrow, **anchor)


def save(fig: Figure, path: Path) -> None:
    """Write the PNG without dates in its metadata, so that the same data give the same bytes."""
    with atomic_write(path) as file:
        fig.savefig(file, format="png", metadata={"Software": None})
    plt.close(fig)
