"""The loss of the same weights without quantization: what the recipe's forward costs at this moment."""

from quant.plan import unquantized
from training.probes.base import Context, Probe


class Bf16(Probe):
    at_evaluation = True

    def scores(self, context: Context) -> dict[str, float]:
        with unquantized(context.model):
            return {"loss_bf16": context.evaluation.score()["loss"]}
