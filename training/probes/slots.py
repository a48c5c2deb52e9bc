"""Every operand slot on the first batch of an evaluation, forward and backward: what is clipped and lost, and where
errors come from."""

from math import isfinite
from typing import Any

import torch

from quant.decompose import decompose
from quant.stats import count_operand, slot_stats
from training.probes.base import Context, Probe


class Slots(Probe):
    """One row: {layer: {slot: {counter: number}}} (quant/stats.py)."""

    at_evaluation = True
    kind, measure = "slots", staticmethod(count_operand)

    def rows(self, context: Context) -> list[dict[str, Any]]:
        evalset, micro = context.evaluation.evalset, context.numbers.micro
        # A whole micro-batch, repeating sequences if there are fewer: its size must divide as in training.
        tokens = evalset.samples(0, min(micro, evalset.sequences))
        tokens = tokens[torch.arange(micro) % len(tokens)].to(context.ranks.device)

        def step() -> None:
            context.set_rng(context.step, 0)
            context.loss(tokens).backward()

        context.release()
        return [{"kind": self.kind, self.kind: slot_stats(context.model, step, self.measure)}]

    def caution(self, rows: list[dict[str, Any]]) -> str | None:
        """Of slots whose amax is fixed below what they saw."""
        found = [
            f"{layer} {slot}"
            for row in rows
            for layer, slots in row[self.kind].items()
            for slot, counts in slots.items()
            if counts.get("beyond_amax")
        ]
        if not found:
            return None
        slot = found[0].split()[-1]
        others = f" and {len(found) - 1} other slots" if len(found) > 1 else ""
        return (
            f"warning: {found[0]}{others} saw elements beyond their fixed amax, which are clipped; set "
            f"quant.{slot}.amax=exact (a fixed amax is for models that bound what a layer multiplies, such as ngpt_30m)"
        )


class Errors(Slots):
    """One row: {layer: {slot: {term: number}}} (quant/decompose.py); null where a number isn't finite. In FP64."""

    kind, measure = "errors", staticmethod(decompose)

    def rows(self, context: Context) -> list[dict[str, Any]]:
        (row,) = super().rows(context)
        for slots in row["errors"].values():
            for slot, found in slots.items():
                slots[slot] = {name: value if isfinite(value) else None for name, value in found.items()}
        return [row]
