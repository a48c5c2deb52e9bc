"""From a step on only some parameters are trained: the others keep weights and moments as they are.

Their gradients are dropped before the norm is taken, as if they had never been asked for. `optim.train` and
`optim.train_from` ask for it.
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from quant.plan import Plan
from training.hooks.base import Hook, Run, check_globs
from training.optim.groups import create_state


@dataclass(frozen=True)
class TrainOnlyOptions:
    """Globs over parameters' names, and the share of the run's steps from which on nothing else is trained."""

    names: tuple[str, ...] = ()
    start: float = 0.0


class TrainOnly(Hook):
    Options = TrainOnlyOptions

    def __init__(self, options: TrainOnlyOptions, run: Run):
        super().__init__(options, run)
        self._first = math.ceil(options.start * run.steps)
        named = run.model.named_parameters()
        self._frozen = [p for name, p in named if not any(fnmatchcase(name, glob) for glob in options.names)]

    @classmethod
    def check(cls, options: TrainOnlyOptions, model: nn.Module, plan: Plan) -> None:
        check_globs("optim.train", options.names, model)

    def begin(self, step: int) -> None:
        if not self._first:
            create_state(self.run.optimizers)  # a checkpoint holds the moments of all parameters

    def before_update(self, step: int) -> None:
        if step >= self._first:
            for parameter in self._frozen:
                parameter.grad = None
