"""Probes by name, and the ones of a run.

A new probe is one file beside this one (base.py says what it may do) and one line in PROBES. `probes.<name>={}` or
`probes.<name>.<option>=...` asks for it; it is no part of a run's identity.
"""

from collections.abc import Mapping
from typing import Any

from quant.plan import Plan
from training.config import TrainConfig
from training.options import read_options
from training.probes.base import Coming, Probe
from training.probes.bf16 import Bf16
from training.probes.capture import Capture
from training.probes.oscillation import Oscillation
from training.probes.other_weights import OtherWeights
from training.probes.served import Served
from training.probes.slots import Errors, Slots
from training.probes.xray import Xray
from training.start.derive import Numbers

PROBES: dict[str, type[Probe]] = {
    "bf16": Bf16,
    "served": Served,
    "other_weights": OtherWeights,
    "slots": Slots,
    "errors": Errors,
    "capture": Capture,
    "xray": Xray,
    "oscillation": Oscillation,
}


def read(config: TrainConfig, coming: Coming, is_quantized: bool, has_hooks: bool) -> dict[str, Any]:
    """{name: checked options} in the order in which they are asked. `evaluate.bf16`, `served` and `slots` ask for
    the probes of these names; slots are counted where there is something to count."""
    asked: dict[str, Mapping[str, Any]] = {}
    if config.evaluate.bf16:
        asked["bf16"] = {}
    if config.evaluate.served:
        asked["served"] = {}
    if has_hooks:
        asked["other_weights"] = {}
    if config.evaluate.slots and is_quantized:
        asked["slots"] = {}
    asked |= config.probes
    options = {name: read_options("probes", PROBES, name, values) for name, values in asked.items()}
    return {name: PROBES[name].fit(given, coming) for name, given in options.items()}


def build(wanted: Mapping[str, Any]) -> dict[str, Probe]:
    """The probes of a run; `wanted` is what `read` gives."""
    return {name: PROBES[name](options) for name, options in wanted.items()}


def costs(wanted: Mapping[str, Any], numbers: Numbers, plan: Plan, graphed: bool) -> list[str]:
    """Lines for the start screen."""
    told = (PROBES[name].cost(options, numbers, plan, graphed) for name, options in wanted.items())
    return [line for line in told if line]
