"""Lifting single layers: losses that must agree, and a Taylor series that must foretell a small change."""

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from base.runfolder import CHANGE, LIFT
from data.evalset import EvalSet
from data.tokens import TokenSet
from kernels import backend
from models.llama import Llama, LlamaConfig
from quant import library
from quant.linear import Call
from quant.plan import convert, plan_of, quant_linears
from quant.product import Product
from training.lift import LAYER, Base, Scorer
from training.loss import LossModel
from training.ranks.distributed import Dist

SHORT = ["steps=2", "evaluate.every=null", "evaluate.final_tokens=1024", "checkpoint.every=2"]
ONE = "quant.rules=[{match: blocks.0.mlp.down, recipe: nvfp4_rtn}]"


def test_the_only_quantized_layer_has_the_whole_gap(run, main_of):
    _, folder = run("quant=bf16", ONE, *SHORT)
    code, told, _ = main_of("xray.py")(str(folder), "--lift")
    found = json.loads((folder / "lift" / "2.json").read_text())
    assert code == 0 and "blocks.0.mlp.down" in told and "attn" not in told
    assert set(found) == set(LIFT) and list(found["layers"]) == ["blocks.0.mlp.down"]
    layer = found["layers"]["blocks.0.mlp.down"]
    assert set(layer["alone"]) == set(layer["lifted"]) == {"layer", "fp8", "x", "w"}
    assert set(layer["alone"]["layer"]) == set(CHANGE)
    assert found["gap"] != 0 and found["gap"] == pytest.approx(found["own"] - found["bf16"], abs=1e-6)
    assert layer["alone"]["layer"]["change"] == pytest.approx(found["gap"], rel=1e-4)
    assert layer["lifted"]["layer"]["change"] == pytest.approx(-found["gap"], rel=1e-4)
    assert abs(layer["alone"]["fp8"]["change"]) < abs(found["gap"]) / 2
    # With X lifted, W is alone in 4 bits.
    assert layer["lifted"]["x"]["change"] == pytest.approx(layer["alone"]["w"]["change"] - found["gap"], rel=1e-3)
    code, told, _ = main_of("xray.py")(str(folder), "--plan", "budget=5%")  # takes what is there
    *_, word = told.splitlines()
    assert code == 0 and word.count("match") == 2 and "{match: blocks.0.mlp.down, recipe: nvfp4_rtn}" in word
    code, told, error = main_of("xray.py")(str(folder), "--plan", "5%")
    assert code and error.count("\n") == 1 and "write --plan budget=5%" in error


def test_fewer_tokens_are_whole_batches_of_the_list(run, main_of):
    _, folder = run("quant=bf16", ONE, *SHORT)
    code, told, _ = main_of("xray.py")(str(folder), "--lift", "--tokens=600")
    assert code == 0 and "512 tokens of validation text" in told


def test_a_run_without_quantized_forwards_is_one_line(run, main_of):
    _, folder = run("quant=quartet2", "quant.fprop=none", *SHORT)
    code, out, told = main_of("xray.py")(str(folder), "--lift")
    assert code and not out and told.count("\n") == 1 and "no layer's forward is quantized" in told


@dataclass(frozen=True)
class Louder(Product):
    """Y of `product`, a little too large; it has no backward."""

    product: Product

    def forward(self, call: Call, x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Any]:
        y, kept = self.product.forward(call, x, weight, keep)
        return y * 1.03, kept


def test_the_series_foretells_a_small_change(run):
    _, folder = run("quant=bf16", *SHORT)  # makes the tokens
    backend.use("reference", "cpu")
    text = EvalSet(TokenSet(json.loads((folder / "run.json").read_text())["data_path"]), 64, 1024)
    model = Llama(LlamaConfig(layers=2, width=64, heads=1, hidden=128, vocab_size=300, max_seq_len=64))
    model.init_weights(0)
    rng = torch.zeros(3, dtype=torch.int64)
    convert(model, plan_of(model, library.mapping("bf16")), rng)
    with torch.no_grad():  # far from the initial weights, where the head hears next to nothing of the blocks
        for parameter in model.parameters():
            parameter.mul_(1.5)
    plain = {name: layer.recipe for name, layer in quant_linears(model).items() if name != "lm_head"}
    scorer = Scorer(LossModel(model), text, 4, Dist(0, 1, 0, torch.device("cpu")), rng[2].fill_)
    found = scorer.changes(Base(plain, {name: {LAYER: Louder(recipe)} for name, recipe in plain.items()}))
    changes = [found[name][LAYER] for name in plain]
    size = max(abs(one["change"]) for one in changes)
    assert size > 3e-4
    for one in changes:
        assert one["change"] == pytest.approx(one["first"] + one["second"], abs=0.15 * size)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_terms_by_hand():
    """Two sequences of two tokens, whose sums are 4 and -2."""
    two = SimpleNamespace(evalset=SimpleNamespace(seq_len=2))
    assert Scorer._terms(two, torch.tensor([1.0, 3.0, 0.0, -2.0])) == pytest.approx(
        {"first": 0.5, "first_se": 1.5, "second": (4 + 1) / 2, "second_se": 1.5}
    )
