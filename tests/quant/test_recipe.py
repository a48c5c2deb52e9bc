"""Recipes as data: limits, the strict mapping, errors that name the way out, the files of configs/quant."""

import json

import pytest
from support import SLOT_RECIPES

from kernels.spec import NVFP4_SCALES, NVFP4_SQUARE_SCALES, QuantSpec, ScaleLevel, read_level
from quant import library
from quant.recipe import SLOTS, Recipe


def changed(name: str, path: str, value) -> dict:
    """The mapping of a recipe file with one field set."""
    mapping = json.loads(json.dumps(library.mapping(name)))  # YAML aliases share nodes
    *parents, last = path.split(".")
    node = mapping
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return mapping


def test_limits():
    table = {
        ("absmax", "rtn"): (6.0, 448.0),
        ("four_over_six", "rtn"): (6.0, 256.0),
        ("absmax", "sr"): (6 * 16 / 17, 448.0),
        ("absmax", "ms_eden"): (6 * (16 / 17) / 0.93, 256.0),
        ("four_over_six", "ms_eden"): (6 * (16 / 17) / 0.93, 256.0),
        ("search", "rtn"): (6.0, 256.0),
    }
    for (select, rounding), (target, cap) in table.items():
        spec = QuantSpec.resolve("e2m1", NVFP4_SCALES, select, rounding)
        assert spec.target_max == pytest.approx(target, rel=1e-15) and spec.scale_cap == cap
    assert QuantSpec.resolve("e2m1", NVFP4_SCALES, target_max=5.5).target_max == 5.5


def test_a_biased_combination_needs_both_numbers():
    rounding = "sr"
    with pytest.raises(ValueError, match=r"has no limits"):
        QuantSpec.resolve("e2m1", NVFP4_SCALES, "four_over_six", rounding)
    with pytest.raises(ValueError, match=r"has no limits"):
        QuantSpec.resolve("e2m1", NVFP4_SCALES, "four_over_six", rounding, target_max=5.6)
    spec = QuantSpec.resolve("e2m1", NVFP4_SCALES, "four_over_six", rounding, target_max=5.6, scale_cap=256)
    assert (spec.target_max, spec.scale_cap) == (5.6, 256)


@pytest.mark.parametrize("name", SLOT_RECIPES)
def test_recipe_files_round_trip_and_say_only_what_differs(name):
    recipe = library.load(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert library.label(recipe) == name
    mapping = library.mapping(name)
    for slot in SLOTS:
        gemm, operand = slot.split(".")
        for field in {*mapping[gemm][operand]} - {"grid"}:
            short = {key: value for key, value in mapping[gemm][operand].items() if key != field}
            try:
                changed = Recipe.from_dict({**mapping, gemm: {**mapping[gemm], operand: short}})
            except ValueError:
                continue
            assert changed != recipe, f"{slot}.{field} is at its default"


def test_what_a_file_leaves_out_is_in_the_resolved_recipe():
    slot = library.load("bf16").to_dict()["fprop"]["x"]
    assert {"grid", "scales", "select", "rounding", "target_max", "tensor_scale", "amax", "source"} <= set(slot)
    assert library.load("quartet2").to_dict()["dgrad"]["rotation"] == {"dim": 128, "rounds": 1, "signs": "random"}


def test_later_fields_stand_in_a_recipe_only_where_they_are_used():
    """Every kept run keeps its hash: it knew nothing of them."""
    first = set(library.load("quartet2").to_dict()["fprop"]["x"])
    mapping = changed("quartet2", "fprop.x.select", "search")
    assert set(library.build(mapping).to_dict()["fprop"]["x"]) == first
    mapping["fprop"]["x"]["search"] = [0, 5]
    searched = library.build(mapping)
    assert searched.to_dict()["fprop"]["x"]["search"] == (0, 5)
    assert set(searched.to_dict()["fprop"]["x"]) == first | {"search"}
    assert library.label(searched) == "quartet2 fprop.x.select=search fprop.x.search=0+5"
    assert Recipe.from_dict(json.loads(json.dumps(searched.to_dict()))) == searched


@pytest.mark.parametrize(
    ("path", "value", "check"),
    [
        ("fprop.w.select", "absmax", lambda r: r.fprop.operands[1].spec.scale_cap == 448),
        ("wgrad.rotation.signs", "fixed", lambda r: r.wgrad.rotation.signs == "fixed"),
        ("dgrad.rotation.dim", 32, lambda r: r.dgrad.rotation_dim == 32 and r.wgrad.rotation_dim == 128),
        ("dgrad.dy.eden_block", "rotation", lambda r: r.operand("dgrad.dy").spec.eden_block == "rotation"),
        ("dgrad.w.source", "input", lambda r: r.operand("dgrad.w").source == "input"),
        ("fprop.x.tensor_scale", "pow2", lambda r: r.operand("fprop.x").spec.tensor_scale == "pow2"),
        ("fprop.x.amax", 3, lambda r: r.operand("fprop.x").amax == 3.0),
        ("wgrad.dy.grid", "none", lambda r: r.wgrad.is_quantized and not r.operand("wgrad.dy").is_quantized),
        ("fprop.w.scales", ["tensor fp32", "16x16 e4m3"], lambda r: r.operand("fprop.w").spec.is_square),
    ],
)
def test_overrides(path, value, check):
    recipe = library.build(changed("quartet2", path, value))
    assert check(recipe)
    shown = "+".join(value) if isinstance(value, list) else float(value) if path == "fprop.x.amax" else value
    assert library.label(recipe) == f"quartet2 {path}={shown}"


def test_label_names_limits_that_do_not_follow_from_the_table():
    """Two recipes must not share a label: analysis averages what has the same."""

    def label(name: str, **fields) -> str:
        mapping = changed(name, "dgrad.dy.rounding", fields.pop("rounding"))
        mapping["dgrad"]["dy"] |= fields
        return library.label(library.build(mapping))

    assert label("quartet2", rounding="sr") == "quartet2 dgrad.dy.rounding=sr"
    table = {"target_max": 6 * 16 / 17, "scale_cap": 448.0}
    assert label("quartet2", rounding="sr", **table) == "quartet2 dgrad.dy.rounding=sr"
    clipping = label("quartet2", rounding="sr", target_max=6.0)
    assert clipping == "quartet2 dgrad.dy.rounding=sr dgrad.dy.target_max=6.0"
    base = library.load("quartet2").operand("dgrad.dy").spec  # kept although the table has others for sr
    kept = label("quartet2", rounding="sr", target_max=base.target_max, scale_cap=256)
    assert kept == f"quartet2 dgrad.dy.rounding=sr dgrad.dy.target_max={base.target_max} dgrad.dy.scale_cap=256.0"
    outside = label("quartet2", rounding="sr", select="four_over_six", target_max=5.5, scale_cap=256)
    assert outside.endswith("rounding=sr dgrad.dy.target_max=5.5 dgrad.dy.scale_cap=256.0")
    fp8 = {"grid": "e4m3", "target_max": None, "scale_cap": None}
    tensor = label("nvfp4_rtn", rounding="rtn", **fp8, scales=["tensor fp32"])
    assert tensor == "nvfp4_rtn dgrad.dy.grid=e4m3"
    rows = label("nvfp4_rtn", rounding="rtn", **fp8, scales=["row fp32"])
    assert rows == "nvfp4_rtn dgrad.dy.grid=e4m3 dgrad.dy.scales=row fp32"


def test_none_keeps_the_sources():
    recipe = library.build(changed("quartet2", "dgrad", "none"))
    assert not recipe.dgrad.is_quantized and recipe.dgrad.rotation_dim is None
    assert [operand.source for operand in recipe.dgrad.operands] == ["input", "fprop"]
    assert recipe.wgrad == library.load("quartet2").wgrad
    assert library.label(recipe) == "quartet2 dgrad=none"
    mapping = changed("quartet2", "dgrad.dy.grid", "none")
    assert library.label(library.build(mapping)) == "quartet2 dgrad.dy.grid=none"
    mapping["dgrad"]["w"]["grid"] = "none"  # how the command line writes quant.dgrad=none
    mapping["dgrad"]["w"]["source"] = "input"
    assert library.label(library.build(mapping)) == "quartet2 dgrad.w.source=input dgrad=none"


def test_none_under_a_name_without_a_file_is_refused():
    """Its sources would be unknown; the command line knows them (quant=quartet2 quant.name=... quant.dgrad=none)."""
    mapping = library.mapping("quartet2") | {"name": "forward_only", "dgrad": "none"}
    with pytest.raises(
        ValueError, match=r"quant\.dgrad=none keeps the sources of a recipe file, but there is no file 'f"
    ):
        library.build(mapping)
    nothing = {"grid": "none"}
    mapping["dgrad"] = {"dy": nothing, "w": nothing | {"source": "fprop"}}
    assert library.build(mapping).operand("dgrad.w").source == "fprop"


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("quartet2", "fprop.x.roundng", "sr", "quant.fprop.x: unknown field 'roundng'; did you mean rounding"),
        ("quartet2", "fprop.z", {}, "quant.fprop: unknown field 'z'; known: rotation, x, w"),
        ("quartet2", "fpropp", {}, "unknown field 'fpropp'; did you mean fprop"),
        ("quartet2", "fprop.x.rounding", "nearest", "rounding='nearest' is unknown; use one of rtn, sr, ms_eden"),
        ("quartet2", "fprop.x.grid", "e3m0", "grid='e3m0' is unknown"),
        ("quartet2", "fprop.x.grid", "e4m3", "grid=e4m3 takes select=absmax"),
        ("sr", "dgrad.dy.select", "four_over_six", r"has no limits"),
        (
            "quartet2",
            "dgrad.rotation.dim",
            None,
            r"ms_eden is unbiased only behind a random rotation; set its",
        ),
        ("quartet2", "wgrad.rotation.signs", "none", r"ms_eden is unbiased only behind a random rotation; set its"),
        ("quartet2", "dgrad.rotation.dim", 48, "use null or one of 16, 32, 64, 128"),
        ("quartet2", "dgrad.rotation.signs", "frozen", "use one of random, fixed, none"),
        ("quartet2", "dgrad.rotation.rounds", 4, "use one of 1, 2, 3, auto"),
        ("quartet2", "dgrad.dy.source", "fprop", r"only dgrad\.w and wgrad\.x can reuse"),
        ("quartet2", "fprop.rotation.dim", 16, "fprop's operand is rotated along its own contraction; use input"),
        ("quartet2", "dgrad.dy.amax", "delayed", "delayed amax is not built"),
        ("quartet2", "fprop.x.target_max", -1, "must be a positive number"),
        (
            "quartet2",
            "fprop.x.scales",
            ["tensor fp32", "1x32 e8m0"],
            r"takes scales \[tensor fp32, 1x16 e4m3\].*; got \[tensor fp32, 1x32 e8m0\]",
        ),
        ("quartet2", "fprop.x.scales", ["tensor"], "write 'tensor fp32'"),
        ("quartet2", "fprop", "nothing", "give a mapping, or none"),
        ("quartet2", "dgrad.dy.eden_space", "scaled", "set eden_block=rotation"),
        ("sr", "fprop.w.scales", ["row fp32"], "grid=e2m1 takes scales"),
        ("fp8", "fprop.x.target_max", 1000, "ends at 448: leave target_max and scale_cap out"),
        ("fp8", "fprop.x.scale_cap", 3, "no block scales to cap"),
        ("nvidia", "fprop", "none", r"fprop\.w\.grid=none; set quant\.dgrad\.w\.source=input"),
        ("nvidia", "dgrad.w.scales", ["tensor fp32", "1x16 e4m3"], "needs fprop's grid and scales"),
        ("nvidia", "dgrad.w.rounding", "sr", "can't act on fprop's codes"),
        (
            "nvidia",
            "dgrad.w.select",
            "four_over_six",
            r"select=four_over_six can't act on fprop's codes.*quant\.fprop\.w",
        ),
        ("nvidia", "dgrad.w.target_max", 5.5, r"target_max=5\.5 can't act on fprop's codes"),
        ("nvidia", "dgrad.w.scale_cap", 256, r"scale_cap=256\.0 can't act on fprop's codes"),
        ("nvidia", "dgrad.w.tensor_scale", "pow2", r"tensor_scale=pow2 can't act on fprop's codes"),
        ("fp8", "wgrad.x.amax", 3, r"amax=3\.0 can't act on fprop's codes.*set quant\.fprop\.x\.amax"),
        ("nvidia", "dgrad.rotation.dim", 16, r"not rotated; set rotation\.dim=null"),
        ("fp8_rowwise", "dgrad.w.source", "fprop", "scale per row of the other axis; use input"),
        ("quartet2", "dgrad.rotation", 5, r"quant\.dgrad\.rotation=5 must be a mapping: in a file rotation: \{<field>"),
        ("quartet2", "dgrad.rotation.dim", 128.0, r"rotation\.dim=128\.0; use null or one of"),
        ("quartet2", "dgrad.rotation.rounds", True, "use one of 1, 2, 3, auto"),
        ("quartet2", "fprop.x", 5, r"quant\.fprop\.x=5 must be a mapping: .*, else quant\.fprop\.x\.<field>=<value>"),
        ("quartet2", "fprop.x.scales", 5, "scales=5: give a list"),
        ("quartet2", "fprop.x.amax", float("inf"), "amax=inf: use exact, or a positive number"),
        ("quartet2", "fprop.x.amax", True, "amax=True: use exact, or a positive number"),
        ("quartet2", "fprop.x.target_max", float("inf"), "target_max=inf must be a positive number"),
        ("quartet2", "fprop.x.target_max", True, "target_max=True must be a positive number"),
        ("quartet2", "fprop.x.target_max", [1], r"target_max=\[1\] must be a positive number"),
        ("quartet2", "fprop.x.target_max", "abc", "target_max='abc' must be a positive number"),
        ("quartet2", "fprop.x.scale_cap", 1000, r"scale_cap=1000\.0: block scales are E4M3 and end at 448"),
        ("quartet2", "fprop.x.grid", ["e2m1"], r"grid=\['e2m1'\] is unknown"),
        ("quartet2", "dgrad.dy.eden_block", 16.0, r"eden_block=16\.0 is unknown; use one of 16, rotation"),
        ("quartet2", "name", None, "quant.name=None: give a word"),
        ("nvidia", "wgrad.x.scales", ["tensor fp32", "16x16 e4m3"], "16x16 blocks can't be rotated along one axis"),
        ("quartet2", "fprop.x.grid", "gridflip", "9 significant bits, and BF16 holds 8"),
        ("nvfp4_rtn", "fprop.x.grid", [[*range(-8, 7), 10.1]], r"tables under .* significant bits, and BF16 holds 8"),
        ("quartet2", "fprop.x.grid", "po2_mix", "select=four_over_six fits E2M1 levels; grid=po2_mix has none: use"),
        ("nvfp4_rtn", "fprop.x.grid", [1, 2, 3], "15 or 16 rising numbers"),
        ("nvfp4_rtn", "fprop.x.grid", [[1, "a"]], "give a name, 16 numbers, or a list of such lists"),
        ("nvfp4_rtn", "fprop.x.grid", "po3", "grid='po3' is unknown; use one of none, e4m3, e5m2, e2m1, int4"),
        ("sr", "dgrad.dy.select", "search", "select=search is for grid=e2m1, rounding=rtn"),
        ("nvfp4_rtn", "fprop.x.search", [0, 2], r"search=\[0, 2\] is for select=search; got select=absmax"),
        ("nvfp4_rtn", "fprop.x.scale_rule", "ceil", r"scale_rule=ceil is for scales \[1x32 e8m0\]"),
        ("nvfp4_rtn", "fprop.x.prescale", 0.75, r"prescale=0\.75 is for scales \[1x32 e8m0\]"),
        ("nvfp4_rtn", "fprop.x.random_bits", 8, r"random_bits=8 is for rounding=sr; got rounding=rtn: leave it out"),
        ("sr", "dgrad.dy.random_bits", 16, "random_bits=16 is unknown; use one of 24, 8"),
        ("nvfp4_rtn", "fprop.x.macro_bits", 5, r"macro_bits=5 is for scales \[1x32 e8m0\]"),
        ("nvfp4_rtn", "fprop.x.grid", "hif4", None),
        ("quartet2", "fprop.x.grid", "hif4", "grid=hif4 takes select=absmax and rounding=rtn"),
        ("sr", "dgrad.dy.grid", "hif4", "rounding=ms_eden|grid=hif4 takes select=absmax and rounding=rtn"),
        ("quartet2", "dgrad.dy.grid", "hif4", "ms_eden corrects E4M3 scales"),
        ("nvfp4_rtn", "fprop.x.scales", ["1x32 e8m0"], None),
        ("quartet2", "fprop.x.scales", ["1x32 e8m0"], "select=four_over_six needs E4M3 scales"),
        ("sr", "dgrad.dy.scales", ["1x32 e8m0"], "scale_rule=floor clips, .*set scale_rule=ceil or prescale=0.75"),
        ("quartet2", "dgrad.dy.scales", ["1x32 e8m0"], "ms_eden corrects E4M3 scales; .* use rtn or sr"),
        ("nvfp4_rtn", "fprop.x.scales", ["1x64 e6m2", "1x8 e1", "1x4 e1"], "grid=e2m1 takes scales"),
        ("int4", "fprop.x.scales", ["1x32 e8m0"], r"are built for grid=e2m1; grid=int4 needs"),
        ("int4", "wgrad.dy.eden_block", "rotation", None),
        (
            "fp8",
            "wgrad.x",
            {"grid": "hif4", "source": "fprop"},
            r"codes of fprop without .* scales \[1x64 e6m2.*use input",
        ),
        ("fp8", "wgrad.x", {"grid": "hif4", "source": "input"}, None),
        ("quartet2_upstream", "dgrad.dy.grid", "int4", "eden_space=scaled is upstream's for grid=e2m1"),
    ],
)
def test_errors_name_the_way_out(name, path, value, message):
    if message is None:  # the legal neighbour of what is refused
        library.build(changed(name, path, value))
        return
    with pytest.raises(ValueError, match=message):
        library.build(changed(name, path, value))


def test_reused_codes_follow_fprop_or_keep_their_defaults():
    """The grids' nvidia_46 sets select in fprop only; saying it again for dgrad.w is the same recipe, said in full."""
    mapping = changed("nvidia", "fprop.w.select", "four_over_six")
    assert library.build(mapping).operand("dgrad.w").spec.select == "absmax"
    mapping["dgrad"]["w"]["select"] = "four_over_six"
    assert library.build(mapping).operand("dgrad.w").spec == library.build(mapping).operand("fprop.w").spec
    mapping["fprop"]["w"]["scale_cap"] = 300
    assert library.build(mapping).operand("dgrad.w").spec.scale_cap == 256


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean quartet2"):
        library.load("quartet")


def test_scale_levels_read_and_write():
    for text, level in {
        "tensor fp32": ScaleLevel("tensor", "fp32"),
        "row fp32": ScaleLevel("row", "fp32"),
        "16x16 e4m3": NVFP4_SQUARE_SCALES[1],
    }.items():
        assert read_level(text) == level and str(level) == text


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ({"x": {"grid": "e2m1"}}, r"quant\.fprop\.w is missing; give \{grid: \.\.\.\}, or \{grid: none\} for BF16"),
        ({"x": {"grid": "e2m1"}, "w": {"rounding": "sr"}}, r"quant\.fprop\.w\.grid is missing; give e2m1, e4m3"),
    ],
)
def test_bf16_is_said_and_not_assumed(operands, message):
    with pytest.raises(ValueError, match=message):
        library.build(library.mapping("quartet2") | {"fprop": operands})


def test_random_bits_are_part_of_a_recipe_only_where_they_are_not_24():
    values = library.mapping("sr")
    usual = library.build(values)
    values["dgrad"]["dy"]["random_bits"] = 24
    assert library.build(values).numerics() == usual.numerics()
    assert "random_bits" not in str(usual.numerics())
    eight = library.load("sr_8bit")
    assert str(eight.numerics()).count("'random_bits': 8") == 4 and eight.operand("fprop.x").spec.random_bits == 24
    assert "random_bits 8" in str(eight.describe("sr_8bit"))
