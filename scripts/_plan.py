"""What xray.py --plan proposes: layers to lift to FP8 or BF16 for a price in predicted time."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quant import library
from quant.plan import Entry, Plan
from quant.product import Product
from scripts import price
from scripts.bench.roofline import Machine
from training.config import TrainConfig
from training.lift import FP8, LAYER
from training.start.describe import Checked

BINS = 1000  # that the budget is counted in


@dataclass(frozen=True)
class Option:
    """`layer` under the recipe of file `recipe`. gain: nats that its forward is foretold to cost less; price:
    milliseconds of a step."""

    layer: str
    recipe: str
    gain: float
    price: float


@dataclass(frozen=True)
class Proposal:
    """`plain`, `before`, `after`: predicted milliseconds of a step in BF16, of the run and of the plan."""

    machine: str
    budget: float
    plain: float
    before: float
    after: float
    chosen: tuple[Option, ...]
    override: str


def budget_of(text: str) -> float:
    """5 of "budget=5%". ValueError for anything else."""
    found = re.fullmatch(r"budget=(\d+(?:\.\d+)?)%", text)
    if not found or not 0 < float(found[1]) <= 100:
        raise ValueError(f"--plan {text}: write --plan budget=5%, the share of a step's predicted time to spend")
    return float(found[1]) / 100


def machine_of(name: str | None, checked: Checked) -> Machine:
    """That of --gpu; without it the one where the run gains most over BF16."""
    machines = {machine.name: machine for machine in price.MACHINES}
    if name is None:
        return max(
            machines.values(), key=lambda machine: plain_ms(checked, machine) / step_ms(checked, checked.plan, machine)
        )
    if name not in machines:
        raise ValueError(f"--gpu {name!r}: choose from {', '.join(machines)}")
    return machines[name]


def step_ms(checked: Checked, plan: Plan, machine: Machine) -> float:
    return price.step_of(checked, plan, machine).total


def plain_ms(checked: Checked, machine: Machine) -> float:
    return step_ms(checked, under(checked.plan, {entry.name: "bf16" for entry in checked.plan.entries}), machine)


def under(plan: Plan, recipes: Mapping[str, str]) -> Plan:
    """The plan with these layers under these recipes."""
    loaded: dict[str, Product] = {name: library.load(name) for name in {*recipes.values()}}

    def exchanged(entry: Entry) -> Entry:
        return replace(entry, recipe=loaded[recipes[entry.name]]) if entry.name in recipes else entry

    return replace(plan, entries=tuple(map(exchanged, plan.entries)))


def propose(config: TrainConfig, found: Mapping[str, Any], budget: float, gpu: str | None) -> Proposal:
    """found: what lift/<step>.json has. ValueError for a run with phases, and where no lift has a gain."""
    checked = price.checked_of(config)
    if checked.phases:
        raise ValueError("--plan is for runs without phases: a rule would hold in all of them")
    machine = machine_of(gpu, checked)
    before, plain = step_ms(checked, checked.plan, machine), plain_ms(checked, machine)
    offered = {name: list(options(checked, found, name, machine, before)) for name in found["layers"]}
    chosen = choose([each for each in offered.values() if each], budget * before)
    if not chosen:
        raise ValueError(f"no lift fits into {budget:.1%} of a step on {machine.name}; give a larger budget")
    after = step_ms(checked, under(checked.plan, {one.layer: one.recipe for one in chosen}), machine)
    return Proposal(machine.name, budget, plain, before, after, chosen, override(config, chosen))


def options(
    checked: Checked, found: Mapping[str, Any], layer: str, machine: Machine, before: float
) -> Iterator[Option]:
    """BF16, and where they are measured FP8 and the run's recipe with its forward in FP8, if there is such a file."""
    alone = found["layers"][layer]["alone"]
    cost = alone[LAYER]["second"]
    gains = {"bf16": cost}
    if FP8 in alone:
        gains[FP8] = cost - alone[FP8]["second"]
        forward = f"{checked.plan.recipe.name}_fp8_fprop"
        gains |= {forward: gains[FP8]} if forward in library.names() else {}
    for recipe, gain in gains.items():
        more = step_ms(checked, under(checked.plan, {layer: recipe}), machine) - before
        if gain > 0:
            yield Option(layer, recipe, gain, more)


def choose(offered: Sequence[Sequence[Option]], budget: float) -> tuple[Option, ...]:
    """At most one option a layer, with the largest sum of gains within the budget [ms], by dynamic programming; prices
    are rounded up to budget / BINS, and one below 0 counts as 0."""
    best: list[tuple[float, tuple[Option, ...]]] = [(0.0, ())] * (BINS + 1)
    for layer in offered:
        weighed = [(max(0, -int(-one.price / budget * BINS // 1)), one) for one in layer]
        best = [
            max(
                [best[room], *((best[room - weight][0] + one.gain, (*best[room - weight][1], one))
                               for weight, one in weighed if weight <= room)],
                key=lambda way: way[0],
            )
            for room in range(BINS + 1)
        ]  # fmt: skip
    return best[-1][1]


def override(config: TrainConfig, chosen: Sequence[Option]) -> str:
    """The word to type: the run's own rules, then those of the plan, since the last match wins."""
    own = [dict(rule) for rule in config.quant.get("rules") or ()]
    rules = [*own, *({"match": one.layer, "recipe": one.recipe} for one in chosen)]
    written = ", ".join(f"{{match: {quoted(rule['match'])}, recipe: {rule['recipe']}}}" for rule in rules)
    return shlex.quote(f"quant.rules=[{written}]")


def quoted(glob: str) -> str:
    """As an override has it: plain where it is a name, else in quotes."""
    return glob if re.fullmatch(r"[\w.]+", glob) else json.dumps(glob)


def shown(proposal: Proposal, found: Mapping[str, Any]) -> str:
    """The proposal as text."""
    after, before = proposal.after, proposal.before
    lines = [f"PREDICTED for {proposal.machine}: a step takes {before:.2f} ms, with the plan {after:.2f} "
             f"({after / before - 1:+.1%}; asked {proposal.budget:.1%}), in BF16 {proposal.plain:.2f}"]  # fmt: skip
    gain, all_ = (
        sum(one.gain for one in proposal.chosen),
        sum(layer["alone"][LAYER]["second"] for layer in found["layers"].values()),
    )
    lines.append(
        f"lifts {gain / all_:.0%} of what the forwards are foretold to cost ({1e3 * gain:.2f} of {1e3 * all_:.2f}e-3)"
    )
    for one in sorted(proposal.chosen, key=lambda one: -one.gain):
        lines.append(f"  {one.layer:28} {one.recipe:24} {1e3 * one.gain:8.3f}e-3  {one.price:+8.3f} ms")
    if before >= proposal.plain:
        lines.append("BF16 alone is predicted to be as fast: at this size no lift costs time.")
    lines.append("Gains are the second-order estimate of each layer alone, at these weights; no plan was trained.")
    return "\n".join([*lines, proposal.override])
