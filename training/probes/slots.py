"""Clipping and underflow of every operand slot on the first batch of an evaluation, forward and backward."""

from typing import Any

import torch

from quant.stats import slot_stats
from training.probes.base import Context, Probe


class Slots(Probe):
    """One row: {layer: {slot: {counter: number}}} (quant/stats.py)."""

    at_evaluation = True

    def rows(self, context: Context) -> list[dict[str, Any]]:
        evalset, micro = context.evaluation.evalset, context.numbers.micro
        # A whole micro-batch, repeating sequences if there are fewer: its size must divide as in training.
        tokens = evalset.samples(0, min(micro, evalset.sequences))
        tokens = tokens[torch.arange(micro) % len(tokens)].to(context.ranks.device)

        def step() -> None:
            context.set_rng(context.step, 0)
            context.loss(tokens).backward()

        context.release()
        return [{"kind": "slots", "slots": slot_stats(context.model, step)}]
