"""Which layers cost loss now, for the report: bars of what scripts/xray.py --lift found (base/runfolder.py, LIFT)."""

from collections.abc import Callable
from html import escape
from typing import Any

from analysis import html
from analysis.compare import Group
from analysis.runs import Run, json_object
from base.runfolder import LIFTS

WIDE, HIGH, EDGE = 220, 16, 4  # pixels of a bar's picture, and what it keeps free at either side
HEADER = ("layer", "lifted to BF16 gains", "", "alone in 4 bits costs", "", "predicted")
HEADER += ("lifted to FP8", "X lifted", "W lifted")
NOTE = (
    "The loss of the same weights on the same text, 1e-3 nats/token, with standard errors over documents (thin lines): "
    "one layer in BF16 while the rest stays as trained, and it alone in 4 bits. A diamond and predicted: half of the "
    "mean of (g.dY)^2, the second term of a Taylor series of it alone, with Fisher's matrix. What a layer's backward "
    "costs is in none of these."
)


def section(groups: list[Group]) -> list[str]:
    """A table of bars for each run that was looked at, at its newest step; nothing without one."""
    found = [(run, newest) for group in groups for run in group.members if (newest := newest_of(run))]
    if not found:
        return []
    parts = [html.heading("Which layers cost loss"), html.note(NOTE)]
    for number, (run, lifted) in enumerate(found):
        gap, error = 1e3 * lifted["gap"], lifted["gap_se"]
        beside = "" if error is None else f" ± {1e3 * error:.2f}"
        parts.append(html.note(f"{run.name} at step {lifted['step']:,}: own forward over BF16 {gap:+.2f}{beside}, "
                               f"{lifted['targets']:,} tokens"))  # fmt: skip
        parts.append(table(f"lifting{number}", lifted["layers"]))
    return parts


def newest_of(run: Run) -> dict[str, Any] | None:
    """The look at its last step that had one."""
    steps = [int(path.stem) for path in (run.path / LIFTS).glob("*.json")]
    steps = [step for step in steps if run.as_of is None or step <= run.as_of]
    return json_object(run.path / LIFTS / f"{max(steps)}.json") if steps else None


def table(identity: str, layers: dict[str, Any]) -> str:
    """Layers in the order of what they cost alone: that is told best."""
    order = sorted(layers, key=lambda name: -layers[name]["alone"]["layer"]["change"])
    ends = [end for layer in layers.values() for way, sign in (("lifted", -1), ("alone", 1))
            for end in ends_of(layer[way]["layer"], sign)]  # fmt: skip
    ends += [1e3 * layer["alone"]["layer"]["second"] for layer in layers.values()]
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = (high - low) or 1.0

    def place(value: float) -> float:
        return EDGE + (value - low) / room * (WIDE - 2 * EDGE)

    rows = []
    for name in order:
        lifted, alone = layers[name]["lifted"], layers[name]["alone"]["layer"]
        cells = [f"<td>{escape(name)}</td>", f"<td>{bar(lifted['layer'], -1, 0, place)}</td>"]
        cells.append(f"<td>{written(lifted['layer'], -1)}</td><td>{bar(alone, 1, 1, place, alone['second'])}</td>")
        predicted = f"{1e3 * alone['second']:.2f}"
        texts = [written(alone, 1), predicted, *(written(lifted.get(slot, {}), -1) for slot in ("fp8", "x", "w"))]
        rows.append("<tr>" + "".join([*cells, *(f"<td>{text}</td>" for text in texts)]) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in HEADER)
    inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table id="{identity}" class="lifting">{inner}</table></div>'


def ends_of(change: dict[str, float | None], sign: int) -> tuple[float, float]:
    """One standard error to either side, 1e-3 nats."""
    middle, error = 1e3 * sign * change["change"], 1e3 * (change["change_se"] or 0.0)
    return middle - error, middle + error


def bar(
    change: dict[str, Any], sign: int, colour: int, place: Callable[[float], float], predicted: float | None = None
) -> str:
    """From 0, with its error as a thin line and what was predicted as a diamond."""
    low, high = ends_of(change, sign)
    zero, end = place(0.0), place((low + high) / 2)
    parts = [f'<rect x="{min(zero, end):.1f}" y="3" width="{abs(end - zero):.1f}" height="10" class="fill{colour}"/>']
    parts.append(f'<line x1="{place(low):.1f}" x2="{place(high):.1f}" y1="8" y2="8" class="error"/>')
    parts.append(f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{HIGH}" class="zero"/>')
    if predicted is not None:
        at = min(max(place(1e3 * predicted), EDGE), WIDE - EDGE)
        parts.append(f'<path d="M{at - 4:.1f},8l4,-5l4,5l-4,5z" class="diamond"/>')
    return f'<svg width="{WIDE}" height="{HIGH}" aria-hidden="true">{"".join(parts)}</svg>'


def written(change: dict[str, float | None], sign: int) -> str:
    if not change:
        return "-"
    error = "" if change["change_se"] is None else f" ± {1e3 * change['change_se']:.2f}"
    return f"{1e3 * sign * change['change']:+.2f}{error}"
