"""Precision phases: for a part of a run's steps every layer multiplies by another recipe.

    quant.phases: [{from: .85, to: 1, share: 1, seed: 0, set: {fprop: none}}]

`set` is an override tree in the form of a recipe file. It is merged into the recipe of every layer, but for layers
that a rule or quant.high_precision keeps unquantized. `from` and `to` are shares of the whole run: the first step
(counted in completed steps) is ceil(from * steps), the last one lies before ceil(to * steps). With a `share` below 1
each of these steps has that chance, drawn by a counter from `seed`. `add_sources`: where the phase leaves a GEMM of the
backward without the codes of fprop that it reuses, it takes its operand from the input.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from base.words import suggestion
from quant import library
from quant.names import FPROP_SLOT, GEMMS, unquantized
from quant.plan import Entry, Plan, Precision, Rule, resolve

DEFAULTS = {"from": 0.0, "to": 1.0, "share": 1.0, "seed": 0, "add_sources": False, "set": None}
EXAMPLE = "'[{from: .85, set: {fprop: none}}]'"


@dataclass(frozen=True)
class Phase:
    """Steps `first` to `end` - 1 of a run, or a drawn `share` of them, run under `plan`."""

    first: int
    end: int
    share: float
    seed: int
    plan: Plan

    def covers(self, step: int) -> bool:
        return self.first <= step < self.end

    def acts(self, step: int) -> bool:
        """Whether step `step` (from 0) runs under it; the same whoever asks, whenever."""
        return self.covers(step) and (self.share == 1 or _draw(self.seed, step) < self.share)

    @property
    def count(self) -> int:
        """How many steps run under it."""
        return sum(map(self.acts, range(self.first, self.end)))

    def __str__(self) -> str:
        drawn = f", {self.count} of them drawn from seed {self.seed}" if self.share < 1 else ""
        return f"steps {self.first} to {self.end - 1}{drawn}: {self.plan.label}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for plan.json and run.json."""
        drawn = {"share": self.share, "seed": self.seed} if self.share < 1 else {}
        return {"first": self.first, "end": self.end, **drawn, "steps": self.count, "label": self.plan.label}


def scored(phases: Sequence[Phase], step: int) -> int:
    """The number (from 1) of the phase that a model is scored under after `step` completed steps, or 0: that of the
    last step. A drawn share of the steps never decides it, or a curve would jump between two recipes."""
    found = (number for number, phase in enumerate(phases, 1) if phase.share == 1 and phase.covers(step - 1))
    return next(found, 0)


def phases_of(model: nn.Module, mapping: Mapping[str, Any], plan: Plan, steps: int) -> tuple[Phase, ...]:
    """The phases of the whole `quant` group, each with its plan over `model`; `plan`: the one outside of them.

    Raises ValueError, in one line that says what to type, for phases that overlap, that cover no step or change no
    layer, and for sources that a phase takes away.
    """
    given = mapping.get("phases") or ()
    if not isinstance(given, list | tuple):
        raise ValueError(f"quant.phases: got {given!r}; write {EXAMPLE}")
    phases: list[Phase] = []
    for number, one in enumerate(given):
        where = f"quant.phases[{number}]"
        values = _read(where, one)
        first, end = math.ceil(values["from"] * steps), math.ceil(values["to"] * steps)
        if first >= end:
            raise ValueError(f"{where}: from={values['from']:g} to={values['to']:g} holds none of {steps} steps")
        if phases and first < phases[-1].end:
            raise ValueError(
                f"{where}: begins at step {first}, before the phase that precedes it ends ({phases[-1].end}); give "
                "them in order, each from where the last one's `to` is or later"
            )
        other = _plan(where, model, mapping, values)
        _check_change(where, plan, other)
        phases.append(Phase(first, end, float(values["share"]), values["seed"], other))
    return tuple(phases)


def _read(where: str, one: Any) -> dict[str, Any]:
    if not isinstance(one, Mapping) or not isinstance(one.get("set"), Mapping) or not one["set"]:
        raise ValueError(f"{where}: got {one!r}; write {EXAMPLE}")
    for key in one:
        if key not in DEFAULTS:
            raise ValueError(f"{where}: unknown key {key!r}{suggestion(key, DEFAULTS, f'keys: {list(DEFAULTS)}')}")
    for key in one["set"]:
        if key in ("name", *library.PLAN_KEYS):
            raise ValueError(f"{where}.set: {key} belongs to the whole run; set what a GEMM does, as in {EXAMPLE}")
    values = DEFAULTS | dict(one)
    for key in ("from", "to", "share"):
        if type(values[key]) not in (int, float) or not 0 <= values[key] <= 1:
            raise ValueError(f"{where}.{key}={values[key]!r}: needs a share from 0 to 1, of the whole run's steps")
    if type(values["seed"]) is not int or values["seed"] < 0:
        raise ValueError(f"{where}.seed={values['seed']!r}: needs a whole number of at least 0")
    if not values["share"]:
        raise ValueError(f"{where}.share=0 takes no step; leave the phase out")
    if type(values["add_sources"]) is not bool:
        raise ValueError(f"{where}.add_sources={values['add_sources']!r}: needs true or false")
    return values


def _plan(where: str, model: nn.Module, mapping: Mapping[str, Any], values: dict[str, Any]) -> Plan:
    """The plan of the whole `quant` group with `set` merged in."""

    def change(recipe: Mapping[str, Any]) -> Any:
        merged = merge(recipe, values["set"])
        try:
            return library.build(merged)
        except ValueError as error:
            lost = lost_sources(merged)
            if not lost:
                raise ValueError(f"{where}: {error}") from None
        for slot in lost:
            gemm, operand = slot.split(".")
            if not values["add_sources"]:
                raise ValueError(
                    f"{where}: {slot} of {recipe.get('name')} reuses fprop's codes, which this phase doesn't make; add "
                    f"{gemm}: {{{operand}: {{source: input}}}} to its set, or add_sources: true to the phase"
                )
            merged[gemm][operand]["source"] = "input"
        try:
            return library.build(merged)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    usual = Precision.from_dict(mapping)
    names = [str(rule["recipe"]) for rule in mapping.get("rules") or ()]
    rules = tuple(
        Rule(rule.match, change(library.mapping(name)) if rule.recipe.is_quantized else rule.recipe)
        for rule, name in zip(usual.rules, names, strict=True)
    )
    ends = usual.high_precision_first, usual.high_precision_last
    return resolve(model, Precision(change(mapping), rules, *ends))


def merge(recipe: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's mapping with an override tree laid over it. A GEMM `none` keeps the recipe's own sources."""
    merged = _deep(recipe, over)
    for gemm in GEMMS:
        if merged.get(gemm) == "none":
            merged[gemm] = unquantized(gemm, recipe[gemm] if isinstance(recipe.get(gemm), Mapping) else {})
    return merged


def _deep(under: Any, over: Any) -> Any:
    if not (isinstance(under, Mapping) and isinstance(over, Mapping)):
        return over
    return {key: _deep(under.get(key), over[key]) if key in over else under[key] for key in under | over}


def lost_sources(recipe: Mapping[str, Any]) -> list[str]:
    """Slots that reuse fprop's codes where fprop makes none of their kind."""
    lost = []
    for slot, made in FPROP_SLOT.items():
        gemm, name = slot.split(".")
        if not all(isinstance(recipe.get(key), Mapping) for key in (gemm, "fprop")):
            continue  # no six slots
        reused, fprop = recipe[gemm].get(name) or {}, recipe["fprop"].get(made) or {}
        same = [reused.get(key) == fprop.get(key) for key in ("grid", "scales")]
        if reused.get("source") == "fprop_transposed" and reused.get("grid") != "none" and not all(same):
            lost.append(slot)
    return lost


def _check_change(where: str, plan: Plan, other: Plan) -> None:
    pairs: list[tuple[Entry, Entry]] = list(zip(plan.entries, other.entries, strict=True))
    if all(one.recipe == two.recipe for one, two in pairs):
        raise ValueError(f"{where}: its set changes no layer's recipe; leave the phase out")
    for one, two in pairs:
        if type(one.recipe) is not type(two.recipe):
            raise ValueError(
                f"{where}: {one.name} would become another kind of layer ({library.label(two.recipe)} after "
                f"{library.label(one.recipe)}); a phase changes what a recipe's GEMMs do, a fork (fork=RUN@STEP "
                "quant=...) the recipe"
            )
        if more := two.recipe.module_state() - one.recipe.module_state():
            raise ValueError(
                f"{where}: {one.name} is built for {library.label(one.recipe)} and lacks what "
                f"{library.label(two.recipe)} needs ({', '.join(map(str, sorted(more, key=str)))}); let the run begin "
                "with it and leave it out in a phase, or use a fork (fork=RUN@STEP quant=...)"
            )


def _draw(seed: int, step: int) -> float:
    """A number in [0, 1) that (seed, step) stand for."""
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def numerics(phases: tuple[Phase, ...], numerics_of: Any) -> dict[str, Any]:
    """For a run's identity, where there are phases. `numerics_of`: what the hash covers of a plan."""
    found = {}
    for number, phase in enumerate(phases):
        steps = {key: value for key, value in phase.to_dict().items() if key not in ("steps", "label")}
        found[str(number)] = {**steps, **numerics_of(phase.plan)}
    return {"phases": found} if found else {}
