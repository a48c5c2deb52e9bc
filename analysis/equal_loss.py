"""How many tokens, and how long, the baseline needs for the loss that another recipe ends with.

Read off the validation curves, so with a caveat that the report prints: a decaying learning rate makes every point
before the end worse than a run of that length would be; the saving of the baseline is therefore a lower bound. Curves
are those of the seeds that both have, as gaps are.
"""

from dataclasses import dataclass

import numpy as np

from analysis.compare import Group, on_shared_seeds
from analysis.plots import group_curve


@dataclass(frozen=True)
class EqualLoss:
    """The baseline reaches `loss` (the recipe's last on its curve) after `base_tokens`; the recipe after `tokens`.

    `base_tokens` is None when the baseline never does. Seconds are steps times the median step time of runs that had
    their GPU alone; NaN without one.
    """

    label: str
    loss: float
    tokens: float
    base_tokens: float | None
    seconds: float
    base_seconds: float | None


def first_reach(steps: np.ndarray, losses: np.ndarray, target: float) -> float | None:
    """The step at which a curve that begins above `target` first comes down to it, linear between its points; None when
    it never does."""
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return None
    i = int(below[0])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def equal_loss(group: Group, base: Group) -> EqualLoss | None:
    """None when either has no evaluation yet, or a seed that diverged, or their curves are of different text, or the
    baseline was there by its first evaluation."""
    if group.diverged or base.diverged or len({t for run in (*group.runs, *base.runs) for t in run.targets[:1]}) > 1:
        return None
    (steps, losses, _), (base_steps, base_losses, _) = (group_curve(side) for side in on_shared_seeds(group, base))
    if not len(steps) or not len(base_steps) or base_losses[0] <= losses[-1]:
        return None
    reached = first_reach(base_steps, base_losses, float(losses[-1]))
    per_step, base_per_step = _per_step(group), _per_step(base)
    return EqualLoss(
        label=group.label,
        loss=float(losses[-1]),
        tokens=float(steps[-1]) * per_step[0],
        base_tokens=None if reached is None else reached * base_per_step[0],
        seconds=float(steps[-1]) * per_step[1],
        base_seconds=None if reached is None else reached * base_per_step[1],
    )


def _per_step(group: Group) -> tuple[int, float]:
    """Tokens and seconds of one step."""
    return group.runs[0].info["tokens_per_step"], group.milliseconds / 1e3
