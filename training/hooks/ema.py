"""An exponential moving average of the weights, scored beside them at every evaluation (`loss_ema`).

    average <- average + (1 - d) (weight - average),   d = min(decay, (1 + step) / (10 + step))

The second bound lets the average forget the initialization: without it a decay of .999 keeps 5 % of it for 3,000 steps.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.hooks.base import Hook, Run, like_weights
from training.ranks.distributed import local
from training.ranks.parallel import reshard


@dataclass(frozen=True)
class EmaOptions:
    decay: float = 0.999

    def __post_init__(self) -> None:
        if not (isinstance(self.decay, float) and 0.0 < self.decay < 1.0):
            raise ValueError(f"hooks.ema.decay={self.decay!r}: needs a number between 0 and 1, such as 0.999")


class Ema(Hook):
    """One FP32 copy of the weights."""

    Options = EmaOptions
    bytes_per_parameter = 4.0

    def __init__(self, options: Any, run: Run):
        super().__init__(options, run)
        self._averages = like_weights(run.model)
        self._weights = [local(parameter.detach()) for parameter in run.model.parameters()]
        self._local = [local(average) for average in self._averages.values()]

    def begin(self, step: int) -> None:
        torch._foreach_copy_(self._local, self._weights)

    def state(self, step: int) -> dict[str, Tensor]:
        return self._averages

    @torch.no_grad()
    def after_step(self, step: int, skip: Tensor) -> None:
        share = torch.where(skip > 0, 0.0, 1.0 - min(self.options.decay, (1 + step) / (10 + step)))
        for average, weight in zip(self._local, self._weights, strict=True):
            average.lerp_(weight, share)

    def weights(self, step: int) -> AbstractContextManager[None]:
        return self._in_place()

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The averages take the weights' places: what is compiled or captured reads those."""
        own = [weight.clone() for weight in self._weights]
        self._put(self._local)
        try:
            yield
        finally:
            self._put(own)

    def _put(self, values: list[Tensor]) -> None:
        reshard(self.run.loss)  # what was gathered for an earlier forward has the other weights
        torch._foreach_copy_(self._weights, values)
