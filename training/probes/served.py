"""The final weights under other forwards than the one that trained them (training/served.py): evaluate.served."""

import torch

from quant.plan import Plan, replaced
from training.probes.base import Context, Probe
from training.served import FORWARDS, OWN, Scored, all_forwards
from training.start.derive import Numbers


class Served(Probe):
    """At the last evaluation only; writes score/<step>.json and .npz, as scripts/score.py does."""

    at_evaluation = True

    @classmethod
    def cost(cls, options: object, numbers: Numbers, plan: Plan, graphed: bool) -> str:
        return f"served: {len(FORWARDS)} more passes over the final evaluation, uncompiled"

    def scores(self, context: Context) -> dict[str, float]:
        if context.step < context.numbers.steps:
            return {}
        nats = {OWN: context.evaluation.nats}
        # Each would be compiled for one pass.
        with torch.compiler.set_stance("force_eager"):
            for name, recipes in all_forwards(context.model, ()).items():
                with replaced(context.model, recipes):
                    nats[name] = context.evaluation.again()
        scored = Scored(context.step, context.evaluation.evalset, nats)
        if context.ranks.is_main:
            scored.save(context.folder)
        return {f"loss_{name}": scored.evalset.summary(nats[name])["loss"] for name in FORWARDS}
