"""What runs must share so that their losses mean the same thing: the one home of that rule.

Losses are comparable on like text alone: the same data, tokenizer, vocabulary and sequence length, and, which no hash
holds, the same validation tokens scored. A table asks for more (COMPARABLE); a law is over sizes and lengths.
"""

import math
from collections.abc import Iterable
from pathlib import Path

from analysis.pairing import align
from analysis.runs import EvalRows, Run
from base.runfolder import RunError
from base.words import some

# (field of run.json, what to call it)
TEXT = (
    ("data_fingerprint", "data"),
    ("tokenizer_hash", "tokenizer"),
    ("vocab_size", "vocabulary"),
    ("seq_len", "sequence length"),
)
COMPARABLE = (
    *TEXT,
    ("tokens_per_step", "batch (tokens per step)"),
    ("model", "model"),
    ("parameters", "parameter count"),
    ("steps", "steps"),
)
SHOWN = 3  # runs named in an error
OTHER_STEP = "compare.py --step N takes the evaluations of another step"


def differences(runs: Iterable[Run], fields: Iterable[tuple[str, str]] = COMPARABLE) -> list[str]:
    """Human-readable list of what the runs do not share but would have to; empty when they can be compared."""
    found, runs = [], list(runs)
    for field, name in fields:
        values: dict[str, list[str]] = {}
        for run in runs:
            values.setdefault(str(run.info[field]), []).append(run.name)
        if len(values) > 1:
            each = "; ".join(f"{value} in {some(names, SHOWN)}" for value, names in values.items())
            found.append(f"{name} differs: {each}")
    return found


def require_like_text(runs: Iterable[Run], what: str) -> None:
    """ValueError, naming runs, unless all were trained on one text and the finished ones scored on one at their end.

    `what` they would enter together, such as "a law". A run that diverged has no final loss to enter with.
    """
    runs = list(runs)
    if mixed := differences(runs, TEXT):
        raise ValueError(f"{what} needs runs of like text: {'; '.join(mixed)}. Leave some out")
    ended = [run for run in runs if run.finished and run.diverged_at is None and len(run.evals["step"])]
    same_rows(
        ((run, int(run.evals["step"][-1])) for run in ended),
        f"; {what} needs runs scored on like text: leave one of them out",
    )


def same_rows(evaluations: Iterable[tuple[Run, int]], remedy: str = OTHER_STEP) -> dict[Path, EvalRows]:
    """{run folder: its rows at its step}. RunError unless all are of the same validation tokens and give the logged
    loss.

    How much text an evaluation takes is in no hash: only the rows tell that losses of two seeds mean the same thing.
    """
    rows: dict[Path, EvalRows] = {}
    for run, step in evaluations:
        rows[run.path] = run.rows_at(step)
        first = next(iter(rows))
        try:
            align(rows[first], rows[run.path])
        except ValueError as error:
            raise RunError(f"{first} and {run.path}, step {step}: {error}; {remedy}") from None
        _check_sum(run, step, rows[run.path])
    return rows


def _check_sum(run: Run, step: int, rows: EvalRows) -> None:
    logged, summed = run.loss_at(step), rows.nats.sum() / rows.tokens.sum()
    if math.isfinite(logged) and not abs(logged - summed) <= 1e-6 * max(1.0, abs(logged)):  # NaN rows are stale, too
        raise RunError(
            f"{run.path}: metrics.jsonl says {logged:.8f}, eval rows give {summed:.8f}; one of them is stale"
        )
