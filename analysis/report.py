"""The comparison as one HTML file that needs no server, no network and no account."""

import json
import math
from html import escape

import matplotlib.pyplot as plt

from analysis import chart, forks, html, inside, lifting, plots, slot_errors, tables, verdict
from analysis import served as served_losses
from analysis.compare import Group, Row
from analysis.equal_loss import EqualLoss, equal_loss
from analysis.pairing import RESOLVED
from analysis.pairs import Pair
from analysis.published import ALIASES, Points, at
from analysis.runs import Run
from base.runfolder import ENV
from base.tree import flatten

MANY = 40  # differing keys shown in full
FEW = 3  # runs named for one of a key's values, beside whole recipes
UNUSED = object()  # the value of a setting that has no effect


def build(
    groups: list[Group],
    base: Group,
    rows: list[Row],
    notes: list[str],
    found: list[Pair],
    published: dict[str, Points],
) -> str:
    """The document; `groups` in the order of `rows`. `found`: their pairs. `published` may be empty."""
    info = base.runs[0].info
    runs = [run for group in groups for run in group.members]
    title = f"{info['model']}: {', '.join(g.label for g in groups)}"
    what = (
        f"{len(runs)} run{'s' * (len(runs) > 1)} of {info['model']} ({info['parameters_non_embedding']:,} "
        f"non-embedding parameters), {info['steps']:,} steps of {info['tokens_per_step']:,} tokens; "
        f"baseline {base.label}."
    )
    theirs = published_gaps([row.label for row in rows], base.label, info, published)
    figure = plots.figure(groups, base, rows, theirs)
    body = [
        f"<h1>{escape(title)}</h1>",
        *(html.note(text, "verdict") for text in verdict.sentences(rows, found)),
        html.note(what),
        *(html.note(f"Mixed: {text}", "warn") for text in notes),
        html.heading("Loss and gap"),
        *chart.body(chart.panels(groups, base, rows, theirs, figure), groups, base),
        f"<noscript>{html.picture(figure, 'loss and gap curves')}</noscript>",
        html.table(tables.HEADER, [_classed(row) for row in rows], "comparison"),
        html.glossary(tables.GLOSSARY),
        html.note(tables.methods(rows)),
        *pairwise(groups, found),
        *served(groups, base),
        *tree(groups),
        *equal_losses(groups, base),
        *overlay(rows, theirs),
        *inside.section(groups, base),
        *lifting.section(groups),
        *slot_errors.section(groups),
        *run_list(runs),
        *differing("Configuration", [(run, configuration(run)) for run in runs], groups, "configuration"),
        *differing("Environment", [(run, flatten(run.read_json(ENV))) for run in runs], groups, "environment"),
    ]
    plt.close(figure)
    return html.page(title, body)


def _classed(row: Row) -> list:
    cells = list(tables.cells(row))
    kind = "none" if row.gap is None else "yes" if row.gap.verdict == RESOLVED else "no"
    return [*cells[:-1], (cells[-1], kind)]


def pairwise(groups: list[Group], found: list[Pair]) -> list[str]:
    """Which differences between recipes are resolved: the gap of the row to the column, 1e-3 nats."""
    if len(groups) < 3:
        return []
    cells = {}
    for pair in found:
        cells[pair.recipe, pair.other] = _pair_cell(pair, 1)
        cells[pair.other, pair.recipe] = _pair_cell(pair, -1)
    labels = [group.label for group in groups]
    rows = [[one, *(cells.get((one, other), ("", "none")) for other in labels)] for one in labels]
    note = (
        "Row minus column, 1e-3 nats/token, ± half the 95 % interval over seeds of this pair alone / of all pairs at "
        "once (Tukey). ✓ and blue: resolved among all pairs; (✓) and orange: only if no other pair was in question. "
        "Empty: no step or text in common. A step in brackets: not at the end, but where both were last evaluated."
    )
    table = html.table(["", *labels], rows, "pairwise")
    return [html.heading("Which differences are resolved"), table, html.note(note)]


def served(groups: list[Group], base: Group) -> list[str]:
    found = served_losses.served(groups, base)
    if not found:
        return []
    table = html.table(served_losses.header(found), served_losses.cells(found), "served")
    return [html.heading("The same weights under other forwards"), table, html.note(served_losses.NOTE)]


def tree(groups: list[Group]) -> list[str]:
    """Which runs are forks of which."""
    roots = forks.trees(groups)
    if not roots:
        return []
    figure = forks.figure(roots)
    drawn = html.picture(figure, forks.text(roots))
    plt.close(figure)
    note = (
        "Final losses, means over trunks, minus the parent's where both ended at one step. Tails of one trunk are one."
    )
    return [html.heading("Forks"), drawn, html.note(note)]


def _pair_cell(pair: Pair, sign: int) -> tuple[str, str]:
    mean = tables.signed(sign * pair.gap.mean * 1e3, 1)
    where = "" if pair.at_end else f" (step {pair.step})"
    if math.isnan(pair.gap.half_width):
        return (f"{mean}{where}", "none")
    kind = "yes" if pair.resolved_among_all else "some" if pair.resolved else "no"
    tick = {"yes": " ✓", "some": " (✓)", "no": ""}[kind]
    return (f"{mean} ± {pair.gap.half_width * 1e3:.1f} / {pair.all_pairs * 1e3:.1f}{where}{tick}", kind)


def equal_losses(groups: list[Group], base: Group) -> list[str]:
    found = [e for g in groups if g is not base and (e := equal_loss(g, base)) is not None]
    if not found:
        return []
    name = base.label
    header = ["recipe", "reaches", "after tokens", f"{name} after", "share", "time", f"{name} time", "share"]
    note = (
        f"When {name} first comes down to the loss at which each recipe's curve ends; no line where its first "
        "evaluation is below that. Its learning rate has not decayed by then, so a run planned for that length may "
        "need fewer still. Shares are as uncertain as the gap is, divided by the slope of the curve there. Times are "
        "of these machines: emulated 4-bit runs say nothing about native speed. Runs that shared their GPU, or may "
        "have, give no time."
    )
    table = html.table(header, [_equal_row(e) for e in found], "equal-loss")
    return [html.heading("Tokens and time to equal loss"), table, html.note(note)]


def _equal_row(e: EqualLoss) -> list[str]:
    first = [e.label, f"{e.loss:.4f}", tables.tokens(e.tokens)]
    if e.base_tokens is None:
        return [*first, "not reached", "-", duration(e.seconds), "-", "-"]
    time = e.base_seconds / e.seconds
    shares = f"{e.base_tokens / e.tokens:.1%}", "-" if math.isnan(time) else f"{time:.1%}"
    return [*first, tables.tokens(e.base_tokens), shares[0], duration(e.seconds), duration(e.base_seconds), shares[1]]


def published_gaps(labels: list[str], base: str, info: dict, published: dict[str, Points]) -> dict[str, float]:
    """{label: gap to the recipe `base`} [nats] of the published runs at the same N and tokens (within 1 %).

    {} where `base` was not among them.
    """
    n, d = info["parameters_non_embedding"], info["steps"] * info["tokens_per_step"]
    losses = {label: at(published.get(ALIASES.get(label, label), {}), n, d) for label in (*labels, base)}
    if losses[base] is None:
        return {}
    return {label: loss - losses[base] for label, loss in losses.items() if loss is not None}


def overlay(rows: list[Row], theirs: dict[str, float]) -> list[str]:
    """Published gaps beside ours."""
    if not theirs:
        return []
    cells = []
    for row in rows:
        ours = tables.signed(row.gap.mean * 1e3 if row.gap else math.nan, 1)
        gap = tables.signed(theirs.get(row.label, math.nan) * 1e3, 1)
        cells.append([row.label, f"{row.final:.4f}", ours, gap])
    header = ["recipe", "our loss", "our gap e-3", "published gap e-3 (C4)"]
    note = "Published: Quartet II's released sweep, C4, one seed each; read differences under 1.5e-3 there as noise."
    return [html.heading("Beside the published runs"), html.table(header, cells, "published"), html.note(note)]


def run_list(runs: list[Run]) -> list[str]:
    header = ["run", "seed", "status", "validation", "training", "ms/step", "init", "command"]
    rows = []
    for run in runs:
        last = [f"{column['loss'][-1]:.4f}" if len(column["loss"]) else "-" for column in (run.evals, run.train)]
        start = next((e for e in run.events if e.get("init_hash")), {})
        init = str(start.get("init_hash", "-"))[:8]
        time = f"{run.milliseconds:.1f}" + (f" ({run.company})" if run.company else "")
        command = str(run.info.get("command", ""))
        rows.append([run.name, str(run.info["seed"]), run.status, *last, time, init, command])
    note = "Equal init: the same initial weights. Training: the last step's loss, one batch."
    return [html.heading("Runs"), html.table(header, rows, "runs", text_columns=(7,)), html.note(note)]


def configuration(run: Run) -> dict:
    """What decides a run's numbers; UNUSED for settings of a quantizer that isn't there or doesn't read them."""
    numerics = run.info["numerics"]
    return {key: UNUSED if _is_unused(key, numerics) else value for key, value in numerics.items()}


def _is_unused(key: str, numerics: dict) -> bool:
    slot, _, field = key.rpartition(".")
    is_plain = numerics.get(f"{slot}.grid") == "none" and field not in ("grid", "source")
    return is_plain or (field.startswith("eden_") and numerics.get(f"{slot}.rounding") != "ms_eden")


def differing(title: str, values: list[tuple[Run, dict]], groups: list[Group], identity: str) -> list[str]:
    """A table of the keys whose values differ between runs. The seed is in the list of runs already."""
    keys = sorted(set().union(*(value for _, value in values)) - {"seed", "command"})
    rows = []
    for key in keys:
        found: dict[str, list[Run]] = {}
        for run, value in values:
            if value.get(key) is not UNUSED:
                found.setdefault(json.dumps(value.get(key)), []).append(run)
        if len(found) > 1:
            rows.append([key, "; ".join(f"{value}: {_who(runs, groups)}" for value, runs in found.items())])
    if not rows:
        return [html.heading(f"{title} differences"), html.note("None.")]
    more = [html.note(f"and {len(rows) - MANY} more")] if len(rows) > MANY else []
    return [html.heading(f"{title} differences"), html.table(["key", "values"], rows[:MANY], identity, (1,)), *more]


def _who(runs: list[Run], groups: list[Group]) -> str:
    """Recipes all of whose runs are among these, and the other runs by name."""
    whole = [group for group in groups if all(run in runs for run in group.members)]
    named = [run for group in whole for run in group.members]
    rest = [run.name for run in runs if run not in named]
    more = [f"{len(rest) - FEW} more"] if rest[FEW:] else []
    return ", ".join([*(group.label for group in whole), *rest[:FEW], *more])


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
