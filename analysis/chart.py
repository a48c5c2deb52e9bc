"""The curves of a report as numbers, which analysis/chart.js draws: it zooms and hides lines without a server."""

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis import plots
from analysis.compare import Group, Row

SCRIPT = Path(__file__).with_suffix(".js")
MOST = 300  # points of a thin line: more are not seen
DASHES = {"-": "", "--": "7 4", "-.": "9 3 2 3", ":": "2 3"}
ZOOMS = {"whole run": 0.0, "last half": 0.5, "last fifth": 0.8}
HINT = "A name hides its line, a drag across the plot zooms, a double click shows all again; touch to read off."


def panels(
    groups: list[Group], base: Group, rows: Iterable[Row], theirs: dict[str, float], figure: Figure
) -> list[dict[str, Any]]:
    """Losses, and with a second group gaps: what plots.figure draws, which has the limits that were chosen."""
    colours = colours_of(groups, base)
    style = plots.styles(groups, base)
    unlike = plots.unlike_text(groups, base)
    losses, gaps = [], []

    def line(group: Group, kind: str, x: np.ndarray, y: np.ndarray, se: np.ndarray | None = None) -> dict[str, Any]:
        finite = np.isfinite(y)
        x, y, every = x[finite], y[finite], max(1, len(x) // MOST)
        found = {"name": group.label, "kind": kind, "colour": colours[group.label]}
        found |= {"dash": DASHES[style[group.label][1]] if kind == "thick" else ""}
        found |= {"x": _rounded(x[::every]), "y": _rounded(y[::every])}
        has_band = se is not None and len(se) and np.isfinite(se).all()
        return found | ({"se": _rounded(se[finite][::every])} if has_band else {})

    for group in groups:
        per_step = group.runs[0].info["tokens_per_step"]
        losses += [line(group, "thin", *plots.smoothed(run)) for run in group.runs]
        if group.label not in unlike:
            steps, mean, _ = plots.group_curve(group)
            losses.append(line(group, "thick", steps * per_step, mean))
        if group is not base:
            steps, mean, se = plots.gap_curve(group, base)
            gaps.append(line(group, "thick", steps * base.runs[0].info["tokens_per_step"], 1e3 * mean, 1e3 * se))
    judged = [row for row in rows if row.gap and np.isfinite(row.gap.half_width)]
    bars = [_bar(row, colours[row.label], i) for i, row in enumerate(judged, 1)]
    end = base.runs[0].info["tokens"]
    marks = [{"name": n, "x": end, "y": 1e3 * y, "colour": colours[n]} for n, y in theirs.items() if n != base.label]
    limits = [list(ax.get_ylim()) for ax in figure.axes]
    found = [{"title": "loss", "lines": losses, "bars": [], "marks": [], "digits": 4, "y": limits[0]}]
    if gaps:
        found.append({"title": "gap", "lines": gaps, "bars": bars, "marks": marks, "digits": 1, "y": limits[1]})
    return found


def colours_of(groups: list[Group], base: Group) -> dict[str, int | str]:
    """{label: the number of its colour's class, b of the baseline's}."""
    others = [group.label for group in groups if group is not base]
    return {base.label: "b"} | {label: i % len(plots.COLOURS) for i, label in enumerate(others)}


def element(identity: str, content: Any) -> str:
    """Data for a script. No name in it can end the element."""
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{identity}">{data}</script>'


def _bar(row: Row, colour: int | str, place: int) -> dict[str, Any]:
    """The interval, side by side with others behind the curves' end."""
    low, high = row.gap.interval
    x = (1 + 0.012 * place) * row.tokens
    return {"name": row.label, "x": x, "low": 1e3 * low, "high": 1e3 * high, "colour": colour}


def _rounded(values: np.ndarray) -> list[float]:
    """Six digits: more are not seen."""
    return [float(f"{value:.6g}") for value in values]


def body(found: list[dict[str, Any]], groups: list[Group], base: Group) -> list[str]:
    """Buttons, figures, numbers and the script."""
    gaps = found[-1]
    parts = ["band one standard error over seeds"] * any("se" in line for line in gaps["lines"])
    parts += ["bars 95 % intervals"] * bool(gaps["bars"]) + ["diamonds published"] * bool(gaps["marks"])
    titles = [
        "Loss, nats/token: validation thick (mean over seeds), training thin",
        f"Gap to {base.label}, 1e-3 nats/token: {', '.join(parts) or 'one seed, no error bar'}",
    ]
    style = plots.styles(groups, base)
    names = []
    for group in groups:
        colour = next(line["colour"] for line in found[0]["lines"] if line["name"] == group.label)
        dash = DASHES[style[group.label][1]]
        line = f'<line x2="26" y1="5" y2="5" class="thick s{colour}" stroke-dasharray="{dash}"/>'
        key = f'<svg width="26" height="10">{line}</svg>'
        label = escape(group.label)
        names.append(f'<button data-name="{label}" aria-pressed="true">{key} {escape(group.caption)}</button>')
    zooms = "".join(f'<button data-from="{share}">{text}</button>' for text, share in ZOOMS.items())
    figures = [
        f'<figure class="chart" id="chart{i}"><figcaption>{escape(title)}</figcaption><div class="plot"></div>'
        f'<div class="row">{zooms}<span class="said"></span></div></figure>'
        for i, (title, _) in enumerate(zip(titles, found, strict=False))
    ]
    return [
        f'<div class="row keys">{"".join(names)}</div>',
        f'<div class="charts">{"".join(figures)}</div>',
        f'<p class="note needs-script">{HINT}</p>',
        element("curves", found),
        f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>",
    ]
