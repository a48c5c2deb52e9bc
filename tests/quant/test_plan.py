"""Which layer gets which recipe, and what conversion leaves alone."""

import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from support import SLOT_RECIPES
from torch import nn

from kernels import backend
from kernels.philox import Draw
from kernels.quantize import amax, quantize
from launcher.compose import compose
from quant import library
from quant.linear import QuantLinear
from quant.plan import Precision, convert, plan_of, resolve
from quant.recipe import SLOTS
from quant.stats import slot_stats
from training.start.shapes import model_of, shape_of


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(3 * width, width, bias=False)

    def forward(self, x):
        return x + self.out(self.qkv(x))


class Model(nn.Module):
    """Three blocks and a head, the names of models/llama.py."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.lm_head = nn.Linear(width, 2 * width, bias=False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


@pytest.fixture(autouse=True)
def reference():
    backend.use("reference")


def plan(name: str = "quartet2", **group):
    return resolve(Model(), Precision.from_dict(library.mapping(name) | group))


def recipes_of(found) -> dict[str, str]:
    return {entry.name: entry.recipe.name for entry in found.entries}


def test_every_linear_but_the_head_gets_the_recipe():
    found = plan()
    names = recipes_of(found)
    assert [entry.index for entry in found.entries] == list(range(7))
    assert names.pop("lm_head") == "bf16"
    assert set(names.values()) == {"quartet2"} and found.label == "quartet2"


def test_last_rule_wins_over_end_blocks_and_recipe():
    rules = [{"match": "blocks.*.qkv", "recipe": "sr"}, {"match": "blocks.2.*", "recipe": "nvidia"}]
    found = plan(rules=rules, high_precision={"first": 1, "last": 0})
    assert recipes_of(found) == {
        "blocks.0.qkv": "sr",
        "blocks.0.out": "bf16",
        "blocks.1.qkv": "sr",
        "blocks.1.out": "quartet2",
        "blocks.2.qkv": "nvidia",
        "blocks.2.out": "nvidia",
        "lm_head": "bf16",
    }
    assert found.label == "quartet2 blocks.*.qkv=sr blocks.2.*=nvidia first1=bf16"


def test_last_blocks_stay_in_bf16():
    names = recipes_of(plan(high_precision={"first": 0, "last": 2}))
    assert [name for name, recipe in names.items() if recipe == "quartet2"] == ["blocks.0.qkv", "blocks.0.out"]


def test_a_rule_may_count_blocks_from_the_end():
    names = recipes_of(
        plan(rules=[{"match": "blocks.-1.out", "recipe": "bf16"}, {"match": "blocks.-3.*", "recipe": "sr"}])
    )
    assert [name for name, recipe in names.items() if recipe == "bf16"] == ["blocks.2.out", "lm_head"]
    assert [name for name, recipe in names.items() if recipe == "sr"] == ["blocks.0.qkv", "blocks.0.out"]


@pytest.mark.parametrize("preset", ["llama_30m", "nanochat_560m", "ngpt_30m"])
def test_nvidia_published_leaves_a_sixth_of_six_blocks_in_bf16(preset):
    config = compose([f"model={preset}", "quant=nvidia_published"]).config
    with torch.device("meta"):
        found = plan_of(model_of(shape_of(config, 32000)), config.quant)
    left = [entry for entry in found.entries if entry.recipe.name == "bf16" and entry.name != "lm_head"]
    last = config.model.layers - 1
    assert {entry.name.rpartition(".")[0] for entry in left} == {"blocks.0.attn", f"blocks.{last}.mlp"}
    if last == 5:
        sizes = {entry.name: math.prod(entry.shape) for entry in found.entries if entry.name != "lm_head"}
        assert 6 * sum(sizes[entry.name] for entry in left) == sum(sizes.values())


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"rules": [{"match": "blocks.-4.*", "recipe": "bf16"}]}, "'blocks.-4.*' matches no layer"),
        ({"rules": [{"match": "block.0.*", "recipe": "bf16"}]}, "matches no layer that can be quantized; did you mean"),
        ({"rules": [{"match": "lm_head", "recipe": "sr"}]}, "matches no layer that can be quantized"),
        ({"rules": [{"match": "*", "recipe": "nvida"}]}, "did you mean nvidia"),
        ({"rules": ["blocks.0"]}, "write"),
        ({"high_precision": {"first": 2, "last": 2}}, "of a model with 3 blocks"),
        ({"high_precision": {"frist": 2}}, "whole numbers of blocks"),
        ({"high_precision": {"first": -1}}, "whole numbers of blocks"),
        ({"high_precision": {"first": True}}, "whole numbers of blocks"),
        ({"high_precision": 3}, r"quant\.high_precision=3 must be a mapping: in a file"),
        ({"rules": 5}, r"quant\.rules: got 5; write"),
    ],
)
def test_errors(group, message):
    with pytest.raises(ValueError, match=message):
        plan(**group)


def test_shapes_are_checked_before_any_work():
    precision = Precision.from_dict(library.mapping("quartet2"))
    with pytest.raises(
        ValueError, match=r"blocks\.0\.qkv: 192 features are no multiple of 128 \(rotation or block of dgrad\)"
    ):
        resolve(Model(64), precision)
    with pytest.raises(ValueError, match=r"24 features are no multiple of 16 \(rotation or block of fprop\)"):
        resolve(Model(24), Precision.from_dict(library.mapping("nvfp4_rtn")))
    resolve(Model(64), Precision.from_dict(library.mapping("tetrajet2"))).check_tokens(64)
    with pytest.raises(ValueError, match="48 tokens"):
        resolve(Model(64), Precision.from_dict(library.mapping("tetrajet2"))).check_tokens(48)


@pytest.mark.parametrize(
    ("slot", "shape", "message"),
    [
        ("fprop.w", (32, 24), r"24 features .* of 16 \(rotation or block of fprop\.w\)"),
        ("dgrad.w", (24, 32), r"24 features .* of 16 \(rotation or block of dgrad\.w\)"),
        ("wgrad.dy", (32, 24), r"24 features .* of 16 \(rotation or block of wgrad\.dy\)"),
        ("wgrad.x", (24, 32), r"24 features .* of 16 \(rotation or block of wgrad\.x\)"),
        ("fprop.x", (32, 32), "the 24 tokens of a micro-batch are no multiple of 16"),
        ("dgrad.dy", (32, 32), "the 24 tokens of a micro-batch are no multiple of 16"),
    ],
)
def test_square_blocks_need_the_dimension_that_is_not_contracted_too(slot, shape, message):
    """Said at the start, not by the first forward."""
    mapping = library.mapping("bf16")
    gemm, operand = slot.split(".")
    mapping[gemm][operand] = {"grid": "e2m1", "scales": ["tensor fp32", "16x16 e4m3"]}
    model = nn.ModuleDict({"up": nn.Linear(*shape)})
    with pytest.raises(ValueError, match=f"up: {message}"):
        resolve(model, Precision.from_dict(mapping)).check_tokens(24)


def test_plan_is_json_and_a_table():
    found = plan(rules=[{"match": "blocks.1.*", "recipe": "nvidia"}])
    saved = json.loads(json.dumps(found.to_dict()))
    assert saved["layers"][2] == {"index": 2, "name": "blocks.1.qkv", "shape": [384, 128], "recipe": "nvidia"}
    assert set(saved["recipes"]) == {"quartet2", "nvidia", "bf16"}
    table = found.table()
    assert "blocks.*.qkv" in table and "0,2" in table and "ms_eden per 16" in table and "16x16" in table
    assert "  dgrad.w   codes of fprop.w\n" in table and table.count("source fprop_transposed") == 0


def test_the_table_tells_apart_what_computes_apart():
    changes = [
        {},
        {"fprop": {"x": {"amax": 2.0}}},
        {"fprop": {"w": {"tensor_scale": "pow2"}}},
        {"dgrad": {"dy": {"eden_block": "rotation"}}},
        {"dgrad": {"dy": {"eden_block": "rotation", "eden_space": "scaled"}}},
    ]
    mappings = [OmegaConf.to_container(OmegaConf.merge(library.mapping("quartet2"), change)) for change in changes]
    tables = {"\n".join(library.build(mapping).describe("one")) for mapping in mappings}
    assert len(tables) == len(changes)
    assert ", amax 2.0" in "".join(tables) and ", tensor_scale pow2" in "".join(tables)


def test_conversion_keeps_parameters_and_state_dict_keys():
    model = Model()
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    rng = torch.tensor([1, 2, 3])
    convert(model, plan(), rng)
    assert list(model.state_dict()) == keys
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 7 and all(layer.rng is rng for layer in layers)
    assert [int(layer.layer) for layer in layers] == list(range(7))


def test_slot_counters_of_a_step():
    model = convert(Model(), plan(), torch.tensor([1, 2, 3]))
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    stats = slot_stats(model, lambda: model(x).float().square().mean().backward())
    assert len(stats) == 6 and "lm_head" not in stats
    slots = stats["blocks.1.qkv"]
    assert set(slots) == {"fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"}
    assert slots["fprop.x"]["elements"] == 128 * 128 and slots["fprop.x"]["blocks"] == 128 * 8
    # QRTN clips a Gaussian's largest values by design; plain RTN only what a rounded-down scale pushes beyond 6.
    assert 0.03 < slots["dgrad.dy"]["clipped"] / slots["dgrad.dy"]["elements"] < 0.06
    assert all(module.watch is None for module in model.modules() if isinstance(module, QuantLinear))


def test_slot_counters_use_the_random_bits_of_their_slot():
    """Zeros among the codes that the step itself makes of dY, for dgrad and for wgrad."""
    rng, index = torch.tensor([1, 2, 3]), torch.tensor(4)
    generator = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(128, 64, generator=generator).bfloat16() for _ in range(2))
    mapping = library.mapping("nvfp4_rtn")
    for gemm in ("dgrad", "wgrad"):
        mapping[gemm]["dy"] = mapping[gemm]["dy"] | {"rounding": "sr"}
    layer = QuantLinear(nn.Linear(64, 64, bias=False), library.build(mapping), 4, rng)
    stats = slot_stats(layer, lambda: layer(x.requires_grad_()).backward(dy))[""]
    for slot, axis in (("dgrad.dy", 1), ("wgrad.dy", 0)):
        spec = layer.recipe.operand(slot).spec
        codes = quantize(dy, spec, axis, amax(dy, axis), None, Draw(rng, index, SLOTS.index(slot))).values
        assert stats[slot]["zeroed"] == int(((codes == 0) & (dy != 0)).sum())


def test_slot_counters_by_hand():
    """A layer whose input has one vanishing block, one clipped element and zeros."""
    linear = nn.Linear(32, 16, bias=False)
    mapping = library.mapping("nvfp4_rtn") | {"dgrad": "none", "wgrad": "none"}
    layer = QuantLinear(linear, library.build(mapping), 0, torch.tensor([0, 0, 0]))
    x = torch.zeros(4, 32)
    x[0, :3] = torch.tensor([2688.0, 448.0, 64.0])  # codes 6, 1 and 0.14 -> 0
    x[1, 0] = 2.0**-9  # scale 2^-9 / 6 rounds to zero
    x[2, 0] = 6.375 * 0.9921875  # scale 1.054 rounds down to 1: beyond 6
    stats = slot_stats(nn.ModuleDict({"layer": layer}), lambda: layer(x.bfloat16()))
    assert stats["layer"]["fprop.x"] == {
        "elements": 128,
        "non_finite": 0,
        "clipped": 1,
        "zeroed": 2,
        "blocks": 8,
        "underflow_blocks": 1,
    }
    x[3, 3] = float("inf")
    for kind in ("exact", 3.0):
        mapping["fprop"]["x"]["amax"] = kind
        layer.recipe = library.build(mapping)
        assert slot_stats(layer, lambda: layer(x.bfloat16()))[""]["fprop.x"]["non_finite"] == 1


def test_a_gemm_with_one_nvfp4_operand_is_refused_by_the_packed_back_end():
    backend.use("packed")
    half = library.mapping("quartet2")
    half["fprop"]["w"] = {"grid": "none"}
    model = Model()
    planned = resolve(model, Precision.from_dict(half))
    with pytest.raises(ValueError, match=r"one operand of fprop is NVFP4 and the other is not.*backend=triton"):
        convert(model, planned, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("recipe", "slot", "operand", "reason"),
    [
        (
            "quartet2_po4",
            "fprop.w",
            {"scales": ["tensor fp32", "16x16 e4m3"]},
            "16x16 blocks of po4_gauss have no kernel",
        ),
        ("quartet2", "wgrad.x", {"grid": "e4m3", "source": "input"}, "FP8 behind a rotation has no kernel"),
    ],
)
def test_a_slot_without_a_kernel_says_that_it_runs_the_reference(monkeypatch, recipe, slot, operand, reason):
    triton_impl = pytest.importorskip("kernels.quantize.triton_impl")
    monkeypatch.setitem(backend.IMPL, "quantize", triton_impl)
    fields = library.mapping(recipe)
    gemm, name = slot.split(".")
    fields[gemm][name] = {"grid": fields[gemm][name]["grid"]} | operand
    fields[gemm].setdefault("rotation", {})["rounds"] = 1 if gemm == "fprop" else 3
    lines = [line for line in library.build(fields).describe("one") if "runs the reference" in line]
    assert [line.split()[0] for line in lines] == [slot] and reason in lines[0]


def test_every_recipe_of_slots_runs_on_kernels(monkeypatch):
    triton_impl = pytest.importorskip("kernels.quantize.triton_impl")
    monkeypatch.setitem(backend.IMPL, "quantize", triton_impl)
    for recipe in (*SLOT_RECIPES, "quartet1", "averis"):
        assert not any("runs the reference" in line for line in library.load(recipe).describe("one")), recipe


def test_counters_name_the_members_that_blocks_took():
    backend.use("reference")
    model = nn.Sequential(nn.Linear(128, 128, bias=False))
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for recipe, members in (("quartet2_po4", 3), ("quartet2_tables", 1), ("quartet2", 0), ("bf16", 0)):
        precision = Precision.from_dict(library.mapping(recipe))
        layer = convert(
            nn.Sequential(nn.Linear(128, 128, bias=False)), resolve(model, precision), torch.tensor([1, 2, 3])
        )
        counts = slot_stats(layer, lambda layer=layer: layer(x)).get("0", {}).get("fprop.x", {})
        taken = [counts[key] for key in counts if key.startswith("member_")]
        assert len(taken) == members and all(0 < number < counts["blocks"] for number in taken)
        assert sum(taken) < counts.get("blocks", 1)
