"""Hooks by name, and the ones of a run: its model's, its recipe's and its configuration's, in this order.

A new hook is one file beside this one (base.py says what it may do) and one line in HOOKS.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from quant.plan import Plan
from training.config import OptimSection
from training.hooks.base import Hook, Run
from training.hooks.ema import Ema
from training.hooks.feedback import Feedback
from training.hooks.normalize import Normalize
from training.hooks.osci_reset import OsciReset
from training.hooks.train_only import TrainOnly
from training.options import read_options

HOOKS: dict[str, type[Hook]] = {
    "ema": Ema,
    "feedback": Feedback,
    "normalize": Normalize,
    "osci_reset": OsciReset,
    "train_only": TrainOnly,
}


def read(model: nn.Module, plan: Plan, *wanted: Mapping[str, Any]) -> dict[str, Any]:
    """{name: checked options} of what model, recipe and configuration ask for, each {name: {option: value}}.

    Raises ValueError for an unknown hook or option, a wrong value, what doesn't fit the model (it may lie on the meta
    device), one hook that is wanted in two ways, and two that undo each other's work.
    """
    found: dict[str, Any] = {}
    for some in wanted:
        for name, values in some.items():
            options = read_options("hooks", HOOKS, name, values)
            if found.setdefault(name, options) != options:
                raise ValueError(
                    f"hooks.{name}: wanted with {asdict(found[name])} and with {asdict(options)}; leave one of them out"
                )
    for name, options in found.items():
        for other in HOOKS[name].never_with.keys() & found.keys():
            raise ValueError(f"hooks.{name} beside {other}: {HOOKS[name].never_with[other]}; leave hooks.{name} out")
        HOOKS[name].check(options, model, plan)
    for recipe in plan.recipes:
        if recipe.hook and recipe.hook not in found:
            raise ValueError(f"recipe {recipe.name} needs a hook that isn't there; add +hooks.{recipe.hook}={{}}")
    return found


def of_optimizer(section: OptimSection) -> dict[str, Any]:
    """The hook that optim.train asks for."""
    if section.train is None:
        return {}
    return {"train_only": {"names": tuple(section.train), "start": section.train_from}}


def build(wanted: Mapping[str, Any], run: Run) -> dict[str, Hook]:
    """The hooks of a run; `wanted` is what `read` gives."""
    return {name: HOOKS[name](options, run) for name, options in wanted.items()}


def numerics(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """For a run's identity, as run.json gives it back; {} without hooks, so that runs older than hooks keep their
    hash."""
    found = {name: asdict(options) or True for name, options in wanted.items()}
    return {"hooks": json.loads(json.dumps(found))} if found else {}


def bytes_per_parameter(wanted: Mapping[str, Any]) -> float:
    """What the state of the hooks takes."""
    return sum(HOOKS[name].bytes_per_parameter for name in wanted)
