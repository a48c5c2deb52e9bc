"""The loss under the weights that hooks offer beside the model's own, such as their moving average (`loss_ema`)."""

from training.probes.base import Context, Probe


class OtherWeights(Probe):
    at_evaluation = True

    def scores(self, context: Context) -> dict[str, float]:
        found = {}
        for name, hook in context.hooks.items():
            if (other := hook.weights(context.step)) is not None:
                with other:
                    found[f"loss_{name}"] = context.evaluation.score()["loss"]
        return found
