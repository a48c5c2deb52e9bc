"""X-rays: errors of layers whose answers are known, and a probe that changes no bit of its run."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import training.xray
from base.runfolder import XRAY, XRAY_PARTS, XRAY_SCOPES
from kernels import backend
from launcher.compose import compose
from models.llama import Llama, LlamaConfig
from quant import library
from quant.linear import Call
from quant.plan import convert, plan_of
from quant.product import Product
from quant.recipe import Recipe
from training import reopen
from training.checkpoint.manifest import checkpoints
from training.checkpoint.state import read_all
from training.loss import LossModel
from training.options import read_options
from training.probes import PROBES
from training.probes.base import Coming
from training.probes.xray import Xray
from training.replay import Lane
from training.start import describe
from training.start.derive import derive
from training.start.memory import MemoryEstimate
from training.start.shapes import model_of, shape_of
from training.xray import Alone, Eye, View, figures, parts

ROOT = Path(__file__).parents[2]
SLICES, DRAWS = 4, 8
LOOK = ["probes.xray.tokens=128", "probes.xray.slices=2", "probes.xray.draws=3"]
SHORT = ["quant=quartet2", "steps=3", "evaluate.every=null", "evaluate.final_tokens=256", "checkpoint.every=1"]


@pytest.fixture(autouse=True)
def cpu():
    backend.use("reference", "cpu")


def gaps_of(product: Product, plain: Product) -> dict:
    """Figures of one layer, 128 to 128 features, over slices of 128 tokens of normal numbers."""
    generator, rng = torch.Generator().manual_seed(0), torch.zeros(3, dtype=torch.int64)
    linear = nn.Linear(128, 128, bias=False)
    nn.init.normal_(linear.weight, generator=generator)
    layer, alone, found = product.build(linear, 0, rng), Alone(product, plain, DRAWS), []
    for number in range(SLICES):
        x, dy = torch.randn((2, 128, 128), generator=generator).bfloat16()
        alone.feed(layer, x, linear.weight, dy)
        found.append(alone.measure(torch.tensor([[0, 0, number * DRAWS + draw] for draw in range(DRAWS)])))
    count = DRAWS if product.forward_draws else 1
    return figures(parts(torch.stack(found)[None], count, DRAWS), product.forward_draws)[0]


@pytest.mark.parametrize("recipe", ["sr", "quartet2"])
def test_sr_and_ms_eden_have_no_bias(recipe):
    found = gaps_of(library.load(recipe), library.load("bf16"))
    for gemm in ("dgrad", "wgrad"):
        backward = found[gemm]["backward"]
        assert backward["variance"] > 0.01 and abs(backward["bias"]) < 3 * backward["bias_se"] < 2e-3


def test_rounding_to_nearest_has_no_variance_and_its_error_is_bias():
    found = gaps_of(library.load("nvfp4_rtn"), library.load("bf16"))
    for gemm in ("dgrad", "wgrad"):
        backward = found[gemm]["backward"]
        assert backward["variance"] == pytest.approx(0, abs=1e-6)
        assert backward["bias"] == pytest.approx(backward["error"], rel=1e-3) and backward["bias"] > 0.005


class Tilted(Recipe):
    """A recipe whose dX is 5 % too large."""

    def input_gradient(self, call: Call, dy: Any, kept: Any) -> Tensor:
        return 1.05 * super().input_gradient(call, dy, kept)

    def exact_backward(self) -> Recipe:
        return Recipe.from_dict(self.to_dict()).exact_backward()


def small(recipe: str) -> tuple[Llama, Tensor]:
    """One block, and its random state."""
    model = Llama(LlamaConfig(layers=1, width=128, heads=2, hidden=128, vocab_size=97, max_seq_len=64))
    model.init_weights(0)
    rng = torch.zeros(3, dtype=torch.int64)
    convert(model, plan_of(model, library.mapping(recipe)), rng)
    return model, rng


def text_of(slices: int) -> list[Tensor]:
    return list(torch.randint(97, (2 * slices, 65), generator=torch.Generator().manual_seed(0)).split(2))


def view_of(model: Llama, rng: Tensor, **how: bool) -> View:
    return View(LossModel(model), 1024, rng[2].fill_, lambda last: nullcontext(), **how)


# Of one slice under three draws: BF16, and one for all draws; of a forward that draws one for each. Apart: one a pass.
@pytest.mark.parametrize(
    ("recipe", "together", "apart"), [("quartet2", 2, 5), ("nvidia", 2, 5), ("hif4_rht_fwd", 4, 7)]
)
def test_one_forward_serves_all_draws(recipe, together, apart):
    """As trained nvidia keeps X quantized, with its exact backward as it is."""
    found = {}
    for several, forwards in ((True, together), (False, apart)):
        model, rng = small(recipe)
        count = []
        model.embed.register_forward_hook(lambda *_, count=count: count.append(1))
        found[several] = Eye(view_of(model, rng, several=several), 3, {}).look(text_of(1))
        assert len(count) == forwards
    assert found[True] == found[False]


def test_an_eye_that_stays_sees_new_weights_and_not_other_recipes(monkeypatch):
    """As under CUDA graphs: layers are measured after the pass, and the eye is used again."""
    monkeypatch.setattr(training.xray, "Lane", lambda *_, **__: Lane(False))
    model, rng = small("quartet2")
    view, text = view_of(model, rng, graphs=True), text_of(1)
    eye = Eye(view, 3, {})
    first = eye.look(text)
    assert eye.sees(view)
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.mul_(1.5).add_(0.01)
    second = eye.look(text)
    assert second == Eye(view_of(model, rng), 3, {}).look(text) != first
    model.blocks[0].mlp.down.recipe = library.load("bf16")
    assert not eye.sees(view)


class Once(Lane):
    """Graphs whose replays find the same inputs: a pass runs once, what it wrote stays. Figures are made anew."""

    def __init__(self, *_, **__):
        super().__init__(False)

    def replay(self, function):
        return function if "gaps" in getattr(function, "__name__", "") else cache(function)


def test_what_one_graph_writes_no_other_one_does(monkeypatch):
    monkeypatch.setattr(training.xray, "Lane", Once)
    model, rng = small("quartet2")
    eye = Eye(view_of(model, rng, graphs=True), 3, {})
    first = eye.look(text_of(1))
    assert first["layers"]["blocks.0.mlp.down"]["wgrad"]["propagated"]["backward"]["error"] > 0.005
    assert eye.look(text_of(1)) == first


def test_a_planted_bias_is_found_where_it_was_planted():
    model, rng = small("sr")
    model.blocks[0].mlp.gate_up.recipe = Tilted.from_dict(library.load("sr").to_dict())
    row = Eye(view_of(model, rng), 4, {}).look(text_of(2))
    found = {name.removeprefix("blocks.0."): layer["dgrad"] for name, layer in row["layers"].items()}

    def seen(layer: str, scope: str) -> bool:
        figures = found[layer][scope]["backward"]
        return figures["bias"] > 3 * figures["bias_se"] and figures["bias"] > figures["visible"]

    assert [layer for layer in found if seen(layer, "local")] == ["mlp.gate_up"]
    assert found["mlp.gate_up"]["local"]["backward"]["projection"] == pytest.approx(1.05, abs=0.02)
    assert found["mlp.gate_up"]["local"]["backward"]["bias"] == pytest.approx(0.05**2, rel=0.5)
    assert found["mlp.gate_up"]["propagated"]["backward"]["projection"] == pytest.approx(1.05, abs=0.02)
    above = found["mlp.down"]  # nothing is above it
    assert above["propagated"]["backward"] == above["local"]["backward"]
    assert all(parameter.grad is None for parameter in model.parameters())


def without_time(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("time", "seconds")}


def ended(folder: Path) -> dict[str, Tensor]:
    return read_all(checkpoints(folder / "checkpoints")[-1])


def same(one: Path, other: Path) -> bool:
    found, expected = ended(one), ended(other)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_bit_of_a_run_changes_and_a_checkpoint_gives_the_same_row(run, rows, capsys, main_of):
    _, plain = run(*SHORT, name="plain")
    _, folder = run(*SHORT, *LOOK, "probes.xray.steps=[2]", name="seen")
    told = capsys.readouterr().out
    assert "probe      xray at 1 step (2)" in told and "xray: 1 look took" in told
    assert same(folder, plain)
    strip = [[(row["loss"], row["grad_norm"]) for row in rows(one, "train")] for one in (folder, plain)]
    assert strip[0] == strip[1]
    [row] = rows(folder, "xray")
    assert (row["step"], row["tokens"]) == (2, 2 * 512)
    layer = row["layers"]["blocks.0.mlp.down"]
    assert set(layer) == {"recipe", "fprop", "dgrad", "wgrad", "noise", "slots"}
    assert set(layer["wgrad"]) == set(XRAY_SCOPES) and set(layer["wgrad"]["local"]) == set(XRAY_PARTS)
    assert set(layer["wgrad"]["local"]["backward"]) == set(XRAY["gemm"]) and set(layer["noise"]) == set(XRAY["noise"])
    assert set(layer["slots"]["fprop.x"]) == set(XRAY["slots"])
    words = "--tokens=128", "--slices=2", "--draws=3", "--recipes", "nvidia"
    code, told, _ = main_of("xray.py")(f"{folder}@2", *words)
    assert code == 0 and "blocks.0.mlp.down wgrad" in told and "nvidia" in told
    found = json.loads((folder / "xray" / "2.json").read_text())
    assert set(found.pop("what_if")) == {"nvidia"} and without_time(found) == without_time(row)


@pytest.fixture(scope="module")
def coming() -> Coming:
    """A run of three steps of 8 sequences of 64 tokens."""
    words = ["batch.seq_len=64", "batch.sequences=8", "batch.micro=4", "steps=3"]
    config = compose(["model=llama_tiny", "model.layers=1", "quant=quartet2", *words]).config
    shape = shape_of(config, 300)
    with torch.device("meta"):
        model = model_of(shape)
    return Coming(model, [plan_of(model, config.quant)], derive(config, shape.parameters_non_embedding, 1))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": [2, 30]}, "no step 30.*its last, 3"),
        ({"every": 5}, "every=5.*3 steps"),
        ({"every": 1, "steps": [1]}, "give one of them"),
        ({"draws": 2}, "draws=2.*at least 3"),
        ({"tokens": 96}, "tokens=96.*take 64"),
        ({"tokens": 64}, "64 tokens.*no multiple of 128"),
        ({"tokens": 1024, "slices": 3}, "more than the 1536"),
        ({"recipes": ["nvidea"]}, "did you mean nvidia"),
        ({"recipes": ["fp8_te"]}, "fp8_te.*recipe of slots"),
        ({"recipes": ["quartet2_shaped"]}, "quartet2_shaped needs what hooks.feedback"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(coming, options, told):
    with pytest.raises(ValueError, match=told):
        Xray.fit(read_options("probes", PROBES, "xray", {"tokens": 128, "slices": 2, "draws": 3} | options), coming)


def test_what_is_captured_stays_beside_the_step_and_its_seconds_are_said(coming):
    given = {"tokens": 128, "slices": 2, "draws": 3, "steps": [1, 2]}
    options, plan = Xray.fit(read_options("probes", PROBES, "xray", given), coming), coming.plans[0]

    def of(plan, tokens=1024):
        return MemoryEstimate({"activations": tokens / 1024, "gradients": 1.0, "temporaries": 1.0})

    beside, alone = (Xray.memory(options, plan, of, graphed) for graphed in (True, False))
    assert beside.total - beside.parts["X-ray"] == of(plan).total
    assert alone.total - alone.parts["X-ray"] == of(plan, 128).total
    assert "s on an H200" in Xray.cost(options, coming.numbers, plan, True)
    assert "of the run's tokens" in Xray.cost(options, coming.numbers, plan, False)


def test_it_is_refused_before_any_work(run, tmp_path):
    with pytest.raises(ValueError, match="no step 30"):
        run(*SHORT, *LOOK, "probes.xray.steps=[30]")
    assert not (tmp_path / "runs").exists()


def test_a_step_that_is_not_there_is_one_line(run, main_of):
    _, folder = run("quant=bf16", *SHORT[1:])
    code, out, told = main_of("xray.py")(f"{folder}@7")
    assert not out
    assert code and told.count("\n") == 1 and "no checkpoint of step 7; it has: 2, 3" in told


def test_more_memory_than_there_is_is_refused_and_planned_for(run, monkeypatch, capsys):
    run(*SHORT, "dry_run=true")
    assert "X-ray" not in capsys.readouterr().out
    many = [*LOOK[:2], "probes.xray.draws=900", "probes.xray.steps=[1]"]
    run(*SHORT, *many, "dry_run=true")
    assert "X-ray " in capsys.readouterr().out
    monkeypatch.setattr(describe, "memory_of", lambda *_: 0.6)
    with pytest.raises(ValueError, match=r"xray need .* GiB, this device has 0.6"):
        run(*SHORT, *many)


def test_a_checkpoint_of_a_model_too_large_is_one_line(run, main_of, monkeypatch):
    _, folder = run("quant=bf16", *SHORT[1:])
    monkeypatch.setattr(reopen, "memory_of", lambda *_: 0.3)
    monkeypatch.setattr(reopen, "build_model", None)  # nothing is built
    code, out, told = main_of("xray.py")(str(folder), "--tokens=128")
    assert code and not out and told.count("\n") == 1 and "this device has 0.3" in told


@pytest.mark.slow  # four jobs of two processes
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_no_bit_changes_on_two_ranks(rows, usual, tmp_path, mode):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    looks = [*LOOK, "probes.xray.steps=[1,3]", "probes.oscillation={every: 2, window: 1}"]
    for name, look in (("plain", []), ("seen", looks)):
        words = [*usual, *SHORT, *look, f"parallel={mode}", f"run.name={name}"]
        done = subprocess.run(
            [*command, *{word.partition("=")[0]: word for word in words}.values()],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:3000]
    assert same(tmp_path / "runs" / "seen", tmp_path / "runs" / "plain")
    assert len(rows(tmp_path / "runs" / "seen", "xray")) == 2
    [row] = rows(tmp_path / "runs" / "seen", "oscillation")
    assert all(0 < layer["flips_per_step"] < 1 for layer in row["layers"].values())
    assert all(sum(layer["distance"]) == pytest.approx(1) for layer in row["layers"].values())
