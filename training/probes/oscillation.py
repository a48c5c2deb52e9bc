"""How weights go back and forth between codes: flips, and how near the border of two codes the master weights lie.

In the last `window` steps before every `every`-th one the code of each weight is compared with that of the step before,
and at the end with that of the look before. A code is the level of the grid that fprop.w rounds to, so that it flips,
too, where a block's scale or its member of a family changes. As for hooks.osci_reset, whose quantity this is (after
TetraJet-v2), layers whose fprop doesn't round W to the nearest code are left out. Nothing is stored: after a resume the
first row lacks what needs an earlier code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.quantize import reference_impl as reference
from kernels.quantize.blocks import quantize_blocks
from kernels.spec import QuantSpec
from quant.linear import QuantLinear
from quant.plan import Plan, quant_linears
from training.hooks.osci_reset import largest_of, spec_of, takes_part
from training.probes.base import Coming, Context, Probe
from training.ranks.distributed import local, shard_groups
from training.start.memory import GIB, MemoryEstimate

BINS = 10
NEAR = 0.05  # of the way between two levels
BYTES = 2  # a weight: its code now and at the last look


@dataclass(frozen=True)
class OscillationOptions:
    """In steps."""

    every: int = 200
    window: int = 10

    def __post_init__(self) -> None:
        for name, least in (("every", 2), ("window", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"probes.oscillation.{name}={value!r}: needs a whole number of at least {least}")
        if self.window >= self.every:
            raise ValueError(f"probes.oscillation.window={self.window}: needs to be below every={self.every}")


class Oscillation(Probe):
    Options = OscillationOptions

    def __init__(self, options: OscillationOptions):
        super().__init__(options)
        self._codes: dict[str, Tensor] = {}  # of the step before
        self._reported: dict[str, Tensor] = {}
        self._flips: list[Tensor] = []  # [layers] of each step of the window
        self._at: int | None = None  # the step before, unless a resume or a rollback came between

    @classmethod
    def fit(cls, options: OscillationOptions, coming: Coming) -> OscillationOptions:
        if not any(has_codes(recipe) for plan in coming.plans for recipe in plan.recipes):
            raise ValueError("probes.oscillation: no layer's fprop rounds W to the nearest 4-bit code; leave it out")
        if options.every > coming.numbers.steps:
            steps = coming.numbers.steps
            raise ValueError(f"probes.oscillation.every={options.every}: the run has {steps} steps; choose fewer")
        return options

    @classmethod
    def memory(cls, options: Any, plan: Plan, of: Callable[..., MemoryEstimate], graphed: bool) -> MemoryEstimate:
        weights = sum(entry.shape[0] * entry.shape[1] for entry in plan.entries if has_codes(entry.recipe))
        return MemoryEstimate(of(plan).parts | {"codes": BYTES * weights / GIB})

    def due(self, step: int) -> bool:
        return step > 0 and (step + self.options.window) % self.options.every <= self.options.window

    @torch.no_grad()
    def rows(self, context: Context) -> list[dict[str, Any]]:
        place = (context.step + self.options.window) % self.options.every
        layers = {name: layer for name, layer in quant_linears(context.model).items() if is_whole(layer)}
        weights = {name: local(layer.weight) for name, layer in layers.items()}
        largest = dict(zip(layers, largest_of(list(layers.values())), strict=True))
        found = {name: coded(weights[name], spec_of(layer), largest[name]) for name, layer in layers.items()}
        before, self._codes = self._codes, {name: codes for name, (codes, _) in found.items()}
        if place == 0 or self._at != context.step - 1 or before.keys() != self._codes.keys():
            self._flips = []
        else:
            self._flips.append(counted([before[name] != codes for name, codes in self._codes.items()], layers))
        self._at = context.step
        if place < self.options.window:
            return []
        return [self._row(context, layers, {name: distance for name, (_, distance) in found.items()})]

    def _row(self, context: Context, layers: dict[str, Any], distances: dict[str, Tensor]) -> dict[str, Any]:
        sizes = [layer.weight.numel() for layer in layers.values()]
        flips = torch.stack(self._flips).double().mean(0).tolist() if self._flips else None
        reported, self._reported = self._reported, self._codes
        known = reported.keys() == self._codes.keys()
        gone = counted([reported[name] != codes for name, codes in self._codes.items()], layers) if known else None
        bins = [(distance * (2 * BINS)).clamp(max=BINS - 1).long() for distance in distances.values()]
        shares = torch.stack([counted([one == number for one in bins], layers) for number in range(BINS)]).tolist()
        near = counted([distance < NEAR for distance in distances.values()], layers).tolist()
        rows = {
            name: {
                "flipped": None if gone is None else int(gone[number]) / size,
                "flips_per_step": None if flips is None else flips[number] / size,
                "near": near[number] / size,
                "distance": [share[number] / size for share in shares],
            }
            for number, (name, size) in enumerate(zip(layers, sizes, strict=True))
        }
        tokens = context.step * context.numbers.tokens_per_step
        return {"kind": "oscillation", "tokens": tokens, "window": len(self._flips), "layers": rows}


def has_codes(recipe: Any) -> bool:
    return takes_part(recipe) and recipe.operand("fprop.w").spec.is_blocked


def is_whole(layer: QuantLinear) -> bool:
    """Whether a rank's rows of its weight have codes of their own: shards may cut square blocks."""
    return has_codes(layer.recipe) and not (spec_of(layer).is_square and shard_groups(layer.weight))


def counted(where: list[Tensor], layers: dict[str, Any]) -> Tensor:
    """int64 [layers]: how often each is true, over all ranks that share the weights."""
    counts = torch.stack([one.sum() for one in where])
    for group in shard_groups(next(iter(layers.values())).weight):
        dist.all_reduce(counts, group=group)
    return counts


def coded(weight: Tensor, spec: QuantSpec, largest: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes of W [N, K] (or a rank's rows), and FP32 how far each weight is from the nearest border between two
    levels, in units of the gap between these: at most 0.5 within the grid."""
    scale = reference.tensor_scale(largest, spec)
    blocks = quantize_blocks(reference.stored(weight.to(torch.bfloat16), 1, None), spec, scale, None, None)
    codes = torch.zeros_like(blocks.codes, dtype=torch.uint8)
    distance = torch.zeros_like(blocks.codes)
    for number, grid in enumerate(spec.family.members):
        levels = torch.tensor(grid.levels, device=weight.device)
        borders, gaps = (levels[1:] + levels[:-1]) / 2, levels.diff()
        place = torch.bucketize(blocks.codes, borders)
        # The nearest border is one of the two beside the level.
        sides = [(place + side).clamp(0, len(borders) - 1) for side in (-1, 0)]
        found = torch.stack([(blocks.elements - borders[at]).abs() / gaps[at] for at in sides]).amin(0)
        here = torch.tensor(True, device=weight.device) if blocks.members is None else blocks.members == number
        codes = torch.where(here, (place + 16 * number).to(torch.uint8), codes)
        distance = torch.where(here, found, distance)
    return codes.view(weight.shape), distance.view(weight.shape)
