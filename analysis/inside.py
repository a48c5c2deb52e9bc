"""What was seen inside the layers of runs, for the report: heat maps of layer x step and small multiples of curves.

A page for each run that has rows of LOOKS (analysis/runs.py) or xray/<step>.json, and one that compares them. The
numbers are a JSON element; analysis/inside.js draws what is chosen of them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from analysis import chart, html, plots
from analysis.compare import Group
from analysis.runs import Run
from base.runfolder import OSCILLATION, XRAY, XRAYS, read_json

SCRIPT = Path(__file__).with_suffix(".js")
SCOPES = {"propagated": "whole pass", "local": "alone"}
# A reader: a layer's figures of a row -> {place: (value, its standard error or None, whether it is marked)}.
Seen = tuple[float | None, float | None, bool]
Reader = Callable[[Mapping[str, Any]], dict[str, Seen]]


@dataclass(frozen=True)
class Quantity:
    """`kind`: of the rows that have it. shown: value times `factor`. signed: both signs mean something. mark: what a
    marked cell says."""

    kind: str
    title: str
    meaning: str
    read: Reader
    factor: float = 1.0
    signed: bool = False
    mark: str = ""


def of_gemms(part: str, figure: str, less: float = 0.0) -> Reader:
    """A figure of the X-ray's products, under "wgrad, whole pass" and so on. less: what is taken off."""

    def read(layer: Mapping[str, Any]) -> dict[str, Seen]:
        found = {}
        gemms = [name for name, figures in layer.items() if "local" in figures]
        for scope, words in SCOPES.items():
            for gemm in reversed(gemms):
                figures = layer[gemm][scope].get(part, {})
                if (value := figures.get(figure)) is None:
                    continue
                error = figures.get("bias_se") if figure == "bias" else None
                is_seen = error is not None and value > max(3 * error, figures["visible"] or 0.0)
                found[f"{gemm}, {words}"] = (value - less, error, is_seen)
        return found

    return read


def of_noise(figure: str) -> Reader:
    def read(layer: Mapping[str, Any]) -> dict[str, Seen]:
        value = layer["noise"].get(figure) or None  # old rows have 0 where it can't be told
        return {"wgrad, at the run's batch": (value, None, figure == "rho" and value is not None and value < 1)}

    return read


def of_slots(figure: str) -> Reader:
    return lambda layer: {slot: (found.get(figure), None, False) for slot, found in layer["slots"].items()}


def of_operands(figure: str) -> Reader:
    """Of rows of kind errors, whose layers are {slot: terms}."""
    return lambda layer: {slot: (found.get(figure), None, False) for slot, found in layer.items()}


def share(counter: str, of: str) -> Reader:
    """Of rows of kind slots, whose layers are {slot: counts}."""

    def read(layer: Mapping[str, Any]) -> dict[str, Seen]:
        there = {slot: found for slot, found in layer.items() if found.get(of)}
        return {slot: (found[counter] / found[of], None, False) for slot, found in there.items()}

    return read


def of_weights(figure: str) -> Reader:
    return lambda layer: {"fprop.w": (layer[figure], None, False)}


TERMS = {
    "mse": "operand's squared error",
    "scale": "term: scales",
    "dead": "term: dead zone",
    "grid": "term: grid",
    "scale_grid": "term: 2<scale,grid>",
    "scale_dead": "term: 2<scale,dead>",
    "random": "term: random bits",
    "random_cross": "term: 2<random,error>",
    "align": "alignment",
}
SIGNED = ("scale_grid", "scale_dead", "random_cross", "align")
# Kinds of rows, as the report calls them.
KINDS = {
    "xray": "X-ray",
    "oscillation": "Oscillation",
    "slots": "Evaluation's counters",
    "errors": "Evaluation's operands",
}
QUANTITIES = (
    Quantity("xray", "forward's part, squared error, 1e-3", XRAY["gemm"]["error"], of_gemms("forward", "error"), 1e3),
    Quantity("xray", "backward's part, squared error, 1e-3", XRAY["gemm"]["error"], of_gemms("backward", "error"), 1e3),
    Quantity("xray", "backward's part, squared bias, 1e-6", XRAY["gemm"]["bias"], of_gemms("backward", "bias"), 1e6,
             True, "beyond three standard errors, and visible with so many draws"),
    Quantity("xray", "forward's part, squared bias, 1e-6", XRAY["gemm"]["bias"], of_gemms("forward", "bias"), 1e6,
             True, "beyond three standard errors, and visible with so many draws"),
    Quantity("xray", "forward's part, projection - 1, 1e-3", XRAY["gemm"]["projection"],
             of_gemms("forward", "projection", 1.0), 1e3, True),
    Quantity("xray", "backward's part, projection - 1, 1e-3", XRAY["gemm"]["projection"],
             of_gemms("backward", "projection", 1.0), 1e3, True),
    Quantity("xray", "rho: gradient over rounding noise", XRAY["noise"]["rho"], of_noise("rho"), mark="below 1"),
    Quantity("xray", "gradient over noise of text", XRAY["noise"]["snr_sampling"], of_noise("snr_sampling")),
    *(Quantity("xray", f"{title}, 1e-3", XRAY["slots"][name], of_slots(name), 1e3, name in SIGNED)
      for name, title in TERMS.items()),
    Quantity("xray", "clipped, %", XRAY["slots"]["clipped"], of_slots("clipped"), 1e2),
    Quantity("xray", "underflowed to zero, %", XRAY["slots"]["underflowed"], of_slots("underflowed"), 1e2),
    Quantity("xray", "kurtosis", XRAY["slots"]["kurtosis"], of_slots("kurtosis")),
    Quantity("xray", "energy in the top 1 % of channels, %", XRAY["slots"]["top_channels"], of_slots("top_channels"),
             1e2),
    Quantity("oscillation", "codes that flip in a step, %", OSCILLATION["flips_per_step"],
             of_weights("flips_per_step"), 1e2),
    Quantity("oscillation", "codes changed since the look before, %", OSCILLATION["flipped"], of_weights("flipped"),
             1e2),
    Quantity("oscillation", "weights near a border of codes, %", OSCILLATION["near"], of_weights("near"), 1e2),
    Quantity("slots", "clipped, %", "share of elements beyond the grid", share("clipped", "elements"), 1e2),
    Quantity("slots", "underflowed to zero, %", "share of elements that became 0 and weren't",
             share("zeroed", "elements"), 1e2),
    Quantity("slots", "blocks without a scale, %", "share of blocks that hold a non-zero element and whose scale "
             "rounded to zero", share("underflow_blocks", "blocks"), 1e2),
    *(Quantity("errors", f"{title}, 1e-3", XRAY["slots"][name], of_operands(name), 1e3, name in SIGNED)
      for name, title in TERMS.items()),
)  # fmt: skip


def section(groups: list[Group], base: Group) -> list[str]:
    """Nothing where no run has looked inside."""
    colours, styles = chart.colours_of(groups, base), plots.styles(groups, base)
    runs = []
    for group in groups:
        look = {"colour": colours[group.label], "dash": chart.DASHES[styles[group.label][1]]}
        runs += [{"name": run.name, **look, **seen} for run in group.members if (seen := views(run))]
    if not runs:
        return []
    there = {int(number) for run in runs for number in run["views"]}
    shown = ("title", "meaning", "signed", "mark")
    quantities = {
        number: {"kind": KINDS[quantity.kind]} | {name: getattr(quantity, name) for name in shown}
        for number, quantity in enumerate(QUANTITIES)
        if number in there
    }
    return [
        html.heading("Inside the layers"),
        *body([run["name"] for run in runs]),
        chart.element("inside-data", {"quantities": quantities, "runs": runs}),
        f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>",
    ]


def body(names: list[str]) -> list[str]:
    pages = ["", *names] if len(names) > 1 else names
    buttons = "".join(
        f'<button data-page="{escape(name)}" aria-pressed="false">{escape(name) or "Comparison"}</button>'
        for name in pages
    )
    return [
        '<section id="inside">',
        f'<div class="row pages">{buttons}</div>',
        '<div class="row choices"><label>Quantity <select data-choice="quantity"></select></label>'
        '<label>GEMM or operand <select data-choice="place"></select></label>'
        '<label class="against">Shown <select data-choice="against"></select></label></div>',
        '<p class="note meaning"></p><figure class="legend"></figure><div class="maps"></div>'
        '<p class="said" aria-live="polite">Touch a cell, or move to a map by Tab and through it by the arrow keys.</p>'
        '<div class="row keys lines"></div><div class="multiples"></div>',
        "<noscript>Heat maps and curves are drawn by a script, which is off.</noscript></section>",
    ]


def views(run: Run) -> dict[str, Any]:
    """{layers, views: {quantity's number: {place: {steps, values [layer][step], errors, marks}}}}; {} without any. A
    value that isn't there is null."""
    rows = {kind: list(rows_of(run, kind)) for kind in KINDS}
    layers = list(dict.fromkeys(layer for looks in rows.values() for _, row in looks for layer in row))
    found = {
        str(number): places
        for number, quantity in enumerate(QUANTITIES)
        if (places := placed(rows[quantity.kind], quantity, layers))
    }
    return {"layers": layers, "views": found} if found else {}


def rows_of(run: Run, kind: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(step, {layer: figures}) of a kind, by steps."""
    rows = {row["step"]: row for row in run.looks_of(kind)}
    if kind == "xray":  # by scripts/xray.py, from checkpoints
        for path in sorted((run.path / XRAYS).glob("*.json")):
            row = read_json(path)
            if run.as_of is None or row["step"] <= run.as_of:
                rows.setdefault(row["step"], row)
    for step, row in sorted(rows.items()):
        yield step, row[kind] if kind in row else row["layers"]


def placed(rows: list[tuple[int, Mapping[str, Any]]], quantity: Quantity, names: list[str]) -> dict[str, Any]:
    """{place: its matrix} of all steps at which some layer has a value there."""
    read = [(step, {name: quantity.read(layer) for name, layer in layers.items()}) for step, layers in rows]
    out = {}
    for place in dict.fromkeys(place for _, layers in read for found in layers.values() for place in found):
        at = [(step, layers) for step, layers in read if any(has(found, place) for found in layers.values())]
        if not at:
            continue
        cells = [[layers.get(name, {}).get(place, (None, None, False)) for _, layers in at] for name in names]
        out[place] = {
            "steps": [step for step, _ in at],
            "values": [[scaled(value, quantity.factor) for value, _, _ in row] for row in cells],
        }
        if any(error is not None for row in cells for _, error, _ in row):
            out[place]["errors"] = [[scaled(error, quantity.factor) for _, error, _ in row] for row in cells]
        if quantity.mark:
            out[place]["marks"] = [[int(marked) for _, _, marked in row] for row in cells]
    return out


def has(found: dict[str, Seen], place: str) -> bool:
    return place in found and found[place][0] is not None


def scaled(value: float | None, factor: float) -> float | None:
    """Four digits: more are not seen."""
    return None if value is None or not isfinite(value) else float(f"{value * factor:.4g}")
