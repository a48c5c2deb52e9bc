"""Recipes judged on captured tensors: errors of operands and products, and quant_audit.py --captured."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from kernels import backend
from kernels.quantize import amax, quantize
from quant import library
from quant.captured import compared, measure, of_operand, skeleton
from quant.decompose import TERMS
from quant.plan import convert, plan_of
from training.capture import choose, keys_of, save

SCRIPT = Path(__file__).parents[2] / "scripts" / "quant_audit.py"
LINEARS = {f"blocks.{i}.{kind}": (128, 256) for i in (0, 1) for kind in ("attn.out", "mlp.down")} | {
    "lm_head": (320, 256)
}
RUN = {key: "x" for key in ("name", "hash", "model", "data_fingerprint", "tokenizer_hash")} | {
    "recipe_label": "bf16",
    "seed": 0,
}


@pytest.fixture(autouse=True)
def reference():
    backend.use("reference")


def tensors(seed: int) -> tuple[torch.Tensor, ...]:
    """W, X and dY of one layer; X with one channel that is large."""
    generator = torch.Generator().manual_seed(seed)
    w, x, dy = (torch.randn(shape, generator=generator) for shape in ((128, 256), (512, 256), (512, 128)))
    x[:, 3] *= 20
    return tuple(tensor.bfloat16() for tensor in (w, x, dy))


@pytest.fixture
def folder(tmp_path) -> Path:
    model = convert(skeleton(LINEARS).to_empty(device="cpu"), plan_of(skeleton(LINEARS), library.mapping("bf16")), RNG)
    chosen = choose(model, 512)
    found = {}
    for seed, name in enumerate(chosen.layers):
        found |= dict(zip(keys_of(name), tensors(seed), strict=True))
    return save(tmp_path / "captured", RUN, 7, model, chosen, found)


RNG = torch.zeros(3, dtype=torch.int64)


@pytest.fixture
def audit(capsys):
    """audit(word, ...) runs the script in this process; returns (exit code, output, errors)."""
    spec = importlib.util.spec_from_file_location("quant_audit_captured", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = module.main(list(words))
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return call


def test_an_error_is_what_the_best_gain_leaves():
    a = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    assert compared(a, 1.25 * a) == {"error": pytest.approx(0, abs=1e-15), "gain": pytest.approx(0.8)}
    beside = a + torch.tensor([0.0, 0.0, 5.0])  # <a, q> = 25, |q|^2 = 50
    assert compared(a, beside) == {"error": pytest.approx(0.5), "gain": pytest.approx(0.5)}


def test_operands_and_products_are_those_of_the_quantized_tensors():
    """Against the quantizers themselves, called one by one."""
    w, x, dy = tensors(1)
    recipe = library.load("nvfp4_rtn")
    got = measure(recipe, 0, 7, w, x, dy)

    def made(tensor, slot, axis):
        found = quantize(tensor, recipe.operand(slot).spec, axis, amax(tensor, axis))
        return found.values.double() * found.scale.double()

    qx, qw = made(x, "fprop.x", 1), made(w, "fprop.w", 1)
    assert got["slots"]["fprop.x"]["error"] == pytest.approx(compared(x.double(), qx)["error"], rel=1e-9)
    assert got["slots"]["fprop.x"]["gain"] == pytest.approx(compared(x.double(), qx)["gain"], rel=1e-9)
    exact, products = x.double() @ w.double().t(), got["products"]
    assert products["y"]["error"] == pytest.approx(compared(exact, qx @ qw.t())["error"], rel=2e-3)  # and BF16 of Y
    dx = made(dy, "dgrad.dy", 1) @ made(w, "dgrad.w", 0)
    assert products["dx"]["error"] == pytest.approx(compared(dy.double() @ w.double(), dx)["error"], rel=2e-3)
    dw = made(dy, "wgrad.dy", 0).t() @ made(x, "wgrad.x", 0)
    assert products["dw"] == {
        key: pytest.approx(value, rel=1e-5) for key, value in compared(dy.double().t() @ x.double(), dw).items()
    }
    assert of_operand({"mse": 0.25, "align": -0.5}) == {"error": 0.0, "gain": 2.0}  # q = x / 2


def test_shaped_rounding_is_fitted_on_tokens_that_it_is_not_measured_on():
    """X has a few directions, as captured ones have; their error reaches Y less. One half of the tokens is fitted."""
    generator = torch.Generator().manual_seed(5)
    w, _, dy = tensors(3)
    x = torch.randn(512, 16, generator=generator) @ torch.randn(16, 256, generator=generator)
    x = (x + 0.3 * torch.randn(512, 256, generator=generator)).bfloat16()
    plain = measure(library.load("quartet2"), 0, 7, w, x[256:], dy[256:])
    shaped = measure(library.load("quartet2_shaped_w"), 0, 7, w, x, dy)
    assert shaped["products"]["y"]["error"] < 0.8 * plain["products"]["y"]["error"]
    assert shaped["slots"]["fprop.x"]["mse"] == plain["slots"]["fprop.x"]["mse"]
    found = shaped["slots"]["fprop.w"]
    assert found["mse"] > plain["slots"]["fprop.w"]["mse"] and found["random"] > 0
    assert sum(found[name] for name in TERMS) == pytest.approx(found["mse"], rel=1e-12)


def test_bf16_has_no_error_but_that_of_bf16():
    got = measure(library.load("bf16"), 0, 7, *tensors(2))
    assert got["slots"] == {} and all(row["error"] < 3e-6 for row in got["products"].values())


def test_the_script_prints_and_writes_errors_by_layer_and_kind(folder, audit, tmp_path):
    out = tmp_path / "errors.json"
    code, printed, _ = audit("--captured", str(folder), "--recipes", "nvfp4_rtn,quartet2", "--json", str(out))
    assert code == 0 and "blocks.1.mlp.down" in printed and "all attn.out" in printed
    report = json.loads(out.read_text())
    assert report["captured"]["step"] == 7 and set(report["recipes"]) == {"nvfp4_rtn", "quartet2"}
    found = report["recipes"]["quartet2"]
    assert set(found["layers"]) == set(LINEARS) - {"lm_head"} and set(found["kinds"]) == {"attn.out", "mlp.down"}
    ys = [row["products"]["y"]["error"] for row in found["layers"].values()]
    assert found["mean"]["y"] == pytest.approx(sum(ys) / 4) and found["mean"]["y"] == pytest.approx(15e-3, rel=0.2)
    assert found["layers"]["blocks.0.attn.out"]["slots"]["dgrad.dy"]["random"] > 0
    assert found["native"] == "Blackwell (NVFP4)" and found["fprop"]["fprop.w"]["bits"] == 4.5


def test_a_grids_cell_is_judged_with_its_overrides(folder, audit):
    words = ("--recipes", "leaderboard/po2_x/x2.8/s0,tseng", "--layers", "blocks.0.attn.out", "--json", "-")
    found = json.loads(audit("--captured", str(folder), *words)[1])["recipes"]
    one = found["quartet2_po2_x"]
    assert one["native"] == "none" and one["mean"]["fprop.x"] < 0.8 * one["mean"]["fprop.w"]
    assert found["tseng"]["native"] == "Blackwell (MXFP4)" and found["tseng"]["fprop"] == {}


def test_blocks_that_a_recipe_leaves_in_bf16_are_named_and_in_no_mean(folder, audit, monkeypatch):
    real = library.mapping
    first = {"high_precision": {"first": 1, "last": 0}}
    monkeypatch.setattr(library, "mapping", lambda name: real(name) | (first if name == "nvfp4_rtn" else {}))
    code, printed, _ = audit("--captured", str(folder), "--recipes", "nvfp4_rtn", "--json", "-")
    found = json.loads(printed)["recipes"]["nvfp4_rtn"]
    assert code == 0 and found["layers"]["blocks.0.mlp.down"] == {"kind": "mlp.down", "bf16": "quant.high_precision"}
    assert found["mean"]["y"] > 5e-3  # without the zeros of block 0
    code, _, errors = audit("--captured", str(folder), "--recipes", "nvfp4_rtn", "--layers", "blocks.0.*")
    assert code == 2 and "in BF16 (quant.high_precision)" in errors and "choose other --layers" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipes", "quartet2"], "no index.json there"),
        ([], "--recipes quartet2,nvidia"),
        (["--recipes", "quartet"], "did you mean quartet2"),
        (["--recipes", "leaderboard/po2"], "leaderboard has no cell po2"),
        (["--recipes", "quartet2", "--layers", "blocks.7.*"], "blocks.7.* matches none"),
        (["--recipes", "quartet2", "--decompose"], "leave the others out"),
    ],
    ids=["folder", "recipes", "recipe", "cell", "layer", "mode"],
)
def test_what_is_wrong_is_one_line(folder, audit, words, message):
    place = folder.parent if message.startswith("no index") else folder
    code, printed, errors = audit("--captured", str(place), *words)
    assert code == 2 and not printed and message in errors.splitlines()[-1]
    assert "--captured FOLDER" in audit("quartet2", "--layers", "x")[2]
