"""Oscillation reset of TetraJet-v2, with its numbers scaled to runs of some 3,000 steps.

A weight near the border between two codes flips between them step after step while it hardly moves. In the first
`window` steps of each period the ways of each weight and of its quantized value Q(w) are summed, both rounded to BF16,

    travel_w = sum |w_t - w_(t-1)|      travel_q = sum |Q(w_t) - Q(w_(t-1))|

and after the last of them a weight with travel_q >= ratio * travel_w > 0 is set to Q(w). Q is the quantizer of fprop.w
over the whole weight: its amax is that of all shards. Moments stay. Layers whose fprop doesn't quantize W, rotates it
or draws random bits for it are left out.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels import quantize as ops
from quant.held import fixed_or
from quant.plan import Plan, quant_linears
from training.hooks.base import Hook, Run, keep_where
from training.ranks.distributed import local, shard_groups

TILE = 16  # rows of a square block


@dataclass(frozen=True)
class OsciResetOptions:
    """`start`: share of the run. `period` and `window` in steps."""

    start: float = 0.6
    period: int = 100
    window: int = 50
    ratio: float = 8.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= 1.0:
            raise ValueError(f"hooks.osci_reset.start={self.start}: needs a share of the run from 0 to 1")
        if not 1 <= self.window < self.period:
            raise ValueError(
                f"hooks.osci_reset.window={self.window}: needs a number of steps below period={self.period}"
            )
        if not self.ratio > 0:
            raise ValueError(f"hooks.osci_reset.ratio={self.ratio}: needs a positive number")


class OsciReset(Hook):
    Options = OsciResetOptions
    bytes_per_parameter = 12.0  # two BF16 copies, two FP32 sums
    never_with: ClassVar = {
        "normalize": "a weight set to a code changes the length that normalize gave its row or column"
    }

    def __init__(self, options: OsciResetOptions, run: Run):
        super().__init__(options, run)
        self._first = math.ceil(options.start * run.steps)
        self._layers = {name: layer for name, layer in quant_linears(run.model).items() if takes_part(layer.recipe)}
        for name, layer in self._layers.items():
            if spec_of(layer).is_square and len(local(layer.weight)) % TILE:
                raise ValueError(f"hooks.osci_reset: a rank's rows of {name} cut a 16x16 block; use parallel=ddp")
        self._state: dict[str, Tensor] = {}

    @classmethod
    def check(cls, options: OsciResetOptions, model: nn.Module, plan: Plan) -> None:
        if not any(map(takes_part, plan.recipes)):
            raise ValueError("hooks.osci_reset: no layer's fprop rounds W to the nearest code; leave the hook out")

    def state(self, step: int) -> dict[str, Tensor]:
        place = self._place(step - 1)
        return self._tensors() if place is not None and place < self.options.window else {}

    @torch.no_grad()
    def after_step(self, step: int, skip: Tensor) -> None:
        place = self._place(step)
        if place is None:
            return
        state, keep = self._tensors(), partial(keep_where, skip)
        # A window whose first step was skipped begins with the next one.
        begins = torch.ones_like(state["open"]) if place == 0 else 1 - state["open"]
        for (name, layer), whole in zip(self._layers.items(), largest_of(list(self._layers.values())), strict=True):
            weight = local(layer.weight)
            snapped = quantized(layer, weight, whole)
            now = {"w": weight.to(torch.bfloat16), "q": snapped.to(torch.bfloat16)}
            travels = {}
            for key, value in now.items():
                before, travel = (local(state[f"{name}.{kind}_{key}"]) for kind in ("prev", "travel"))
                moved = travel + (value.float() - before.float()).abs()
                travels[key] = torch.where(begins > 0, torch.zeros_like(travel), moved)
                keep(travel, travels[key])
                keep(before, value)
            if place == self.options.window:
                flips = (travels["w"] > 0) & (travels["q"] >= self.options.ratio * travels["w"])
                keep(weight, torch.where(flips, snapped, weight))
        keep(state["open"], torch.full_like(begins, float(place < self.options.window)))

    def _place(self, step: int) -> int | None:
        """0 where a window begins, window where it ends; None outside of all."""
        place = (step - self._first) % self.options.period
        return place if step >= self._first and place <= self.options.window else None

    def _tensors(self) -> dict[str, Tensor]:
        """Made at the first window."""
        if not self._state:
            for name, layer in self._layers.items():
                weight = layer.weight.detach()
                for key in ("w", "q"):
                    self._state[f"{name}.prev_{key}"] = torch.zeros_like(weight, dtype=torch.bfloat16)
                    self._state[f"{name}.travel_{key}"] = torch.zeros_like(weight)
            self._state["open"] = torch.zeros((), device=local(weight).device)
        return self._state


def largest_of(layers: list[nn.Module]) -> list[Tensor]:
    """The amax of each whole weight; one exchange for all of them where weights are sharded. A scale per row is of
    rows, which no shard cuts."""
    found = [ops.amax(local(layer.weight).to(torch.bfloat16), 1, None, spec_of(layer).per_row) for layer in layers]
    shared = [number for number, one in enumerate(found) if one.ndim == 0]
    for group in shard_groups(layers[0].weight) if shared else ():
        packed = torch.stack([found[number] for number in shared])
        dist.all_reduce(packed, dist.ReduceOp.MAX, group=group)
        for number, one in zip(shared, packed, strict=True):
            found[number] = one
    return [fixed_or(layer.recipe.operand("fprop.w").amax, one) for layer, one in zip(layers, found, strict=True)]


def spec_of(layer: nn.Module) -> Any:
    return layer.recipe.operand("fprop.w").spec


def takes_part(recipe: Any) -> bool:
    operand = recipe.operands().get("fprop.w")
    if operand is None or not operand.is_quantized or operand.spec.draws_random_bits:
        return False
    return recipe.gemm("fprop").rotation_dim is None


def quantized(layer: nn.Module, weight: Tensor, largest: Tensor) -> Tensor:
    """Q(W) as FP32, W a rank's rows."""
    made = ops.quantize(weight.to(torch.bfloat16), spec_of(layer), 1, largest, None, None, ("values",))
    values = made.values.float()
    return values if made.scale is None else values * made.scale
