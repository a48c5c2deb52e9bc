"""Refits what shaped rounding hands on (quant/products/shaped.py): after steps 1, 2, 4, ... and then every `every`.

F_x follows the weights, F_w the inputs of the step's first micro-batch, which has been trained on: nothing of a later
token, or of an evaluation's, is in it. Weights move little in a few dozen steps, and F is a full inverse for each.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quant.plan import Plan, quant_linears
from quant.products.shaped import DAMPING
from training.hooks.base import Hook, Run, keep_where
from training.ranks.distributed import local, shard_groups


@dataclass(frozen=True)
class FeedbackOptions:
    """`every`: steps from one refit to the next. `damping`: times the mean of the metric's diagonal, added to it."""

    every: int = 32
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f"hooks.feedback.every={self.every!r}: needs a number of steps, such as 32")
        if not (isinstance(self.damping, float) and 0.0 < self.damping < float("inf")):
            raise ValueError(f"hooks.feedback.damping={self.damping!r}: needs a positive number, such as 0.1")


class Feedback(Hook):
    """Its state are the matrices F, which lie in the layers."""

    Options = FeedbackOptions
    bytes_per_parameter = 16.0  # at 30M, 6 at 1.9B: for each [N, K] two BF16 [K, K] and 8,192 tokens of X

    def __init__(self, options: FeedbackOptions, run: Run):
        super().__init__(options, run)
        self._layers = {name: layer for name, layer in quant_linears(run.model).items() if layer.fitted()}

    @classmethod
    def check(cls, options: FeedbackOptions, model: nn.Module, plan: Plan) -> None:
        if not any(recipe.hook == "feedback" for recipe in plan.recipes):
            raise ValueError("hooks.feedback: no layer has a recipe of scheme: shaped; leave the hook out")

    def begin(self, step: int) -> None:
        self._refit(torch.zeros((), device=next(self.run.model.parameters()).device), ("x",))

    def state(self, step: int) -> dict[str, Tensor]:
        return {f"{name}.{key}": value for name, layer in self._layers.items() for key, value in layer.fitted().items()}

    def after_step(self, step: int, skip: Tensor) -> None:
        done = step + 1
        if done % self.options.every == 0 or (done < self.options.every and done & step == 0):
            self._refit(skip, ("x", "w"))

    @torch.no_grad()
    def _refit(self, skip: Tensor, operands: tuple[str, ...]) -> None:
        for layer in self._layers.values():
            for name, target in layer.fitted().items():
                if name in operands:
                    new = layer.refitted(name, _metric(layer, name), self.options.damping)
                    keep_where(skip + (~new.isfinite()).any(), target, new)


def _metric(layer: Any, operand: str) -> Tensor:
    """H [K, K], the same on all ranks: X^T X from the one that has the first micro-batch, W^T W of all shards."""
    if operand == "w":
        gram = layer.gram()
        if dist.is_initialized():
            dist.broadcast(gram, src=0)
        return gram
    weight = local(layer.weight).float()
    gram = weight.t() @ weight
    for group in shard_groups(layer.weight):
        dist.all_reduce(gram, group=group)
    return gram
