"""Families of grids and other scales: blocks worked out by hand, errors on known inputs, exactness, storage."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.formats.grids import FAMILIES, Table, family_of, mirrored
from kernels.formats.nibbles import decode, unpack
from kernels.formats.selects import Candidate
from kernels.philox import Draw
from kernels.quantize import amax, amax_packed, quantize, requantize, rht_signs
from kernels.quantize.blocks import best_of, quantize_blocks, round_blocks, squared_error
from kernels.rotation import hadamard
from kernels.spec import (
    HIF4_SCALES,
    MXFP4_SCALES,
    NVFP4_SCALES,
    NVFP4_SQUARE_SCALES,
    TENSOR_FP32,
    UE5M3_SCALES,
    QuantSpec,
    from_key,
)

ONE = torch.tensor(1.0)
RNG, LAYER = torch.tensor([3, 1, 2]), torch.tensor(4)
DRAW = Draw(RNG, LAYER, 2)
BOTH = ("values", "packed")


@pytest.fixture(autouse=True)
def reference():
    backend.use("reference")


def spec_of(grid, select="absmax", rounding="rtn", scales=NVFP4_SCALES, **fields) -> QuantSpec:
    return QuantSpec.resolve(grid, scales, select, rounding, **fields)


SPECS = {
    "e2m1": spec_of("e2m1"),
    "e2m1 4/6": spec_of("e2m1", "four_over_six"),
    "search": spec_of("e2m1", "search"),
    "int4": spec_of("int4"),
    "if4": spec_of("if4"),
    "if4 4/6": spec_of("if4", "four_over_six"),
    "sfp4": spec_of("sfp4", "four_over_six"),
    "sfp4 6": spec_of("sfp4"),
    "po2_gauss": spec_of("po2_gauss"),
    "po2_mix": spec_of("po2_mix"),
    "po4_gauss": spec_of("po4_gauss"),
    "po4_mix": spec_of("po4_mix"),
    "gridflip": spec_of("gridflip", "four_over_six"),
    "hif4": spec_of("hif4", scales=HIF4_SCALES),
    "mxfp4 floor": spec_of("e2m1", scales=MXFP4_SCALES),
    "mxfp4 even": spec_of("e2m1", scales=MXFP4_SCALES, scale_rule="even"),
    "mxfp4 ceil": spec_of("e2m1", scales=MXFP4_SCALES, scale_rule="ceil"),
    "mxfp4 macro": spec_of("e2m1", scales=MXFP4_SCALES, scale_rule="ceil", macro_bits=5),
    "ue5m3": spec_of("e2m1", scales=UE5M3_SCALES),
    "ue5m3 T": spec_of("e2m1", scales=(TENSOR_FP32, *UE5M3_SCALES)),
}


def block(*values: float, size: int = 16) -> Tensor:
    """FP32 [1, size] that starts with the given values."""
    return torch.tensor([[*map(float, values), *[0.0] * (size - len(values))]])


def blocks_of(x: Tensor, spec: QuantSpec):
    return quantize_blocks(x, spec, ONE, DRAW, None)


def errors_of(x: Tensor, spec: QuantSpec) -> list[float]:
    """Of each candidate, in order, for one block under T = 1."""
    groups = x.view(1, -1, spec.scaling.group)
    extent = spec.scaling.extent(groups, True)
    made = (round_blocks(groups, extent, candidate, spec, ONE, None) for candidate in spec.candidates)
    return [squared_error(one, False).item() for one in made]


def run(x: Tensor, spec: QuantSpec, axis: int = 1, signs: Tensor | None = None):
    return quantize(x, spec, axis, amax(x, axis, signs), signs, DRAW, BOTH)


# --- by hand --------------------------------------------------------------------------------------------------------


def test_if4_takes_the_integers_where_they_fit():
    x = block(*range(7, -8, -1))
    found = blocks_of(x, SPECS["if4"])
    assert errors_of(x, SPECS["if4"]) == [2.6875, 0.0]
    assert found.members.item() == 1 and found.scales.item() == 1.0 and torch.equal(found.values.view(1, 16), x)
    x = block(*(sign * level for level in (0.5, 1, 1.5, 2, 3, 4, 6) for sign in (1, -1)))
    assert errors_of(x, SPECS["if4"]) == pytest.approx([0.0, 1.15625], rel=1e-6)
    assert blocks_of(x, SPECS["if4"]).members.item() == 0


def test_sfp4_fits_each_side_to_its_own_end():
    x = block(6.5, 4.5, 3.5, 2.5, 2, 1.5, 1, 0.5, 0, -0.5, -1, -1.5, -2.5, -3.5, -5.5, 0.5)
    spec = SPECS["sfp4"]
    assert errors_of(x, spec) == pytest.approx([1.394531, 1.199219, 0, 1.808594, 1.359375, 2.308594], abs=1e-6)
    found = blocks_of(x, spec)
    assert (found.members.item(), found.scales.item()) == (1, 1.0) and torch.equal(found.values.view(1, 16), x)
    codes = [6, 4, 3, 2, 1.5, 1, 0.5, 0, -0.5, -1, -1.5, -2, -3, -4, -6, 0]
    assert (found.codes - 0.5).flatten().tolist() == codes
    assert blocks_of(-x, spec).members.item() == 2 and errors_of(-x, spec)[4] == 0.0
    ones = blocks_of(torch.ones(1, 16), spec)
    assert (ones.members.item(), ones.scales.item()) == (0, 0.25) and ones.codes.unique().tolist() == [4.0]
    tie = block(*(3, 0) * 8)
    assert errors_of(tie, spec)[:2] == [0.0, 0.0] and blocks_of(tie, spec).scales.item() == 0.5


def test_tables_and_their_mirror():
    spec, table = SPECS["po2_mix"], FAMILIES["po2_mix"].members[0].levels
    mirror = torch.tensor([mirrored(table)])
    found = blocks_of(2 * mirror, spec)
    assert errors_of(2 * mirror, spec) == [2128.0, 0.0]
    assert (found.members.item(), found.scales.item()) == (1, 2.0) and torch.equal(found.values.view(1, 16), 2 * mirror)
    x = block(120, 10, -13, -24, 60, 3, -3)
    plain, flipped = (grid.nearest(x)[0, :7].tolist() for grid in spec.family.members)
    assert plain == [120, 6, -8, -18, 52, 0, 0] and flipped == [120, 8, -14, -24, 64, 0, 0]
    assert errors_of(x, spec) == [159.0, 39.0]


def test_thresholds_are_the_midpoints_and_a_tie_goes_to_the_smaller_magnitude():
    gauss = FAMILIES["po2_gauss"].members
    middle = [-104, -80, -64, -48, -33, -19.5, -6.5, 5, 15, 26, 40, 56, 72, 92, 112]
    assert list(gauss[0].thresholds) == middle
    x = torch.tensor([float(t) for t in middle])
    low, high = torch.tensor(gauss[0].levels[:-1]), torch.tensor(gauss[0].levels[1:])
    assert torch.equal(gauss[0].nearest(x), torch.where(low.abs() < high.abs(), low, high))
    assert torch.equal(gauss[1].nearest(-x), -gauss[0].nearest(x))
    assert gauss[0].nearest(torch.tensor([-math.inf, -1e9, 1e9, math.inf])).tolist() == [-120, -120, 120, 120]


def test_search_walks_the_bytes_of_the_scale():
    spec = SPECS["search"]
    assert [c.step for c in spec.candidates] == [0, 1, 2, 3, 4, 5, -1]
    x = block(*(48, 36) * 8)  # scale 8 misses 36 by 4; 9 gives 45 -> 54 and 36; 12 is exact, four steps up
    assert errors_of(x, spec)[4] == 0.0 and blocks_of(x, spec).scales.item() == 12.0
    tiny = block(6 * 2.0**-9)  # byte 1 has nothing below it
    assert squared_error_of_step(tiny, -1) == squared_error_of_step(tiny, 0) == 0.0
    large = block(6 * 448.0)
    assert all(squared_error_of_step(large, step) == 0.0 for step in range(6))


@pytest.mark.parametrize("scales", [UE5M3_SCALES, (TENSOR_FP32, *UE5M3_SCALES)])
def test_search_is_refused_where_scales_are_not_e4m3(scales):
    """Its steps end at 448: a block of 1e6 under UE5M3 alone would be 2,688."""
    with pytest.raises(ValueError, match=r"select=search.*use scales \[tensor fp32, 1x16 e4m3\]"):
        spec_of("e2m1", "search", scales=scales)


def squared_error_of_step(x: Tensor, step: int) -> float:
    spec = SPECS["search"]
    groups = x.view(1, 1, 16)
    made = round_blocks(groups, spec.scaling.extent(groups, False), Candidate(0, 6.0, 6.0, step=step), spec, ONE, None)
    return squared_error(made, False).item()


def test_hif4_by_hand():
    x = block(*(7, 5, -3.3, 0.9), *(3.4, 1.6, -0.5, 0.2), *(1, 0.12, 0.125, -1.9), *(2, 1.9, 0, 0), 3.9, 0.37, size=64)
    found = blocks_of(x, SPECS["hif4"]).values.view(64).tolist()
    expected = [7, 5, -3, 1, 3.5, 1.5, -0.5, 0, 1, 0, 0.25, -1.75, 2, 2, 0, 0, 3.5, 0.5]
    assert found[:18] == expected and not any(found[18:])
    out = run(x.bfloat16(), SPECS["hif4"])
    assert out.packed.block_scales[0, 0].tolist()[0] == 48 << 2  # E6M2 of 1
    big = block(448, size=64)
    big[0, 40] = 1.0
    values = blocks_of(big, SPECS["hif4"]).values.view(64)
    assert values[0] == 448.0 and values[40] == 0.0


def test_mxfp4_rules_by_hand():
    """Scale exponents of amax 4 (m = 1), 6 (1.5), 6.5 (1.625) and 7 (1.75): 2^2 is 1, times 4."""
    for rule, scales in {"floor": [1, 1, 1, 1], "even": [1, 1, 1, 2], "ceil": [1, 1, 2, 2]}.items():
        x = torch.cat([block(top, size=32) for top in (4, 6, 6.5, 7)])
        assert blocks_of(x, SPECS[f"mxfp4 {rule}"]).scales.flatten().tolist() == scales
    five = blocks_of(block(5, 0.2, 0.22, 2.3, size=32), SPECS["mxfp4 ceil"])
    assert five.codes.flatten()[:4].tolist() == [4, 0, 0, 2]  # 5 is a tie: the even code


def test_macro_block_by_hand():
    x = block(5, 2, -1, 0.3, size=128)
    found = blocks_of(x, SPECS["mxfp4 macro"])
    assert found.values.flatten()[:4].tolist() == [5.0625, 1.6875, -0.84375, 0.421875]
    assert found.scales.flatten()[0] == 27 / 32  # 2^-1 * 54/32
    without = blocks_of(x, SPECS["mxfp4 ceil"]).values.flatten()[:4].tolist()
    assert without == [4, 2, -1, 0.5]
    out = run(x.bfloat16(), SPECS["mxfp4 macro"])
    assert out.packed.block_scales.tolist() == [[[126, 127, 127, 127, 22]]]


def test_prescale_leaves_the_scale_and_is_undone_by_the_outer_one():
    spec = spec_of("e2m1", rounding="sr", scales=MXFP4_SCALES, prescale=0.75)
    out = run(block(7.96875, 2, size=32).bfloat16(), spec)  # floor: scale 1; 0.75 * 7.97 = 5.98
    assert out.scale == torch.tensor(4 / 3) and out.values[0, 0] in (4.0, 6.0)
    assert blocks_of(block(7.96875, size=32), spec).elements.abs().max() <= 6.0


def test_ue5m3_by_hand():
    scaling = SPECS["ue5m3"].scaling
    x = torch.tensor([1.1, 2.0**-18, 2.0**-17, 1e9, 2.0**-14])
    assert scaling.round(x).tolist() == [1.125, 0.0, 2.0**-17, 61440.0, 2.0**-14]
    every = scaling.decode(torch.arange(248, dtype=torch.uint8))
    assert every[-1] == 61440.0 and torch.equal(scaling.encode(every), torch.arange(248, dtype=torch.uint8))
    assert torch.equal(scaling.round(every), every)
    assert run(torch.zeros(1, 16).bfloat16(), SPECS["ue5m3"]).packed.block_scales.item() == 15 << 3  # stored as 1


# --- errors on known inputs -------------------------------------------------------------------------------------------

COUNT = 2**18
# Relative squared error x1e-3: N(0,1), Student-t 3, silu(a) b, relu^2; N(0,1) by MS-EDEN behind a 128 Hadamard.
TARGETS = {
    "e2m1": (9.04, 8.30, 8.14, 5.62, 9.39),
    "e2m1 4/6": (7.56, 7.63, 7.59, 4.59, 8.13),
    "search": (6.65, 7.07, 7.08, None, None),
    "int4": (7.43, 13.2, 14.0, 7.16, 7.99),
    "if4": (6.17, 7.30, 7.45, 4.18, 6.77),
    "if4 4/6": (5.98, None, None, None, None),
    "sfp4": (5.85, 6.03, 5.90, 3.15, 6.48),
    "sfp4 6": (6.72, 6.40, 6.19, None, None),
    "po2_gauss": (4.93, 6.77, 6.91, 3.54, 5.59),
    "po2_mix": (5.60, 5.34, 4.90, 3.09, 6.21),
    "po4_gauss": (4.30, 5.83, 6.30, 4.10, 4.98),
    "po4_mix": (4.66, 4.57, 4.35, 3.28, 5.36),
    "gridflip": (6.63, 6.73, 6.90, None, None),
    "hif4": (6.88, 8.86, 9.16, 5.70, None),
    "mxfp4 floor": (13.21, 19.94, 21.43, None, None),
    "mxfp4 even": (12.53, 19.36, None, None, None),
    "mxfp4 ceil": (13.32, 22.72, 23.96, None, None),
    "mxfp4 macro": (11.89, 15.20, 17.03, None, None),
    "ue5m3": (9.056, None, None, None, None),
    "ue5m3 T": (9.04, None, None, None, None),
}
# Of N(0,1), in percent.
ALIGN = {"search": -0.70, "sfp4": -0.23, "gridflip": -0.63, "hif4": -0.50, "int4": 0.0}


@pytest.fixture(scope="module")
def inputs() -> list[Tensor]:
    """BF16 [COUNT / 1024, 1024]: N(0,1), Student-t with 3 degrees of freedom, silu(a) b, relu^2.

    A few elements of Student-t hold much of its energy: with this seed the errors of e2m1 and int4 are those of 2^21
    elements."""
    z = torch.randn(4, COUNT, generator=torch.Generator().manual_seed(6))
    heavy = z[0] / z[1:].square().mean(0).sqrt()
    made = z[0], heavy, torch.nn.functional.silu(z[0]) * z[1], z[0].relu().square()
    return [x.bfloat16().view(-1, 1024) for x in made]


def relative(x: Tensor, spec: QuantSpec, dim: int | None = None) -> tuple[float, float]:
    """(squared error x1e-3, alignment in percent), in x's own coordinates."""
    signs = rht_signs(RNG, LAYER, 1, dim) if dim else None
    out = run(x, spec, signs=signs)
    y = out.values * out.scale
    if dim:
        y = ((y.view(-1, dim) @ hadamard(dim, x.device)) * (signs / dim)).view(x.shape)
    x, y = x.double(), y.double()
    return 1e3 * float((y - x).square().sum() / x.square().sum()), 100 * float((x * y).sum() / x.square().sum() - 1)


@pytest.mark.parametrize("name", TARGETS)
def test_errors_and_alignment_on_a_gaussian(name, inputs):
    error, align = relative(inputs[0], SPECS[name])
    assert error == pytest.approx(TARGETS[name][0], rel=0.01)
    assert align == pytest.approx(ALIGN.get(name, align), abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_errors_on_heavy_tails_and_activations(name, inputs):
    for x, target in zip(inputs[1:], TARGETS[name][1:4], strict=True):
        if target is not None:
            assert relative(x, SPECS[name])[0] == pytest.approx(target, rel=0.03)


@pytest.mark.parametrize("name", [name for name, row in TARGETS.items() if row[4]])
def test_errors_of_ms_eden(name, inputs):
    spec = spec_of(SPECS[name].grid, SPECS[name].select, "ms_eden")
    assert relative(inputs[0], spec, 128)[0] == pytest.approx(TARGETS[name][4], rel=0.013)


def test_a_table_given_as_numbers_is_the_named_one(inputs):
    tables = tuple(grid.levels for grid in FAMILIES["po2_gauss"].members)
    given, named = run(inputs[0], spec_of(tables)), run(inputs[0], SPECS["po2_gauss"])
    assert torch.equal(given.values, named.values) and torch.equal(given.packed.codes, named.packed.codes)
    assert relative(inputs[0], spec_of(tables[:1]))[0] == pytest.approx(5.91, rel=0.05)  # alone it is another table's


def test_stochastic_rounding_of_mxfp4(inputs):
    ceil = spec_of("e2m1", rounding="sr", scales=MXFP4_SCALES, scale_rule="ceil")
    error, align = relative(inputs[0], ceil)
    assert error == pytest.approx(27.1, rel=0.01) and abs(align) < 0.1
    assert abs(relative(inputs[0], spec_of("e2m1", rounding="sr", scales=MXFP4_SCALES, prescale=0.75))[1]) < 0.1


@pytest.mark.parametrize("grid", ["int4", "if4", "sfp4", "po2_gauss", "po4_gauss"])
def test_stochastic_rounding_chooses_before_it_rounds(grid):
    """The mean of many draws is x: a choice that saw the random bits would shift it (+.74 % on N(0,1))."""
    spec = spec_of(grid, rounding="sr")
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    largest, total = amax(x, 1), torch.zeros(16, 128)
    for step in range(24):
        out = quantize(x, spec, 1, largest, None, Draw(torch.tensor([0, step, 0]), LAYER, 2))
        total += out.values * out.scale
    assert abs(float((total / 24 * x.float()).sum() / x.float().square().sum()) - 1) < 3e-3


def test_gain_of_shifts_falls_with_the_block(inputs):
    """sfp4 over 4/6, by block size: .679 .774 .844 .892 of the squared error."""
    found = []
    for size in (8, 16, 32, 64):
        pair = []
        for name in ("sfp4", "e2m1 4/6"):
            spec = SPECS[name]
            groups = inputs[0].float().view(inputs[0].shape[0], -1, size)
            scale = groups.abs().max() / (spec.target_max * spec.scale_cap)
            made = best_of(groups, spec, scale)
            pair.append(float((made.values * scale - groups).double().square().sum()))
        found.append(pair[0] / pair[1])
    assert found == pytest.approx([0.679, 0.774, 0.844, 0.892], rel=0.01)


# --- exactness and storage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SPECS if name != "gridflip"])
def test_every_level_times_every_scale_is_exact_in_bf16(name):
    spec = SPECS[name]
    levels = torch.tensor(sorted({level for grid in spec.family.members for level in grid.levels})).double()
    scales = torch.tensor([float(s) for s in spec.scaling.significands]).double()
    if name not in ("hif4", "ue5m3", "ue5m3 T") and not name.startswith("mxfp4"):
        scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    products = levels[:, None] * scales
    assert torch.equal(products.to(torch.bfloat16).double(), products)
    assert spec.significant_bits == max(map(significant, products.flatten().tolist()))


def significant(x: float) -> int:
    numerator = abs(x.as_integer_ratio()[0])
    return (numerator // (numerator & -numerator)).bit_length() if numerator else 0


def test_a_product_of_shifted_grids_is_nvfp4s_and_one_of_two_vectors_a_block():
    """A = sA (qA + cA), B likewise: the product of the unshifted codes, as tensor cores multiply them, and one with a
    contraction of two in 16 for the shifts (sfp4). Exact in FP64."""
    parts = []
    for seed in (1, 2):
        x = torch.randn(24, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
        packed = run(x, SPECS["sfp4"]).packed
        s = packed.block_scales.double()
        c = torch.tensor([0.0, 0.5, -0.5]).double()[packed.block_members().long()]
        assert c.unique().numel() == 3
        q = decode(unpack(packed.codes)).double().view(24, 8, 16)
        parts.append((packed.values().double(), q, s, c))
    (a, qa, sa, ca), (b, qb, sb, cb) = parts
    nvfp4 = (qa * sa[..., None]).flatten(1) @ (qb * sb[..., None]).flatten(1).t()
    left = torch.cat((ca * sa, sa * qa.sum(-1)), 1)
    right = torch.cat((sb * (qb.sum(-1) + 16 * cb), cb * sb), 1)
    assert torch.equal(nvfp4 + left @ right.t(), a @ b.t()) and not torch.equal(nvfp4, a @ b.t())


def test_significant_bits_are_counted():
    bits = {"e2m1": 6, "int4": 7, "if4": 7, "sfp4": 8, "po2_gauss": 8, "po4_mix": 8, "gridflip": 9, "hif4": 6}
    assert {name: SPECS[name].significant_bits for name in bits} == bits
    macro = [replace(SPECS["mxfp4 macro"], macro_bits=b).significant_bits for b in (4, 5, 6)]
    assert macro == [7, 8, 9]


@pytest.mark.parametrize("name", SPECS)
def test_packed_form_holds_the_same_values(name):
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    x[3, 16:32], x[5] = 0.0, 0.0
    x[7, 32:48] *= 2.0**-30
    for axis in (0, 1) if x.shape[0] % SPECS[name].multiple == 0 else (1,):
        out = run(x, SPECS[name], axis)
        stored = out.values if axis == 1 else out.values.t()
        assert torch.equal(out.packed.values(), stored) and torch.equal(out.packed.global_scale, out.scale)
    held = sum(part.numel() * part.element_size() for part in out.packed.tensors()) - 4  # the outer scale
    assert 8 * held / x.numel() == SPECS[name].bits
    again = requantize(out.packed, SPECS["e2m1"], 0, amax_packed(out.packed, 0))
    twin = quantize(out.packed.values(), SPECS["e2m1"], 0, amax(out.packed.values(), 0))
    assert torch.equal(again.values, twin.values) and again.scale == twin.scale * out.packed.global_scale


@pytest.mark.parametrize("grid", ["int4", "if4", "sfp4", "po2_mix", "po4_gauss"])
def test_square_blocks_of_families_share_codes_with_the_transpose(grid):
    spec = spec_of(grid, scales=NVFP4_SQUARE_SCALES)
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(6)).bfloat16()
    out, flipped = run(x, spec, 1), run(x, spec, 0)
    assert torch.equal(out.values, flipped.values)
    assert torch.equal(out.packed.transposed().values(), flipped.packed.values())
    assert torch.equal(out.packed.transposed().block_scales, flipped.packed.block_scales)


@pytest.mark.parametrize("name", SPECS)
def test_zero_and_non_finite_tensors(name):
    zero = run(torch.zeros(16, 128).bfloat16(), SPECS[name])
    assert not zero.values.any() and torch.isfinite(zero.scale) and not zero.packed.values().any()
    for bad in (math.nan, math.inf):
        x = torch.ones(16, 128)
        x[3, 5] = bad
        assert run(x.bfloat16(), SPECS[name]).scale.isnan()


@pytest.mark.parametrize("name", ["sfp4", "po2_gauss", "po4_mix", "if4"])
def test_a_dead_block_is_zero_of_a_member_that_has_one(name):
    x = torch.ones(1, 32)
    x[0, 16:] = 2.0**-30
    for rounding in ("rtn", "sr"):
        out = run(x.bfloat16(), spec_of(SPECS[name].grid, SPECS[name].select, rounding))
        assert not out.values[0, 16:].any() and out.values[0, :16].all()
        members = out.packed.block_members()
        assert members[0, 1].item() == SPECS[name].family.zero_member
    assert [FAMILIES[n].zero_member for n in ("sfp4", "po2_gauss", "po4_mix")] == [0, 0, 3]


# --- what must not change, what must not get worse --------------------------------------------------------------------


def test_identical_members_are_one(inputs):
    table = FAMILIES["po2_gauss"].members[0].levels
    one, two = (run(inputs[0][:64], spec_of(tables)) for tables in ((table,), (table, table)))
    assert torch.equal(one.values, two.values) and torch.equal(one.packed.codes, two.packed.codes)
    levels = tuple(sorted({s * level for level in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for s in (1.0, -1.0)}))
    as_table, e2m1 = run(inputs[0][:64], spec_of((levels,))), run(inputs[0][:64], SPECS["e2m1"])
    assert torch.equal(as_table.packed.block_scales, e2m1.packed.block_scales)
    assert (as_table.values != e2m1.values).double().mean() < 0.05  # ties alone


def test_more_candidates_never_lose(inputs):
    """With the same tensor scale the squared error of no block grows."""
    groups, scale = inputs[0][:32].float().view(32, -1, 16), torch.tensor(0.003)
    for less, more in (("e2m1 4/6", "sfp4"), ("e2m1", "search"), ("e2m1", "if4"), ("sfp4 6", "sfp4")):
        errors = [squared_error(best_of(groups, SPECS[name], scale), False) for name in (less, more)]
        assert (errors[1] <= errors[0]).all() and (errors[1] < errors[0]).any()


def test_the_key_of_a_spec_is_read_back():
    for spec in SPECS.values():
        assert from_key(spec.key) == spec and from_key(spec.key).candidates == spec.candidates
    tables = tuple(grid.levels for grid in FAMILIES["po4_mix"].members)
    assert from_key(spec_of(tables).key) == spec_of(tables)


def test_brute_force_twin_of_a_table_family():
    """Loops and searches over all levels, for the choice and the codes."""
    spec, x = SPECS["po2_mix"], torch.randn(4, 32, generator=torch.Generator().manual_seed(5)).bfloat16()
    out = run(x, spec)
    for row, start in itertools.product(range(4), (0, 16)):
        part, best = x[row, start : start + 16].float(), None
        for grid in spec.family.members:
            ratio = part.abs().max() / (torch.tensor(spec.target_max) * out.scale)
            s = ratio.clamp(max=448).to(torch.float8_e4m3fn).float()
            u = part / (s * out.scale)
            q = torch.stack([nearest_level(value, grid) for value in u])
            error = s**2 * (q - u).square().sum()
            if best is None or error < best[0]:
                best = error, q * s
        assert torch.equal(out.values[row, start : start + 16], best[1])


def nearest_level(value: Tensor, grid: Table) -> Tensor:
    return min(map(torch.tensor, grid.levels), key=lambda level: ((level - value).abs().item(), abs(level.item())))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (((-1.0, 0.0, 1.0),), "15 or 16 rising numbers"),
        (((*range(-7, 8), 7),), "15 or 16 rising numbers"),
        (tuple([tuple(range(-7, 9))] * 5), "5 tables; give 1 to 4"),
        ((tuple(k + 0.5 for k in range(-8, 8)),), "no table has a 0"),
        ((tuple(range(0, 16)),), "some below and some above 0"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tables, message):
    with pytest.raises(ValueError, match=message):
        family_of(tables)
