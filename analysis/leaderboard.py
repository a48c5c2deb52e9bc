"""The leaderboard: every recipe at one data order and one rate, with what is known of its quantizers.

A gap is to the baseline over the seeds that both have. Its error comes from one pooled spread: that of the kept
study of 0.75B tokens (analysis/noise.py, "paired") together with what this board's own seeds show, so one seed has
an interval, too. "Ahead", "behind" and "equal" are contrasts to one recipe (analysis/contrasts.py), adjusted by Holm
over all arms; equal is said only where two one-sided tests of the margin reject.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis import contrasts, noise
from analysis.alike import same_rows
from analysis.compare import Group, group_runs, losses_at, mean_over_seeds, shared_seeds
from analysis.contrasts import EQUIVALENT, OPEN, Contrast, Spread
from analysis.pages import table as markdown
from analysis.pairs import widening
from analysis.runs import Run
from base.runfolder import read_json

MARGIN = 3e-3
BASELINE, RIVAL = "bf16", "quartet2"
LR = "schedule.lr_peak"
E3 = 1e3


@dataclass(frozen=True)
class Arm:
    """A recipe with runs. `gap`, `versus`: contrasts to the baseline and to the rival; None of itself."""

    group: Group
    loss: float
    gap: Contrast | None
    versus: Contrast | None

    @property
    def label(self) -> str:
        return self.group.label


def at(runs: Iterable[Run], model: str, rate: float | None) -> list[Run]:
    """The finished ones of one model at one peak rate (of all rates: None)."""
    finished = [run for run in runs if run.finished and run.info["model"] == model]
    return [run for run in finished if rate in (None, run.info["numerics"][LR])]


def pooled(groups: list[Group], kept: Spread) -> Spread:
    """`kept` together with the residuals of loss = recipe + seed of these groups."""
    step = groups[0].runs[0].info["steps"]
    losses = {group.label: losses_at(group, step) for group in groups}
    finite = {label: row for label, row in losses.items() if np.isfinite(list(row.values())).all()}
    own = noise.paired(finite)
    if own is None:
        return kept
    df = kept.df + own.df
    sd = math.sqrt((kept.df * kept.sd**2 + own.df * own.sd**2) / df)
    return Spread(sd, df, f"{kept.source}, {own.df:g} of {df:g} degrees of freedom from here")


def arms(runs: list[Run], kept: Spread) -> tuple[list[Arm], Spread]:
    """(baseline first, then by gap; the spread that judges them). RunError for runs of unlike text."""
    groups = sorted(group_runs(runs), key=lambda group: group.label != BASELINE)
    step = groups[0].runs[0].info["steps"]
    same_rows((run, step) for group in groups for run in group.runs)
    spread = pooled(groups, kept)
    gaps = against(groups, BASELINE, step, spread)
    versus = against([group for group in groups if group.label in gaps], RIVAL, step, spread)
    made = [
        Arm(
            group, mean_over_seeds(group, lambda run: run.loss_at(step)), gaps.get(group.label), versus.get(group.label)
        )
        for group in groups
        if group.label == BASELINE or group.label in gaps
    ]
    return sorted(made, key=lambda arm: arm.gap.value if arm.gap else -math.inf), spread


def against(groups: list[Group], name: str, step: int, spread: Spread) -> dict[str, Contrast]:
    """{recipe: its contrast to `name`}, over the seeds that both have; {} without that recipe."""
    other = next((group for group in groups if group.label == name), None)
    if other is None:
        return {}
    found = []
    for group in groups:
        if group is other or not (seeds := shared_seeds(group, other)):
            continue
        ours, theirs = losses_at(group, step), losses_at(other, step)
        value = float(np.mean([ours[seed] - theirs[seed] for seed in seeds]))
        error = spread.sd * math.sqrt(2 / len(seeds))
        found.append(Contrast(group.label, name, step, value, error, len(seeds), spread, MARGIN))
    return {contrast.recipe: contrast for contrast in contrasts.adjusted(found)}


def verdict(contrast: Contrast) -> str:
    if contrast.outcome in (EQUIVALENT, OPEN):
        return "equal" if contrast.outcome == EQUIVALENT else OPEN
    return "ahead" if contrast.value < 0 else "behind"


def board(found: list[Arm], spread: Spread) -> str:
    """Losses, gaps with intervals (alone; all at once), their parts, and where each stands to the rival."""
    wide = widening(len(found), spread.df)
    base = _mean(run_score(run, "nvfp4") for run in found[0].group.runs)
    rows = []
    for arm in found:
        gap = parts = rest = versus = ""
        served = _mean(run_score(run, "nvfp4") for run in arm.group.runs)
        if arm.gap:
            half = E3 * arm.gap.half_width
            gap = f"{E3 * arm.gap.value:+.1f} +- {half:.1f} ({half * wide:.1f})"
            own = _mean(run_score(run, "own", over=True) for run in arm.group.runs)
            plain = _mean(run_score(run, "bf16") for run in arm.group.runs)
            if own is not None and plain is not None:
                parts, rest = f"{E3 * own:.1f}", f"{E3 * (plain - found[0].loss):.1f}"
        if arm.versus:
            versus = f"{E3 * arm.versus.value:+.1f}, {verdict(arm.versus)}"
        cell = "" if served is None or base is None else f"{E3 * (served - base):+.1f}"
        seeds = str(len(arm.group.by_seed()))
        rows.append([f"`{arm.label}`", seeds, f"{arm.loss:.4f}", gap, parts, rest, cell, versus])
    header = ["arm", "seeds", "loss", "gap, 1e-3: alone (all at once)", "instant", "trajectory"]
    return markdown([*header, "served in `nvfp4`", f"to `{RIVAL}`"], rows)


def run_score(run: Run, forward: str, over: bool = False) -> float | None:
    """Loss of the final weights under a forward (scripts/score.py), or what it is over BF16's; None if not scored."""
    return run.scores.get(forward, {}).get("over_bf16" if over else "loss")


def _mean(values: Iterable[float | None]) -> float | None:
    """None unless all are there."""
    every = list(values)
    return None if any(value is None for value in every) else float(np.mean(every))


def step_ratios(bench: Path, model: str) -> dict[str, float]:
    """{recipe: median step over bf16's of the same file} of bench_step.py's files; a later name wins."""
    found: dict[str, float] = {}
    for path in sorted(bench.glob(f"step_{model}*.json")):
        rows = {row["recipe"]: row["ms_median"] for row in read_json(path)}
        found |= {recipe: ms / rows[BASELINE] for recipe, ms in rows.items() if BASELINE in rows}
    return found


def properties(found: list[Arm], captured: Mapping[str, Any], ratios: Mapping[str, float]) -> str:
    """What each arm's quantizers do to captured tensors, what a step takes, and which hardware multiplies them."""
    rows = []
    for arm in found:
        about = captured.get(arm.label, {})
        fprop, mean = about.get("fprop", {}), about.get("mean", {})
        ratio = ratios.get(arm.label)
        rows.append(
            [
                f"`{arm.label}`",
                _both(fprop, lambda row: f"{row['bits']:g}"),
                " / ".join(f"{E3 * mean[name]:.1f}" if name in mean else "-" for name in ("fprop.x", "fprop.w", "y")),
                _both(fprop, lambda row: f"{E3 * row['align']:+.1f}"),
                _both(fprop, lambda row: f"{100 * row['clipped']:.2f}"),
                "-" if ratio is None else f"{ratio:.2f}",
                "any" if arm.label == BASELINE else about.get("native", "-"),
            ]
        )
    header = ["arm", "bits X, W", "errors X / W / Y, 1e-3", "align X, W, 1e-3", "clipped X, W, %", "step / bf16"]
    return markdown([*header, "native"], rows)


def _both(fprop: Mapping[str, Any], shown: Any) -> str:
    """Of X and of W; "-" for one that stays in BF16."""
    return ", ".join(shown(fprop[name]) if name in fprop else "-" for name in ("fprop.x", "fprop.w")) if fprop else "-"


def own_baseline(runs: list[Run]) -> str:
    """A table of runs that are compared with the bf16 of their own rate and seed alone, absolute losses first."""
    plain = {_place(run): run.result["final_loss"] for run in runs if run.info["recipe"] == BASELINE}
    rows = []
    for run in sorted(runs, key=lambda run: run.result["final_loss"]):
        over = run.info["recipe"] != BASELINE and _place(run) in plain
        gap = f"{E3 * (run.result['final_loss'] - plain[_place(run)]):+.1f}" if over else ""
        rate, seed = _place(run)
        rows.append([f"`{run.info['recipe_label']}`", f"{rate:g}", str(seed), f"{run.result['final_loss']:.4f}", gap])
    return markdown(["arm", "rate", "seed", "loss", "over its own bf16, 1e-3"], rows or [["no run", "", "", "", ""]])


def _place(run: Run) -> tuple[float, int]:
    return run.info["numerics"][LR], run.info["seed"]
