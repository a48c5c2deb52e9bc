"""What the linear layers multiply at the run's end: capture/<step> in the run folder (training/capture.py)."""

from typing import Any

from base.runfolder import CAPTURE, RUN, read_json
from training.capture import capture, save
from training.probes.base import Context, Probe


class Capture(Probe):
    """At the last evaluation only, which is after the last checkpoint; writes files and no rows."""

    at_evaluation = True

    def rows(self, context: Context) -> list[dict[str, Any]]:
        if context.step < context.numbers.steps:
            return []

        def step(tokens) -> None:
            context.set_rng(context.step, 0)
            context.loss(tokens.to(context.ranks.device)).backward()

        context.release()
        found = capture(context.model, context.evaluation.evalset, context.numbers.micro, step)
        if context.ranks.is_main:
            folder = context.folder / CAPTURE / str(context.step)
            save(folder, read_json(context.folder / RUN), context.step, context.model, *found)
        return []
