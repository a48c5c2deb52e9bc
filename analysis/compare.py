"""Group runs by recipe and work out the rows of the comparison table."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from analysis.alike import SHOWN, same_rows
from analysis.pairing import Floor, Gap, SeedGap, paired_gap, seed_gap
from analysis.runs import Run
from base.runfolder import RunError
from base.words import some


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ in nothing but the seed.

    `cut`: runs stopped early though others of the recipe came to an end. They are listed, and in no figure: they would
    pull every comparison back to the step at which the time was up. A diverged one takes the group's losses and verdict
    with it: a mean over the seeds that survived would flatter the recipe.
    """

    label: str
    runs: tuple[Run, ...]
    cut: tuple[Run, ...] = ()

    def by_seed(self) -> dict[int, list[Run]]:
        seeds: dict[int, list[Run]] = {}
        for run in self.runs:
            seeds.setdefault(int(run.info["seed"]), []).append(run)
        return dict(sorted(seeds.items()))

    @property
    def members(self) -> tuple[Run, ...]:
        return *self.runs, *self.cut

    @property
    def diverged(self) -> tuple[Run, ...]:
        return tuple(run for run in self.members if run.diverged_at is not None)

    @property
    def milliseconds(self) -> float:
        """A step's, the median of the runs that had their GPU alone; NaN without one."""
        alone = [run.milliseconds for run in self.runs if not run.company]
        return float(np.median(alone)) if alone else math.nan

    @property
    def tokens_per_second(self) -> float:
        return self.runs[0].info["tokens_per_step"] / self.milliseconds * 1e3

    def has(self, step: int) -> bool:
        """Whether all of its runs were evaluated at that step."""
        return all(step in run.evals["step"] for run in self.runs)

    @property
    def caption(self) -> str:
        """The name at a curve, which is that of the other seeds."""
        return f"{self.label} ({len(self.diverged)} diverged)" if self.diverged else self.label


@dataclass(frozen=True)
class Row:
    """One line of the table. Losses in nats/token; `gap` and `text`, its error over text, are None for the baseline."""

    label: str
    seeds: int
    runs: int
    status: str
    step: int
    tokens: int
    final: float
    bpb: float
    bpb_is_approximate: bool
    sd: float
    best: float
    gap: SeedGap | None
    text: Gap | None
    percent: float
    tokens_per_second: float
    ratio: float


def group_runs(runs: list[Run], step: int | None = None) -> list[Group]:
    """Groups in order of first appearance; the label says where other numerics differ under one recipe_label.

    It shows three of the keys; where these don't tell two groups apart, the hash of the first run does. With `step`,
    every run as it stood there, and those that were evaluated there count, finished or not. RunError for a group
    without such a run.
    """
    keys: dict[tuple, list[Run]] = {}
    for run in runs if step is None else [run.until(step) for run in runs]:
        keys.setdefault((run.info["recipe_label"], _without_seed(run)), []).append(run)
    groups = []
    for (label, numerics), members in keys.items():
        siblings = [dict(n) for (other, n) in keys if other == label]
        varying = [k for k, v in numerics if any(s.get(k) != v for s in siblings)] if len(siblings) > 1 else []
        suffix = ", ".join(f"{k}={dict(numerics)[k]}"[:60] for k in varying[:3])
        full = f"{label} ({suffix})" if suffix else label
        groups.append(Group(full, *(_split_cut(members) if step is None else _split_at(step, full, members))))
    labels = [group.label for group in groups]
    return [_with_hash(group) if labels.count(group.label) > 1 else group for group in groups]


def _with_hash(group: Group) -> Group:
    return replace(group, label=f"{group.label.removesuffix(')')}, {group.runs[0].info['hash'][:6]})")


def _split_cut(runs: list[Run]) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """(runs that count, runs that were cut); where nothing came to an end, what there is counts."""
    ended = tuple(run for run in runs if run.finished)
    return (ended, tuple(run for run in runs if run not in ended)) if ended else (tuple(runs), ())


def _split_at(step: int, label: str, runs: list[Run]) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """(runs evaluated at `step`, the others)."""
    there = tuple(run for run in runs if step in run.evals["step"])
    if not there:
        steps = sorted({int(s) for run in runs for s in run.evals["step"]})
        raise RunError(f"--step {step}: no run of {label} was evaluated there; up to it at: {steps or 'no step'}")
    return there, tuple(run for run in runs if run not in there)


def _without_seed(run: Run) -> tuple:
    """Hashable numerics without the seed, which tells the runs of a group apart.

    Forks of several trunks that differ by their seed are one group. Its n is the number of trunks: tails of one trunk
    that differ in their rounding are reruns of one seed."""
    numerics, parent = run.info["numerics"], run.info.get("parent")
    if parent:
        numerics = numerics | {"fork.parent": None, "rounding_seed": parent["rounding_seed"]}
    return tuple(sorted((k, str(v)) for k, v in numerics.items() if k != "seed"))


def pick_baseline(groups: list[Group], name: str | None) -> Group:
    """The group called `name`, else bf16, else the first. ValueError when `name` is not among the labels."""
    labels = [g.label for g in groups]
    try:
        return groups[labels.index(named(labels, name or "bf16"))]
    except LookupError as error:
        if name:
            raise ValueError(f"--baseline {name}: {error}") from None
    return groups[0]


def named(labels: list[str], name: str) -> str:
    """The label that `name` is, or begins with other numerics in brackets. LookupError for none, and for several."""
    if name in labels:
        return name
    matching = [label for label in labels if label.startswith(f"{name} (")]
    if len(matching) > 1:
        raise LookupError(f"{name!r} may be {', '.join(matching)}: give one of them whole, or fewer runs")
    if not matching:
        raise LookupError(f"{name!r} is not among the recipes: {', '.join(labels)}")
    return matching[0]


def common_step(*groups: Group) -> int | None:
    """The last step at which every run of all groups was evaluated; None without one."""
    shared = set.intersection(*(set(run.evals["step"].astype(int)) for group in groups for run in group.runs))
    return max(shared, default=None)


def shared_seeds(a: Group, b: Group) -> list[int]:
    """The seeds that both have, in order."""
    return sorted(a.by_seed().keys() & b.by_seed().keys())


def on_shared_seeds(a: Group, b: Group) -> tuple[Group, Group]:
    """Both with the seeds that both have; as they are where they share none."""
    shared = shared_seeds(a, b)
    if not shared:
        return a, b
    one, other = (tuple(run for seed in shared for run in side.by_seed()[seed]) for side in (a, b))
    return replace(a, runs=one), replace(b, runs=other)


def losses_at(group: Group, step: int) -> dict[int, float]:
    """{seed: validation loss at step}."""
    return seed_means(group, lambda run: run.loss_at(step))


def seed_means(group: Group, value: Callable[[Run], float]) -> dict[int, float]:
    """{seed: value}; reruns of one seed are averaged, or they would count double in a mean over seeds; NaN for a seed
    that diverged."""
    means = {seed: float(np.mean([value(run) for run in runs])) for seed, runs in group.by_seed().items()}
    return means | {int(run.info["seed"]): math.nan for run in group.diverged}


def mean_over_seeds(group: Group, value: Callable[[Run], float]) -> float:
    """Mean over seeds of value(run); reruns of a seed are averaged first."""
    return float(np.mean(list(seed_means(group, value).values())))


def compare_pair(group: Group, base: Group, step: int, floor: Floor | None) -> tuple[SeedGap, Gap]:
    """Gap over seeds at `step`, and over documents for these trained models.

    The noise floor is one of final losses, so it judges only these. RunError unless all runs of both were scored on
    the same validation tokens.
    """
    runs = (*base.runs, *group.runs)
    rows = same_rows((run, step) for run in runs)
    ours, theirs = group.by_seed(), base.by_seed()
    pairs = shared_seeds(group, base)
    couples = [(ours[s][0], theirs[s][0]) for s in pairs] if pairs else [(group.runs[0], base.runs[0])]
    text = paired_gap([rows[run.path] for run, _ in couples], [rows[other.path] for _, other in couples])
    gap = seed_gap(losses_at(group, step), losses_at(base, step), floor if _judges(floor, runs, step) else None)
    return gap, replace(text, value=math.nan, se=math.nan) if math.isnan(gap.mean) else text


def _judges(floor: Floor | None, runs: Iterable[Run], step: int) -> bool:
    """Is `step` these runs' end, and were they trained as those were whose ends the floor is about?"""
    ends = all(run.info["steps"] == step for run in runs)
    return floor is not None and ends and all(floor.conditions in (None, run.conditions) for run in runs)


def table(groups: list[Group], base: Group, floor: Floor | None = None) -> list[Row]:
    """One row a group, baseline first, then by gap; diverged ones and rows of an earlier step last, since gaps shrink
    over a run.

    RunError for a group without an evaluation step of the baseline.
    """
    rows = [_row(group, base, floor) for group in groups]
    last = max(row.step for row in rows)
    return sorted(rows, key=lambda r: (r.gap is not None, r.step < last, _finite(r.gap.mean) if r.gap else math.inf))


def _finite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _row(group: Group, base: Group, floor: Floor | None) -> Row:
    step = common_step(group, base)
    if step is None:
        raise RunError(_nothing_in_common(group, base))
    losses = np.array(list(losses_at(group, step).values()))
    gap = text = None
    if group is base:
        same_rows((run, step) for run in base.runs)  # compare_pair looks at both sides
    else:
        gap, text = compare_pair(group, base, step, floor)
    base_loss = np.mean(list(losses_at(base, step).values()))
    statuses = sorted({run.status for run in group.members})
    return Row(
        label=group.label,
        seeds=len(group.by_seed()),
        runs=len(group.runs),
        status="; ".join(statuses),
        step=step,
        tokens=step * group.runs[0].info["tokens_per_step"],
        final=float(losses.mean()),
        bpb=mean_over_seeds(group, lambda run: run.loss_at(step, "bpb")),
        bpb_is_approximate=any(run.bpb_is_approximate for run in group.runs),
        sd=float(losses.std(ddof=1)) if len(losses) > 1 else math.nan,
        best=mean_over_seeds(group, lambda run: run.best_loss),
        gap=gap,
        text=text,
        percent=100 * gap.mean / base_loss if gap else math.nan,
        tokens_per_second=group.tokens_per_second,
        ratio=group.tokens_per_second / base.tokens_per_second,
    )


def _nothing_in_common(group: Group, base: Group) -> str:
    runs = base.runs if group is base else (*group.runs, *base.runs)
    empty = [run for run in runs if not len(run.evals["step"])]
    if ended := [f"{run.name} ({run.status})" for run in empty if run.diverged_at is not None]:
        them = some(ended, SHOWN)
        return f"diverged before any evaluation, so no figure is there to compare: {them}; leave out, and say so"
    if empty:
        return (
            f"no evaluation yet in {some([r.name for r in empty], SHOWN)}: leave out such runs, or wait for their first"
        )
    who = f"the runs of {base.label}" if group is base else f"{group.label} and {base.label}"
    return f"{who} have no evaluation step in common; set the same evaluation interval"
