"""Switches the layers to the recipes of the phase that a step, or an evaluation, belongs to (quant/phases.py)."""

from collections.abc import Callable, Sequence

from quant.phases import Phase, scored
from quant.plan import Plan
from training.hooks.base import Hook, Run
from training.options import NoOptions


class Phases(Hook):
    """`plan`: outside of the phases."""

    def __init__(self, plan: Plan, phases: Sequence[Phase], run: Run):
        super().__init__(NoOptions(), run)
        self._plans = [plan, *(phase.plan for phase in phases)]
        self._phases = phases
        self._now = 0  # which of the plans the layers run under
        self._kept = 0  # which phase's graphs may be there: 0 outside of all

    def before_step(self, step: int) -> None:
        covering = self._find(lambda phase: phase.covers(step))
        if covering != self._kept:
            self.run.micro_batch.release()  # what the last phase captured isn't needed again
            self._kept = covering
        self._assign(self._find(lambda phase: phase.acts(step)))
        self.run.micro_batch.use(self._now)

    def before_evaluation(self, step: int) -> None:
        self._assign(scored(self._phases, step))

    def _find(self, holds: Callable[[Phase], bool]) -> int:
        return next((number for number, phase in enumerate(self._phases, 1) if holds(phase)), 0)

    def _assign(self, number: int) -> None:
        if number == self._now:
            return
        for entry in self._plans[number].entries:
            self.run.model.get_submodule(entry.name).recipe = entry.recipe
        self._now = number
