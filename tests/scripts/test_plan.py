"""What xray.py --plan proposes: within its budget, the best for it, and an override that composes."""

import shlex

import pytest

from launcher.compose import compose
from quant.price import blocks
from scripts import _plan, price
from scripts._plan import Option

WORDS = ["model=llama_30m", "steps=100", "batch.sequences=128", "data.vocab_size=32000", "quant=quartet2"]
OWN = "quant.rules=[{match: 'blocks.5.*', recipe: nvidia}]"


def found(layers: list[str]) -> dict:
    """A look in which the first layer costs most, and FP8 a tenth of 4 bits."""

    def alone(cost: float) -> dict:
        return {"alone": {"layer": {"second": cost}, "fp8": {"second": cost / 10}}}

    return {"layers": {name: alone(1e-3 / (1 + number)) for number, name in enumerate(layers)}}


@pytest.mark.parametrize("gpu", ["RTX 5090", None])
def test_the_override_composes_and_costs_what_was_asked(gpu):
    config = compose([*WORDS, OWN]).config
    plan = price.checked_of(config).plan
    look = found([entry.name for entry in blocks(plan) if not entry.name.startswith("blocks.5.")])
    proposal = _plan.propose(config, look, 0.02, gpu)
    assert proposal.machine == "RTX 5090" and proposal.before < proposal.plain
    assert 0 < proposal.after / proposal.before - 1 < 0.02 + 1e-9 and len(proposal.chosen) > 1
    told = _plan.shown(proposal, look).splitlines()
    words = shlex.split(told[-1])
    again = price.checked_of(compose([*WORDS, *words]).config)
    machine = next(one for one in price.MACHINES if one.name == proposal.machine)
    assert _plan.step_ms(again, again.plan, machine) == pytest.approx(proposal.after)
    recipes = {entry.name: entry.recipe.name for entry in again.plan.entries}
    assert {one.layer: one.recipe for one in proposal.chosen}.items() <= recipes.items()
    assert recipes["blocks.5.mlp.down"] == "nvidia" and recipes["blocks.0.attn.qkv"] != "quartet2"


def test_the_best_choice_within_a_budget():
    offered = [
        [Option("a", "bf16", 5.0, 4.0), Option("a", "fp8", 4.0, 1.0)],
        [Option("b", "bf16", 3.0, 2.0)],
        [Option("c", "bf16", 1.0, -1.0)],
    ]
    picked = {budget: [(one.layer, one.recipe) for one in _plan.choose(offered, budget)] for budget in (1.0, 3.1, 6.1)}
    assert picked[1.0] == [("a", "fp8"), ("c", "bf16")]
    assert picked[3.1] == [("a", "fp8"), ("b", "bf16"), ("c", "bf16")]
    assert picked[6.1] == [("a", "bf16"), ("b", "bf16"), ("c", "bf16")]
    assert _plan.choose([[Option("a", "bf16", 5.0, 4.0)]], 3.99) == ()


@pytest.mark.parametrize("text", ["5%", "budget=5", "budget=0%", "budget=500%"])
def test_a_budget_is_a_share(text):
    with pytest.raises(ValueError, match="write --plan budget=5%"):
        _plan.budget_of(text)


def test_what_cannot_be_planned_is_refused():
    config = compose([*WORDS, "quant.phases=[{from: .85, set: {fprop: none}}]"]).config
    with pytest.raises(ValueError, match="without phases"):
        _plan.propose(config, found(["blocks.0.attn.qkv"]), 0.05, None)
    config = compose(WORDS).config
    with pytest.raises(ValueError, match="choose from B200"):
        _plan.propose(config, found(["blocks.0.attn.qkv"]), 0.05, "H100")
    with pytest.raises(ValueError, match="larger budget"):
        _plan.propose(config, found(["blocks.0.mlp.gate_up"]), 1e-6, "RTX 5090")
