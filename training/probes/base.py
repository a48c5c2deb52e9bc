"""What a probe is: something that looks at a run while it trains, and changes nothing that the run computes.

A probe is one file of this folder and one line of the table in __init__.py. There are two kinds:

- of steps: asked `due(step)` after every step; its rows are written, and its state is changed, before that step's
  checkpoint is saved.
- of evaluations (`at_evaluation`): asked where the model has just been scored, which is after the checkpoint. `scores`
  adds numbers to the evaluation's own row, `rows` gives rows that follow it. It changes no state of its own.

A probe may run forwards and backwards: the gradients it leaves are dropped, and the random state is set anew before
each micro-batch. On every rank alike, since a forward is a collective where weights are sharded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from data.evalset import EvalSet
from quant.plan import Plan
from training.hooks.base import Hook
from training.options import NoOptions
from training.ranks.distributed import Dist
from training.start.derive import Numbers
from training.start.memory import MemoryEstimate


@dataclass(frozen=True)
class Evaluation:
    """What was scored. `nats`: FP64, one per segment of `evalset`. `again()` does it once more, under what the caller
    has changed meanwhile."""

    evalset: EvalSet
    nats: np.ndarray
    again: Callable[[], np.ndarray]

    def score(self) -> dict[str, float | None]:
        """{loss, bpb, se} of `again`."""
        return self.evalset.summary(self.again())


@dataclass(frozen=True)
class Coming:
    """A run before it begins. `model`: on the meta device, plain linears. `plans`: all that some step computes by."""

    model: nn.Module
    plans: Sequence[Plan]
    numbers: Numbers


@dataclass(frozen=True)
class Context:
    """What a probe may look at. `loss`: tokens int [B, T+1] -> summed nats, around `model`.

    `batches(first step)`: this rank's training micro-batches, int64 on the device. `set_rng(step, micro-batch)`: the
    random state of what runs next. `accumulate(last micro-batch?)`: the context of a forward and its backward.
    `release()`: gives back captured CUDA graphs, before something else needs as much memory. `graphs`: whether training
    replays such, so that a probe may. `folder`: the run's, for what is too large for a row (base/runfolder.py).
    """

    step: int
    folder: Path
    loss: nn.Module
    numbers: Numbers
    ranks: Dist
    hooks: Mapping[str, Hook]
    batches: Callable[[int], Iterator[Tensor]]
    set_rng: Callable[[int, int], None]
    accumulate: Callable[[bool], AbstractContextManager]
    release: Callable[[], None]
    graphs: bool = False
    evaluation: Evaluation | None = None

    @property
    def model(self) -> nn.Module:
        return self.loss.model


class Probe:
    """Sees nothing. `Options`: a frozen dataclass whose fields are the probe's keys in a configuration."""

    Options: type = NoOptions
    at_evaluation = False

    def __init__(self, options: Any):
        self.options = options

    @classmethod
    def fit(cls, options: Any, coming: Coming) -> Any:
        """The options as they hold for a run. Raises ValueError, before any work, where they don't fit it."""
        return options

    @classmethod
    def cost(cls, options: Any, numbers: Numbers, plan: Plan, graphed: bool) -> str | None:
        """A line of the start screen, of a probe that takes time worth a word."""
        return None

    def spent(self) -> str | None:
        """A line of the run's end, of what `cost` foretold."""
        return None

    @classmethod
    def memory(
        cls, options: Any, plan: Plan, of: Callable[..., MemoryEstimate], graphed: bool
    ) -> MemoryEstimate | None:
        """What is expected while it looks, if that may be more than a step takes. `of`: of a step by
        a plan, with micro-batches of so many tokens if that is said."""
        return None

    def due(self, step: int) -> bool:
        """Whether to look after `step` completed steps; a function of the options and of the step."""
        return True

    def scores(self, context: Context) -> dict[str, float]:
        """Fields of the evaluation's row, loss_<name> for losses in nats per token."""
        return {}

    def rows(self, context: Context) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl: {"kind": ..., ...}; step and time are added."""
        return []

    def caution(self, rows: list[dict[str, Any]]) -> str | None:
        """A warning for whoever watches the run, of what `rows` showed; told once."""
        return None

    def state(self, step: int) -> dict[str, Tensor]:
        """As a hook's (training/hooks/base.py), stored as probes.<name>.<key>. A checkpoint of a run without this probe
        leaves it as it begins."""
        return {}
