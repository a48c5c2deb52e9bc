"""The comparison table as text, Markdown and CSV. Gaps in the printed tables are in 1e-3 nats, which people read."""

import csv
import io
import math
from collections.abc import Iterable, Sequence

from analysis import pages
from analysis.compare import Row
from analysis.pairing import Gap

NOTE = (
    "Gap: validation loss minus the baseline's, same validation tokens, over the seeds that both have (the final loss "
    "is of all; so is the gap of recipes that share fewer than two and have two each), 1e-3 nats/token. Interval: "
    "95 %, over training seeds. Text SE: standard error of the same gap over validation documents (jackknife), for "
    "these trained models only. Intervals are not corrected for the number of recipes compared."
)
GLOSSARY = {
    "seeds": "Runs that differ in the seed alone; a verdict needs at least two of each recipe.",
    "tokens": "Training tokens at which the recipes are compared.",
    "final": "Validation loss there, nats a token, mean over the seeds.",
    "bits/byte": "The same a byte of text, which doesn't depend on the tokenizer.",
    "sd e-3": "Standard deviation of the final loss over seeds, 1e-3 nats.",
    "best": "The lowest validation loss on the way, mean over the seeds.",
    "gap e-3": "Final loss minus the baseline's on the same validation tokens, over the seeds that both have, 1e-3 "
    "nats. Recipes that share fewer than two seeds and have two each: difference of the means.",
    "gap %": "The gap as a share of the baseline's loss.",
    "95 % interval e-3": "Where the gap would lie if both recipes were trained again with other seeds; for this pair "
    "alone, not corrected for the number of recipes.",
    "text SE e-3": "Standard error of the gap over validation documents (jackknife): how far these trained models' gap "
    "would move on other text. It says nothing about other seeds, and gives no verdict.",
    "corr": "Correlation of the two recipes' losses over shared seeds, from six seeds on.",
    "tok/s": "Training tokens a second of runs that had their GPU alone. Emulated 4-bit runs say nothing about native "
    "speed.",
    "ratio": "That speed over the baseline's.",
    "verdict": '"resolved": the interval leaves out 0. "not resolved": a difference of this size is seen between equal '
    'recipes. "one seed": nothing can be said.',
}
APPROXIMATE = "~: bits per byte are approximate, since the tokenizer doesn't give the validation text back unchanged."
HEADER = ("recipe", *GLOSSARY)
CSV_HEADER = ("recipe", "seeds", "runs", "status", "step", "tokens", "final_loss", "final_bpb", "final_sd")
CSV_HEADER += ("best_loss", "gap", "gap_percent", "gap_low", "gap_high", "method", "text_se", "correlation")
CSV_HEADER += ("tokens_per_second", "ratio", "verdict")


def methods(rows: list[Row]) -> str:
    """How the intervals were made, each way once, and on how much text."""
    found = dict.fromkeys(row.gap.method for row in rows if row.gap)
    texts = dict.fromkeys(_documents(row.text) for row in rows if row.text)
    note = f"Intervals by: {'; '.join(found)}. {' '.join(texts)}" if found else "One recipe: no gap to judge."
    return f"{note} {APPROXIMATE}" if any(row.bpb_is_approximate for row in rows) else note


def _text_se(row: Row) -> float:
    return row.text.se if row.text else math.nan


def _documents(text: Gap) -> str:
    return f"Validation documents: {text.documents:,}, which weigh as {text.effective:,.1f} equally long ones."


def cells(row: Row) -> tuple[str, ...]:
    """One row as strings in the order of HEADER."""
    gap = row.gap
    low, high = gap.interval if gap else (math.nan, math.nan)
    verdict = "baseline" if gap is None else gap.verdict
    if row.status != "finished":
        verdict += f" [{row.status}]"
    return (
        row.label,
        f"{row.seeds}" if row.runs == row.seeds else f"{row.seeds} ({row.runs} runs)",
        tokens(row.tokens),
        _number(row.final, "{:.4f}"),
        _number(row.bpb, "~{:.4f}" if row.bpb_is_approximate else "{:.4f}"),
        _number(row.sd * 1e3, "{:.2f}"),
        _number(row.best, "{:.4f}"),
        signed(gap.mean * 1e3 if gap else math.nan),
        signed(row.percent),
        "-" if math.isnan(low) else f"{signed(low * 1e3)} .. {signed(high * 1e3)}",
        _number(_text_se(row) * 1e3, "{:.2f}"),
        signed(gap.correlation if gap else math.nan),
        _number(row.tokens_per_second, "{:,.0f}"),
        _number(row.ratio, "{:.2f}"),
        verdict,
    )


def text(rows: list[Row]) -> str:
    """Aligned columns for a terminal."""
    return aligned([HEADER, *(cells(r) for r in rows)])


def aligned(lines: list[Sequence[str]]) -> str:
    """The first and the last column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in (0, last) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def markdown(rows: list[Row]) -> str:
    return pages.table(HEADER, map(cells, rows))


def to_csv(rows: list[Row]) -> str:
    """Full precision, losses and gaps in nats/token, empty where there is no value."""
    lines = []
    for row in rows:
        gap = row.gap
        low, high = gap.interval if gap else (math.nan, math.nan)
        values = [row.label, row.seeds, row.runs, row.status, row.step, row.tokens]
        values += [row.final, row.bpb, row.sd, row.best]
        values += [gap.mean if gap else math.nan, row.percent, low, high, gap.method if gap else "", _text_se(row)]
        values += [gap.correlation if gap else math.nan, row.tokens_per_second, row.ratio, gap.verdict if gap else ""]
        lines.append(values)
    if any(row.bpb_is_approximate for row in rows):  # a column more only where it says something
        header = (*CSV_HEADER, "final_bpb_approximate")
        return csv_text(header, [[*line, row.bpb_is_approximate] for line, row in zip(lines, rows, strict=True)])
    return csv_text(CSV_HEADER, lines)


def csv_text(header: Iterable[str], rows: Iterable[list]) -> str:
    """CSV, NaN as an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if isinstance(v, float) and math.isnan(v) else v for v in row] for row in rows)
    return out.getvalue()


def tokens(count: float) -> str:
    """1234567 -> 1.23M; exact to three digits."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def signed(value: float, digits: int = 2) -> str:
    """+1.00, -1.00, and 0.00 for what rounds to nothing: the sign of a rounding error says nothing."""
    text = _number(value, f"{{:+.{digits}f}}")
    return text if text == "-" or float(text) else text[1:]


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)
