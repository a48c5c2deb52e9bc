"""What a comparison says, in sentences: before any table."""

import math

from analysis.compare import Row
from analysis.pairing import DIVERGED, NOT_RESOLVED, RESOLVED
from analysis.pairs import Pair


def sentences(rows: list[Row], found: list[Pair]) -> list[str]:
    """`rows`: of the table, baseline first. `found`: all pairs of recipes."""
    base, others = rows[0].label, [row for row in rows if row.gap is not None]
    if not others:
        return [f"One recipe, {base}: there is nothing to compare it with."]
    said = []
    resolved = _having(others, RESOLVED)
    for side, sign in (("above", 1), ("below", -1)):
        if rows := [row for row in resolved if sign * row.gap.mean > 0]:
            said.append(f"Ended {side} {base}, in 1e-3 nats with 95 % intervals: {_gaps(rows)}.")
    if noisy := _having(others, NOT_RESOLVED):
        said.append(f"Inside the noise, so no difference from {base} is shown: {_gaps(noisy)}.")
    if alone := [row for row in others if math.isnan(row.gap.half_width) and row.gap.verdict != DIVERGED]:
        them = "its" if len(alone) == 1 else "their"
        said.append(
            f"No verdict on {_gaps(alone)}: one seed. Two seeds of one recipe may end further apart than that; "
            f"train {them} further seeds, and {base}'s."
        )
    if diverged := _having(others, DIVERGED):
        said.append(f"Diverged, so no gap is given: {_names(diverged)}.")
    if lucky := [row for row in others if row.gap.mean < 0 and row.gap.verdict != RESOLVED]:
        said.append(f"That {_names(lucky)} ended below {base} is chance until more seeds say otherwise.")
    between = [pair for pair in found if base not in (pair.recipe, pair.other)]
    if among := [pair for pair in between if pair.resolved_among_all]:
        said.append(f"Among the others, all pairs at once: {', '.join(map(_pair, among))}.")
    return said


def _having(rows: list[Row], verdict: str) -> list[Row]:
    return [row for row in rows if row.gap.verdict == verdict]


def _names(rows: list[Row]) -> str:
    *first, last = [row.label for row in rows]
    return f"{', '.join(first)} and {last}" if first else last


def _gaps(rows: list[Row]) -> str:
    def text(row: Row) -> str:
        half = "" if math.isnan(row.gap.half_width) else f" ± {1e3 * row.gap.half_width:.1f}"
        return f"{row.label} {1e3 * row.gap.mean:+.1f}{half}"

    return ", ".join(map(text, rows))


def _pair(pair: Pair) -> str:
    worse, better = (pair.recipe, pair.other) if pair.gap.mean > 0 else (pair.other, pair.recipe)
    return f"{better} {1e3 * abs(pair.gap.mean):.1f} below {worse}"
