"""An early verdict: the final gap of an arm, with an interval, from what is there at a step.

The measure is the windowed gap to the baseline: the mean over the evaluations of the last half of what is done, paired
by seed. How it goes on is read off kept runs that ended, at the same share of their steps: final gap = b x windowed
gap, fitted with errors in proportion to the gap. Beside it the audit's error of Y and the X-ray's figure of the
forward's part count only where they add: leaving out one family of recipes after the other, the relative error of what
is foretold has to fall by a tenth. The same rounds give the coverage of the intervals.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
from scipy.special import betaincinv, stdtrit
from scipy.stats import rankdata

from analysis.runs import Run
from base.runfolder import read_json

BASE = "bf16"
WINDOW = 0.5  # the share of what is done that is left out of the window
EARLIEST = 0.15  # of the steps: before that gaps say nothing
FLOOR = 3e-3  # nats: smaller gaps count as this one where errors are in proportion
LEVEL = 0.9  # of the intervals
ADDS = 0.9  # how far a further figure has to bring the relative error down
LEAST_ARMS, LEAST_FAMILIES = 8, 3  # that a further figure has to be known of
SCHEDULE = "cosine"  # of the kept runs
AUDIT = Path(__file__).resolve().parents[1] / "results" / "error_law" / "captured.json"
# run_grid.py stop_losers=true: (from that share of the steps, so far behind the leader in nats) ends an arm. On kept
# pairs of 4-bit arms the first was wrong in 1 of 38 (by nothing), the second in 1 of 82 (the same one).
LOST = ((0.25, 15e-3), (0.5, 5e-3))
WIDE_GRIDS = ("none", "e4m3", "e5m2")


@dataclass(frozen=True)
class Arm:
    """Runs of one recipe under one set of conditions, each with the baseline's of its seed."""

    label: str
    pairs: tuple[tuple[Run, Run], ...]

    @property
    def family(self) -> str:
        """quartet2 of quartet2_po2 and `quartet2_fp8 blocks.0.*=fp8`."""
        return self.label.split()[0].split("_")[0]

    @property
    def final(self) -> float | None:
        """Mean final gap, nats; None before all ended."""
        if not all(run.finished and base.finished for run, base in self.pairs):
            return None
        return fmean(run.result["final_loss"] - base.result["final_loss"] for run, base in self.pairs)

    @property
    def share(self) -> float:
        """Of the steps, that all of its runs were evaluated at."""
        return min(last_common(run, base) / run.info["steps"] for run, base in self.pairs)

    def windowed(self, share: float) -> float | None:
        """Mean over seeds of the windowed gap, nats; None where a pair has no evaluation in the window."""
        gaps = [windowed(run, base, share) for run, base in self.pairs]
        return None if None in gaps else fmean(gaps)


def last_common(run: Run, other: Run) -> int:
    return int(max({*run.evals["step"]} & {*other.evals["step"]}, default=0))


def windowed(run: Run, other: Run, share: float) -> float | None:
    """Mean difference of two runs' losses over the evaluations of the window that ends at `share` of run's steps."""
    steps = run.info["steps"]
    losses, others = (dict(zip(one.evals["step"], one.evals["loss"], strict=True)) for one in (run, other))
    inside = [step for step in losses.keys() & others.keys() if WINDOW * share * steps < step <= share * steps + 1e-9]
    return fmean(losses[step] - others[step] for step in inside) if inside else None


def conditions(run: Run) -> str:
    """Run.conditions without the last evaluation's text, which an unfinished run hasn't read."""
    return run.conditions.rpartition(" val ")[0]


def refusal(run: Run) -> str | None:
    """Why nothing is foretold of a run, or None."""
    numerics = run.info["numerics"]
    if "parent" in run.info:
        return "is a fork, and no kept run that ended like one is compared with"
    if any(key.startswith("phases.") for key in numerics):
        return "changes its recipe at a step (phases): what came before says nothing of what comes"
    if hooks := sorted({key.split(".")[1] for key in numerics if key.startswith("hooks.")}):
        return f"has hooks ({', '.join(hooks)}), and the kept runs have none"
    if (schedule := numerics.get("schedule.name")) != SCHEDULE:
        return f"has schedule={schedule}; gaps of the kept runs, all {SCHEDULE}, close at the end as theirs do"
    return None


def arms_of(runs: Iterable[Run], base: str = BASE) -> tuple[list[Arm], list[str]]:
    """Arms of runs that have their baseline beside them, and a line for each run that is refused."""
    baselines: dict[tuple[str, int], Run] = {}
    found: dict[tuple[str, str], list[Run]] = {}
    refused = []
    for run in runs:
        if reason := refusal(run):
            refused.append(f"{run.name} {reason}")
        elif run.info["recipe_label"] == base:
            baselines.setdefault((conditions(run), int(run.info["seed"])), run)
        else:
            found.setdefault((conditions(run), run.info["recipe_label"]), []).append(run)
    arms = []
    for (where, label), members in found.items():
        paired = [(run, baselines.get((where, int(run.info["seed"])))) for run in members]
        if pairs := tuple((run, other) for run, other in paired if other is not None):
            arms.append(Arm(label, pairs))
    return arms, refused


# Further figures of an arm at a share of its steps; None where it has none. Errors are squared and relative.
Figure = Callable[[Arm, float], float | None]


def audited(product: str) -> Figure:
    """Its error on tensors of a trained model (scripts/quant_audit.py --captured), of y, dx or dw."""
    return lambda arm, share: audit().get(arm.label, {}).get(product)


@cache
def audit() -> dict[str, dict[str, float]]:
    """{recipe: mean errors of its operands and products}; {} where no kept file is."""
    if not AUDIT.exists():
        return {}
    return {name: row["mean"] for name, row in read_json(AUDIT)["recipes"].items()}


def xrayed(part: str) -> Figure:
    """A part of dW's error in the whole pass, mean over layers, at the newest look of its runs."""

    def figure(arm: Arm, share: float) -> float | None:
        there = [value for run, _ in arm.pairs if (value := looked(run, share, part)) is not None]
        return fmean(there) if there else None

    return figure


def looked(run: Run, share: float, part: str) -> float | None:
    rows = [row for row in run.looks_of("xray") if row["step"] <= share * run.info["steps"] + 1e-9]
    if not rows:
        return None
    return fmean(layer["wgrad"]["propagated"][part]["error"] or 0.0 for layer in rows[-1]["layers"].values())


# In the order in which they are tried.
FIGURES: dict[str, Figure] = {"audit's error of Y": audited("y"), "X-ray's forward part": xrayed("forward")}
RANKED: dict[str, Figure] = {
    "windowed gap": lambda arm, share: arm.windowed(share),
    "audit's error of Y": audited("y"),
    "audit's error of dW": audited("dw"),
    "X-ray's forward part": xrayed("forward"),
    "X-ray's backward part": xrayed("backward"),
}


@dataclass(frozen=True)
class Fit:
    """final gap = coefficients . features, errors in proportion to max(|windowed gap|, FLOOR)."""

    figures: tuple[str, ...]
    coefficients: np.ndarray
    spread: float
    df: int

    def foretold(self, features: np.ndarray) -> tuple[float, float, float]:
        """(gap, low, high) in nats at LEVEL; `features` as features_of makes them."""
        middle = float(features @ self.coefficients)
        half = stdtrit(self.df, (1 + LEVEL) / 2) * self.spread * max(abs(features[0]), FLOOR)
        return middle, middle - half, middle + half


def features_of(arm: Arm, share: float, figures: Sequence[str]) -> np.ndarray | None:
    values = [arm.windowed(share), *(FIGURES[name](arm, share) for name in figures)]
    return None if None in values else np.array(values, float)


def fit(features: np.ndarray, finals: np.ndarray, figures: Sequence[str]) -> Fit:
    weight = 1 / np.maximum(np.abs(features[:, 0]), FLOOR)
    coefficients, *_ = np.linalg.lstsq(features * weight[:, None], finals * weight, rcond=None)
    apart = (finals - features @ coefficients) * weight
    df = max(1, len(finals) - len(coefficients))
    return Fit(tuple(figures), coefficients, math.sqrt(float((apart**2).sum()) / df), df)


@dataclass(frozen=True)
class Left:
    """What leaving out one family after the other finds: relative error, and how many intervals held what came."""

    error: float
    held: int
    arms: int
    families: int

    @property
    def coverage(self) -> tuple[float, float, float]:
        """(share, low, high): a binomial 95 % interval (Clopper and Pearson)."""
        n, k = self.arms, self.held
        low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, 0.025))
        high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 0.975))
        return k / n, low, high


@dataclass(frozen=True)
class Calibration:
    """`tried`: {figure: (relative error without it, with it, arms)}, or the reason why it wasn't, as text."""

    share: float
    fit: Fit
    left: Left
    tried: dict[str, tuple[float, float, int] | str]


def calibrate(arms: Sequence[Arm], share: float, wanted: Iterable[str]) -> Calibration:
    """From arms that ended. `wanted`: figures that the arms to be judged have. ValueError for too few arms."""
    ended = [arm for arm in arms if arm.final is not None]
    chosen: tuple[str, ...] = ()
    tried: dict[str, tuple[float, float, int] | str] = {}
    for name in wanted:
        rows = known(ended, share, (*chosen, name))
        families = {arm.family for arm in rows}
        if len(rows) < LEAST_ARMS or len(families) < LEAST_FAMILIES:
            tried[name] = f"known of {len(rows)} arms of {len(families)} families, too few to tell"
            continue
        without, beside = (leave_out(rows, share, figures).error for figures in (chosen, (*chosen, name)))
        tried[name] = (without, beside, len(rows))
        if beside < ADDS * without:
            chosen = (*chosen, name)
    rows = known(ended, share, chosen)
    if len(rows) < LEAST_ARMS or len({arm.family for arm in rows}) < LEAST_FAMILIES:
        raise ValueError(
            f"{len(rows)} kept arms that ended have evaluations by {share:.0%} of their steps; {LEAST_ARMS} of "
            f"{LEAST_FAMILIES} families are needed: name more by --kept"
        )
    features, finals = table(rows, share, chosen)
    return Calibration(share, fit(features, finals, chosen), leave_out(rows, share, chosen), tried)


def known(arms: Iterable[Arm], share: float, figures: Sequence[str]) -> list[Arm]:
    return [arm for arm in arms if features_of(arm, share, figures) is not None]


def table(arms: Sequence[Arm], share: float, figures: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    features = np.array([features_of(arm, share, figures) for arm in arms])
    return features, np.array([arm.final for arm in arms])


def leave_out(arms: Sequence[Arm], share: float, figures: Sequence[str]) -> Left:
    features, finals = table(arms, share, figures)
    families = np.array([arm.family for arm in arms])
    squares, held = 0.0, 0
    for family in np.unique(families):
        out = families == family
        model = fit(features[~out], finals[~out], figures)
        for row, final in zip(features[out], finals[out], strict=True):
            middle, low, high = model.foretold(row)
            squares += ((final - middle) / max(abs(row[0]), FLOOR)) ** 2
            held += low <= final <= high
    return Left(math.sqrt(squares / len(arms)), int(held), len(arms), len(np.unique(families)))


def ranks(arms: Iterable[Arm], share: float, figure: Figure) -> tuple[int, float, float, float]:
    """(arms that have it and ended, Spearman's correlation with their final gaps, a 95 % interval after Bonett and
    Wright 2000); NaN for too few."""
    found = [(value, arm.final) for arm in arms if arm.final is not None and (value := figure(arm, share)) is not None]
    n = len(found)
    if n < 3:
        return n, math.nan, math.nan, math.nan
    ranked = (rankdata(column) for column in zip(*found, strict=True))
    rho = float(np.corrcoef(*ranked)[0, 1])
    if n < 5 or not abs(rho) < 1:
        return n, rho, math.nan, math.nan
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return n, rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def is_rival(run: Run) -> bool:
    """Whether all of its GEMMs are in 4 bits: such arms compete, BF16 and FP8 would beat them all."""
    grids = [grid for key, grid in run.info["numerics"].items() if key.startswith("quant.") and key.endswith(".grid")]
    return bool(grids) and not any(grid in WIDE_GRIDS for grid in grids)


def lost(run: Run, rivals: Iterable[Run], share: float) -> tuple[Run, float] | None:
    """(the leader, how far behind in nats) where LOST ends `run` at that share of its steps; else None.

    rivals: of its conditions and seed; the leader is the one that is furthest ahead of it."""
    limits = [limit for since, limit in LOST if share >= since]
    gaps = [(windowed(run, rival, share), rival) for rival in rivals if rival.path != run.path]
    gap, leader = max(
        ((gap, rival) for gap, rival in gaps if gap is not None), default=(None, None), key=lambda one: one[0]
    )
    return (leader, gap) if limits and gap is not None and gap >= min(limits) else None


def rivals_of(run: Run, runs: Iterable[Run]) -> list[Run]:
    """Those that compete with it; [] where it doesn't compete itself."""
    if not is_rival(run):
        return []
    same = (conditions(run), run.info["seed"])
    return [one for one in runs if is_rival(one) and (conditions(one), one.info["seed"]) == same]


@dataclass(frozen=True)
class Replay:
    """What LOST would have done: arms, those that it ends with the share of their steps that was left, and those of
    them that ended ahead of an arm that went on, with by how much [nats]."""

    runs: int
    ended: dict[str, float]
    wronged: dict[str, float]

    @property
    def saved(self) -> float:
        """Share of all steps."""
        return sum(self.ended.values()) / self.runs


def replay(runs: Sequence[Run]) -> Replay:
    """On runs that ended, side by side, judged at each evaluation."""
    ended_runs = [run for run in runs if run.finished and refusal(run) is None]
    groups = {run.path: rivals_of(run, ended_runs) for run in ended_runs}
    competing = [run for run in ended_runs if len(groups[run.path]) > 1]
    ended = {run.path: left for run in competing if (left := left_over(run, groups[run.path]))}
    wronged = {}
    for run in competing:
        others = [other for other in groups[run.path] if other.path not in ended]
        ahead = max((other.result["final_loss"] - run.result["final_loss"] for other in others), default=0.0)
        if run.path in ended and ahead > 0:
            wronged[run.name] = ahead
    names = {run.path: run.name for run in competing}
    return Replay(len(competing), {names[path]: left for path, left in ended.items()}, wronged)


def left_over(run: Run, rivals: Sequence[Run]) -> float:
    """The share of its steps that it would not have run; 0 where it goes to its end."""
    shares = [step / run.info["steps"] for step in run.evals["step"]]
    return next((1 - share for share in shares if lost(run, rivals, share)), 0.0)
