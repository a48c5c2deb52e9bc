"""What a hook is: something that happens around a training step, with state of its own that is checkpointed.

A hook is one file of this folder and one line of the table in __init__.py. The rules that keep a run exact:

- Everything that a hook decides on the host follows from its options and the step's number alone. Steps are repeated
  after a bad batch and left out by a rollback: `before_step(step)` puts right what a step needs, whatever came before.
- Tensors change in `after_step` only, in place, and not where `skip` is raised (`keep_where`): a step whose gradient
  isn't finite, and those that follow it until the host looks, leave the run as it was. Nothing is freed there either:
  the host may come back to an earlier step.
- `state(step)` names the same tensors, of the same shapes, whenever it is asked about a step: it is asked before a
  checkpoint is loaded. State that follows a weight is made by `like_weights`, so that it is sharded as the weight is.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from base.words import suggestion
from quant.plan import Plan
from training.microbatch import MicroBatch
from training.options import NoOptions


@dataclass(frozen=True)
class Run:
    """What hooks are built around. `loss` holds the `model`, compiled and sharded as it is trained. `micro_batch` is
    for a hook that changes what a step launches: CUDA graphs have captured that."""

    loss: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    steps: int
    micro_batch: MicroBatch | None = None

    @property
    def model(self) -> nn.Module:
        return self.loss.model


class Hook:
    """Does nothing. `Options`: a frozen dataclass whose fields are the hook's keys in a configuration; it checks them.
    `bytes_per_parameter`: what its state takes, for the memory that is expected. `never_with`: {hook: why not} of those
    that undo what it does."""

    Options: type = NoOptions
    bytes_per_parameter = 0.0
    never_with: Mapping[str, str] = {}

    def __init__(self, options: Any, run: Run):
        self.options, self.run = options, run

    @classmethod
    def check(cls, options: Any, model: nn.Module, plan: Plan) -> None:
        """Raise ValueError, before the run, where the options don't fit the model (on the meta device, plain linears)
        or its layers' recipes. What concerns the options alone their dataclass has checked."""

    def begin(self, step: int) -> None:
        """A run begins, or goes on from `step` without the state of this hook. The weights are there."""

    def state(self, step: int) -> dict[str, Tensor]:
        """Tensors that a checkpoint of `step` (completed steps) holds as hooks.<name>.<key>; made if not there yet."""
        return {}

    def before_step(self, step: int) -> None:
        """Before the forward of step `step` (from 0), and before a replay of it."""

    def before_update(self, step: int) -> None:
        """All gradients are summed, not clipped yet."""

    def after_step(self, step: int, skip: Tensor) -> None:
        """The weights are those after step `step`. `skip`: FP32 [] on the device, not 0 where nothing may change."""

    def before_evaluation(self, step: int) -> None:
        """Before the model is scored after `step` completed steps."""

    def weights(self, step: int) -> AbstractContextManager[None] | None:
        """Within it the model has other weights, that an evaluation reports too; None: the hook has none to offer."""
        return None


def like_weights(model: nn.Module) -> dict[str, Tensor]:
    """{parameter's name: zeros, placed as the parameter is}."""
    return {name: torch.zeros_like(parameter.detach()) for name, parameter in model.named_parameters()}


def check_globs(where: str, globs: Iterable[str], model: nn.Module) -> None:
    """ValueError, with the nearest name, for a glob that matches no parameter's name."""
    known = [name for name, _ in model.named_parameters()]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in known):
            near = suggestion(glob, known, f"parameters: {', '.join(known[:4])}, ...")
            raise ValueError(f"{where}: {glob!r} matches no parameter{near}")


@torch.no_grad()
def keep_where(skip: Tensor, target: Tensor, new: Tensor) -> None:
    """target <- new, but not where `skip` is raised. Both are local tensors; nothing waits for the device."""
    target.copy_(torch.where(skip > 0, target, new))
