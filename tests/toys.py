"""A hook and a probe as a newcomer would write them: everything of either is here."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.hooks.base import Hook, Run, keep_where, like_weights
from training.probes.base import Context, Probe
from training.ranks.distributed import local


@dataclass(frozen=True)
class DragOptions:
    period: int = 4
    window: int = 3


class Drag(Hook):
    """In the first `window` steps of each period it sums |w|; with the last of them it takes 1 % of the sum off w."""

    Options = DragOptions
    bytes_per_parameter = 4.0

    def __init__(self, options: DragOptions, run: Run):
        super().__init__(options, run)
        self._sums = like_weights(run.model)

    def state(self, step: int) -> dict[str, Tensor]:
        return self._sums if 0 < step % self.options.period < self.options.window else {}

    @torch.no_grad()
    def after_step(self, step: int, skip: Tensor) -> None:
        place = step % self.options.period
        if place >= self.options.window:
            return
        for parameter, total in zip(self.run.model.parameters(), self._sums.values(), strict=True):
            weight, total = local(parameter), local(total)
            keep_where(skip, total, weight.abs() if place == 0 else total + weight.abs())
            if place == self.options.window - 1:
                keep_where(skip, weight, weight - 0.01 * total)


@dataclass(frozen=True)
class NormOptions:
    every: int = 3


class Norm(Probe):
    """Every few steps the loss of the step's first micro-batch and its gradient's norm; and how often it looked."""

    Options = NormOptions

    def __init__(self, options: Any):
        super().__init__(options)
        self._looks = torch.zeros((), dtype=torch.int64)

    def due(self, step: int) -> bool:
        return step % self.options.every == 0

    def state(self, step: int) -> dict[str, Tensor]:
        return {"looks": self._looks}

    def rows(self, context: Context) -> list[dict[str, Any]]:
        tokens = next(context.batches(context.step - 1))
        context.set_rng(context.step - 1, 0)
        with context.accumulate(True):
            nats = context.loss(tokens)
            nats.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in context.model.parameters()])
        self._looks += 1
        return [{"kind": "norm", "nats": nats.item(), "norm": norm.item(), "looks": self._looks.item()}]
