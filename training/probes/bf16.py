"""The loss of the same weights without quantization: what the recipe's forward costs at this moment."""

from quant.plan import quant_linears, unquantized
from training.probes.base import Context, Probe


class Bf16(Probe):
    at_evaluation = True

    def scores(self, context: Context) -> dict[str, float]:
        evaluation = context.evaluation
        if not any(layer.recipe.is_quantized for layer in quant_linears(context.model).values()):
            return {"loss_bf16": evaluation.evalset.summary(evaluation.nats)["loss"]}  # the same forward
        with unquantized(context.model):
            return {"loss_bf16": evaluation.score()["loss"]}
