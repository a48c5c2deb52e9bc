"""The reference quantizers: answers worked out by hand, an independent brute-force twin, edges, errors."""

import math

import pytest
import torch

from kernels import backend, philox
from kernels.philox import Draw
from kernels.quantize import amax, amax_packed, dequantize, quantize, quantize_both, requantize, rht_signs
from kernels.quantize.blocks import quantize_blocks
from kernels.rotation import hadamard
from kernels.spec import (
    NO_CLIP_MAX,
    NVFP4_SCALES,
    NVFP4_SQUARE_SCALES,
    ROW_FP32,
    TENSOR_FP32,
    QuantSpec,
)

RTN = QuantSpec.resolve("e2m1", NVFP4_SCALES)
FOUR_OVER_SIX = QuantSpec.resolve("e2m1", NVFP4_SCALES, "four_over_six")
SQUARE = QuantSpec.resolve("e2m1", NVFP4_SQUARE_SCALES)
SR = QuantSpec.resolve("e2m1", NVFP4_SCALES, rounding="sr")
MS_EDEN = QuantSpec.resolve("e2m1", NVFP4_SCALES, rounding="ms_eden")
BOTH = ("values", "packed")
RNG, LAYER = torch.tensor([3, 1, 2]), torch.tensor(4)


@pytest.fixture(autouse=True)
def reference():
    backend.use("reference")


def run(x, spec, axis=1, signs=None, slot=2):
    return quantize(x, spec, axis, amax(x, axis, signs, spec.per_row), signs, Draw(RNG, LAYER, slot), BOTH)


def block(*values: float) -> torch.Tensor:
    """[1, 16] bf16 that starts with the given values."""
    return torch.tensor([[*values, *[0.0] * (16 - len(values))]]).bfloat16()


# --- by hand --------------------------------------------------------------------------------------------------------


def test_single_block_by_hand():
    # amax = 2688 gives T = 1; block scale = 2688 / 6 = 448; codes are x / 448, rounded to nearest even.
    x = block(2688, 448, 224, 112, 336, 560, 784, 1120, 1568, 2240, -112, -2688)
    out = run(x, RTN)
    assert out.scale == 1.0
    assert out.packed.block_scales.float().tolist() == [[448.0]]
    codes = [6, 1, 0.5, 0, 1, 1, 2, 2, 4, 4, -0.0, -6] + [0] * 4  # 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5 are ties
    assert (out.values / 448).tolist() == [codes]
    assert out.packed.codes[0, 5] == 0xF8  # -112 keeps its sign on a zero (8), -2688 is code 15
    assert run(block(1.0, -0.0), RTN).packed.codes[0, 0] == 0x87  # and so does -0


def test_tensor_scale_by_hand():
    x = block(3.0, 1.0)
    assert run(x, RTN).scale == torch.tensor(3.0) / (6 * 448)
    assert run(x, FOUR_OVER_SIX).scale == torch.tensor(3.0) / (6 * 256)
    assert run(x, SR).scale == torch.tensor(3.0) / (6 * 16 / 17 * 448)
    assert QuantSpec.resolve("e2m1", NVFP4_SCALES, rounding="ms_eden").target_max == pytest.approx(6 * (16 / 17) / 0.93)


def test_power_of_two_tensor_scale_is_rounded_up():
    spec = QuantSpec.resolve("e2m1", NVFP4_SCALES, tensor_scale="pow2")
    assert run(block(2688.0), spec).scale == 1.0
    assert run(block(2704.0), spec).scale == 2.0


def test_four_over_six_by_hand():
    # T = 1 (amax 1536 in the first block, scale 256). Second block: maximum 48, so six has scale 8 and four has 12.
    # 36 / 8 = 4.5 -> 4 misses by 4; 36 / 12 = 3 and 48 / 12 = 4 are exact: four wins. Third block: six is exact.
    x = torch.zeros(1, 48)
    x[0, 0] = 1536.0
    x[0, 16:18] = torch.tensor([48.0, 36.0])
    x[0, 32:34] = torch.tensor([48.0, 32.0])
    out = run(x.bfloat16(), FOUR_OVER_SIX)
    assert out.scale == 1.0
    assert out.packed.block_scales.float().tolist() == [[256.0, 12.0, 8.0]]
    assert out.values[0, 16:18].tolist() == [48.0, 36.0]


def test_four_over_six_tie_goes_to_six():
    # One value per block is exact in both branches.
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 1536.0, 48.0
    assert run(x.bfloat16(), FOUR_OVER_SIX).packed.block_scales.float().tolist() == [[256.0, 8.0]]


def test_four_over_six_takes_the_live_branch_where_the_other_vanishes():
    # T = 1; maximum 5.375 * 2^-10 / 6 = 0.896 * 2^-10 rounds to scale 0, 1.5 times that to 2^-9: 2.69 of those is 3.
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 1536.0, 5.375 * 2.0**-10
    out = run(x.bfloat16(), FOUR_OVER_SIX)
    assert out.packed.block_scales.float().tolist() == [[256.0, 2.0**-9]]
    assert out.values[0, 16] == 3.0 * 2.0**-9


def test_zero_tensor_has_scale_one():
    for spec in (RTN, FOUR_OVER_SIX, SQUARE, SR):
        out = run(torch.zeros(16, 32).bfloat16(), spec)
        assert out.scale == 1.0 and not out.values.any() and not out.packed.codes.any()
        assert (out.packed.block_scales.float() == 1.0).all()


def test_block_whose_scale_vanishes_stores_one_and_zero_codes():
    # T = 1; a block scale below 2^-10 rounds to zero: maximum 6 * 2^-10 is the tie, 6 * 2^-10 * 1.01 survives as 2^-9.
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 16], x[0, 32] = 2688.0, 6 * 2.0**-10, 6 * 2.0**-10 * 1.0078125
    out = run(x.bfloat16(), RTN)
    assert out.packed.block_scales.float().tolist() == [[448.0, 1.0, 2.0**-9]]
    assert out.values[0, 16] == 0.0
    assert out.values[0, 32] == 3.0 * 2.0**-9  # 6 * 0.504 = 3.02 in units of 2^-9


def test_tiny_tensors_are_not_clamped():
    # Gradients have amax 1e-5 and less; down to FP32's smallest normal the tensor scale follows
    # (docs/numerics.md#6-edges).
    for exponent in (-20, -60, -100):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        small = (x.float() * 2.0**exponent).bfloat16()
        assert torch.equal(run(small, RTN).values, run(x, RTN).values)
        assert run(small, RTN).scale == run(x, RTN).scale * 2.0**exponent


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", [RTN, FOUR_OVER_SIX, SQUARE, SR, QuantSpec.resolve("e4m3", (TENSOR_FP32,))], ids=str)
def test_nan_and_inf_give_nan(spec, bad):
    x = torch.ones(16, 32)
    x[3, 5] = bad
    out = run(x.bfloat16(), spec)
    assert out.scale.isnan()


def test_one_bad_row_of_a_rowwise_operand_leaves_the_others():
    x = torch.ones(4, 32)
    x[2, 7] = math.inf
    out = run(x.bfloat16(), QuantSpec.resolve("e4m3", (ROW_FP32,)))
    assert out.scale.isnan().flatten().tolist() == [False, False, True, False]


def test_worst_case_scales_do_not_clip_under_sr():
    # 17/16 is the most that rounding a scale to E4M3 shrinks it. Every BF16 number of two binades as a block's maximum:
    # with the target 6 * 16/17 none ends beyond the grid, with the target 6 many do.
    maxima = (torch.arange(256, dtype=torch.int32) * 0x10000 + 0x41000000).view(torch.float32)  # 8 .. 31.875
    y = torch.zeros(256, 16)
    y[:, 0] = maxima
    for spec, clips in ((SR, False), (QuantSpec.resolve("e2m1", NVFP4_SCALES, rounding="sr", target_max=6.0), True)):
        blocks = quantize_blocks(y, spec, torch.tensor(1.0), Draw(RNG, LAYER), None)
        assert (blocks.elements.abs().max() > 6.0) == clips
    # The worst: 1.0570 rounds down to 1.
    out = quantize(block(5.96875), SR, 1, torch.tensor(NO_CLIP_MAX * 448.0), None, Draw(RNG, LAYER), BOTH)
    assert out.scale == 1.0 and out.packed.block_scales.float()[0, 0] == 1.0 and out.values[0, 0] == 6.0


def test_fp8_by_hand():
    x = block(448.0, 1.0625, 0.0029296875)
    out = run(x, QuantSpec.resolve("e4m3", (TENSOR_FP32,)))
    assert out.scale == 1.0 and out.values[0, :3].tolist() == [448.0, 1.0, 0.00390625]
    assert run(block(57344.0, 1.125), QuantSpec.resolve("e5m2", (TENSOR_FP32,))).values[0, :2].tolist() == [
        57344.0,
        1.0,
    ]


def test_fp8_rowwise_scales_follow_the_contraction():
    x = torch.tensor([[448.0, 896.0], [1.0, 2.0]]).bfloat16()
    spec = QuantSpec.resolve("e4m3", (ROW_FP32,))
    assert torch.equal(run(x, spec, axis=1).scale, torch.tensor([[896.0], [2.0]]) / 448)
    assert torch.equal(run(x, spec, axis=0).scale, torch.tensor([[448.0, 896.0]]) / 448)


# --- a brute-force twin ---------------------------------------------------------------------------------------------

GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
E4M3_VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def nearest(value: float, table: torch.Tensor) -> float:
    """By search; a tie goes to the even index, which is the even mantissa."""
    distance = (table - abs(value)).abs()
    best = (distance == distance.min()).nonzero().flatten().tolist()
    index = best[0] if len(best) == 1 or best[0] % 2 == 0 else best[1]
    return math.copysign(table[index].item(), value)


def stochastic(value: float, table: torch.Tensor, random24: float) -> float:
    low = int((table <= abs(value)).sum()) - 1
    if low == len(table) - 1:
        return math.copysign(table[-1].item(), value)
    share = (abs(value) - table[low]) / (table[low + 1] - table[low])
    return math.copysign(table[low + int(random24 < share * 2**24)].item(), value)


def brute_block(x: torch.Tensor, spec, scale: torch.Tensor, factor: float, noise) -> tuple[list, list, float]:
    """(u, codes, block scale) of one block of FP32 values, loops and searches; FP32 where the definition rounds."""
    ratio = x.abs().max() / (torch.tensor(spec.target_max) * scale)
    block_scale = nearest(min(float(factor * ratio), 448.0), E4M3_VALUES)
    if block_scale == 0:
        return [0.0] * len(x), [0.0] * len(x), 0.0
    u = (x / (torch.tensor(block_scale) * scale)).tolist()
    if noise is None:
        return u, [nearest(value, GRID) for value in u], block_scale
    return u, [stochastic(value, GRID, noise[i]) for i, value in enumerate(u)], block_scale


def brute(y: torch.Tensor, spec, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, block scales) of the stored operand y [rows, contraction], 1x16 blocks."""
    noise = philox.random24(RNG, LAYER, 2, y.numel()).view(y.shape)
    codes, scales = torch.zeros_like(y), torch.zeros(y.shape[0], y.shape[1] // 16)
    scale_noise = philox.random24(RNG, LAYER, 2, scales.numel()).view(scales.shape)
    for row in range(y.shape[0]):
        for g in range(scales.shape[1]):
            part = slice(16 * g, 16 * g + 16)
            random24 = noise[row, part].tolist() if spec.rounding == "sr" else None
            u, q, s = brute_block(y[row, part], spec, scale, 1.0, random24)
            if spec.select == "four_over_six":
                u4, q4, s4 = brute_block(y[row, part], spec, scale, 1.5, None)
                errors = [
                    s**2 * sum((a - b) ** 2 for a, b in zip(*pair, strict=True))
                    for s, *pair in ((s, u, q), (s4, u4, q4))
                ]
                u, q, s = (u4, q4, s4) if errors[1] < errors[0] else (u, q, s)
            if spec.rounding == "ms_eden":
                correction = sum(a * a for a in u) / sum(a * b for a, b in zip(u, q, strict=True))
                s = stochastic(min(correction * s, 448.0), E4M3_VALUES, float(scale_noise[row, g]))
            codes[row, part], scales[row, g] = torch.tensor(q, dtype=torch.float32), s
    return codes, scales


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["rtn", "four_over_six", "sr", "ms_eden"])
def test_matches_brute_force(name, axis):
    spec = {"rtn": RTN, "four_over_six": FOUR_OVER_SIX, "sr": SR, "ms_eden": MS_EDEN}[name]
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(5)).mul(0.03).bfloat16()
    out = run(x, spec, axis)
    y = (x if axis == 1 else x.t()).float()
    codes, scales = brute(y, spec, x.float().abs().max() / torch.tensor(spec.target_max * spec.scale_cap))
    assert torch.equal(out.packed.block_scales.float(), scales)
    assert torch.equal(out.packed.values(), codes * scales.repeat_interleave(16, dim=1))
    assert torch.equal(out.values, out.packed.values() if axis == 1 else out.packed.values().t())


def test_square_blocks_share_codes_with_the_transpose():
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(6)).bfloat16()
    out, flipped = run(x, SQUARE, axis=1), run(x, SQUARE, axis=0)
    assert torch.equal(out.values, flipped.values)
    assert torch.equal(out.packed.transposed().codes, flipped.packed.codes)
    tiles = x.float().view(3, 16, 4, 16).abs().amax((1, 3)) / (6.0 * out.scale)
    assert torch.equal(out.packed.block_scales.float(), tiles.clamp(max=448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("space", ["tensor", "scaled"])
def test_correction_per_rotation_block(space):
    spec = QuantSpec.resolve("e2m1", NVFP4_SCALES, rounding="ms_eden", eden_block="rotation", eden_space=space)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(7)).bfloat16()
    signs = rht_signs(RNG, LAYER, 1, 32)
    y = (x.float() * signs.repeat(2)).view(32, 2, 32).double() @ hadamard(32, x.device).double()
    y = y.view(32, 4, 16).float()
    scale = y.abs().max() / torch.tensor(spec.target_max * spec.scale_cap)
    noise = philox.random24(RNG, LAYER, 2, 128).view(32, 4)
    out = run(x, spec, signs=signs)
    for row in range(32):
        parts = [brute_block(y[row, g], spec, scale, 1.0, None) for g in range(4)]
        for g in range(4):
            pair = parts[g // 2 * 2 : g // 2 * 2 + 2]
            weights = [s * s if space == "tensor" else 1.0 for _, _, s in pair]
            top = sum(w * sum(a * a for a in u) for w, (u, _, _) in zip(weights, pair, strict=True))
            bottom = sum(
                w * sum(a * b for a, b in zip(u, q, strict=True)) for w, (u, q, _) in zip(weights, pair, strict=True)
            )
            expected = stochastic(top / bottom * parts[g][2], E4M3_VALUES, float(noise[row, g]))
            assert out.packed.block_scales.float()[row, g] == expected


# --- rotation, requantization, edges of the interface ---------------------------------------------------------------


def test_hadamard_is_sylvesters_and_orthogonal():
    matrix = hadamard(64, torch.device("cpu"))
    parity = torch.tensor([[bin(i & j).count("1") % 2 for j in range(64)] for i in range(64)])
    assert torch.equal(matrix, 1.0 - 2.0 * parity)
    assert torch.equal(matrix @ matrix.t(), 64 * torch.eye(64))


def test_amax_sees_the_rotated_tensor():
    # With all signs +1 a row of ones rotates into 16, 0, 0, ...
    x = torch.ones(16, 32).bfloat16()
    assert amax(x, 1, torch.ones(16)) == 16.0 and amax(x, 0, torch.ones(16)) == 16.0 and amax(x, 1) == 1.0


@pytest.mark.parametrize("axis", [0, 1])
def test_rotation_cancels_in_a_product(axis):
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (1, 2))
    signs = rht_signs(RNG, LAYER, 2, 32)
    none = QuantSpec.resolve("none")
    left, right = (quantize(x, none, axis, None, signs).values for x in (a, b))
    product = left.t() @ right if axis == 0 else left @ right.t()
    exact = a.double().t() @ b.double() if axis == 0 else a.double() @ b.double().t()
    assert (product / 32 - exact).abs().max() < 1e-4


def test_fixed_signs_ignore_step_micro_batch_and_layer():
    other = torch.tensor([3, 9, 8])
    assert torch.equal(rht_signs(RNG, LAYER, 1, 64, fixed=True), rht_signs(other, torch.tensor(7), 1, 64, fixed=True))
    seeded = rht_signs(torch.tensor([4, 1, 2]), LAYER, 1, 64, fixed=True)
    assert not torch.equal(seeded, rht_signs(RNG, LAYER, 1, 64, fixed=True))
    fresh = [
        rht_signs(rng, layer, gemm, 64) for rng, layer, gemm in ((RNG, LAYER, 1), (other, LAYER, 1), (RNG, LAYER, 2))
    ]
    assert not torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2])


def test_requantize_is_quantize_of_the_values_with_the_global_scale_outside():
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(8)).mul(1e-4).bfloat16()
    p = run(x, FOUR_OVER_SIX).packed
    signs = rht_signs(RNG, LAYER, 2, 32)
    out = requantize(p, MS_EDEN, 0, amax_packed(p, 0, signs), signs, Draw(RNG, LAYER, 5), BOTH)
    twin = p.values().bfloat16()
    direct = quantize(twin, MS_EDEN, 0, amax(twin, 0, signs), signs, Draw(RNG, LAYER, 5), BOTH)
    assert torch.equal(out.values, direct.values)
    assert out.scale == direct.scale * p.global_scale == out.packed.global_scale
    plain = dequantize(p)
    assert torch.equal(plain.values * plain.scale, p.dequantize())
    assert torch.equal(dequantize(p, 0).values, plain.values.t())


def test_both_axes_at_once_are_two_calls():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(10)).bfloat16()
    signs = rht_signs(RNG, LAYER, 1, 32), rht_signs(RNG, LAYER, 2, 64)
    both = quantize_both(x, (MS_EDEN, SR), signs, tuple(Draw(RNG, LAYER, slot) for slot in (2, 4)), (BOTH, BOTH))
    for out, spec, axis, sign, slot in zip(both, (MS_EDEN, SR), (1, 0), signs, (2, 4), strict=True):
        one = quantize(x, spec, axis, amax(x, axis, sign), sign, Draw(RNG, LAYER, slot), BOTH)
        assert torch.equal(out.values, one.values) and out.scale == one.scale
        assert torch.equal(out.packed.codes, one.packed.codes)


def test_values_are_exact_in_bf16_and_sr_gives_neighbours():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(9)).bfloat16()
    for spec, signs in ((SR, None), (MS_EDEN, rht_signs(RNG, LAYER, 0, 128)), (FOUR_OVER_SIX, None)):
        values = run(x, spec, signs=signs).values
        assert torch.equal(values.bfloat16().float(), values)
    draws = torch.stack(
        [quantize(x, SR, 1, amax(x, 1), None, Draw(torch.tensor([s, 0, 0]), LAYER, 2)).values for s in range(8)]
    )
    assert (draws.unique(dim=0).shape[0]) == 8
    nearest_values = quantize(
        x, QuantSpec.resolve("e2m1", NVFP4_SCALES, target_max=SR.target_max), 1, amax(x, 1)
    ).values
    low, high = draws.amin(0), draws.amax(0)
    assert (
        (low <= nearest_values) & (nearest_values <= high)
    ).float().mean() > 0.99  # 8 draws see both neighbours mostly


def test_grid_none_is_the_tensor_itself():
    x = torch.randn(4, 8).bfloat16()
    out = quantize(x, QuantSpec.resolve("none"), 1, None)
    assert out.values is x and out.scale is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run(torch.ones(4, 24).bfloat16(), RTN), "blocks of 16"),
        (lambda: run(torch.ones(24, 32).bfloat16(), SQUARE), "16x16 tiles"),
        (lambda: run(torch.ones(4, 48).bfloat16(), RTN, signs=torch.ones(32)), "not a multiple of the rotation"),
        (lambda: run(torch.ones(4, 32).half(), RTN), "read bfloat16"),
        (lambda: run(torch.ones(4, 4, 32).bfloat16(), RTN), r"\[rows, columns\]"),
        (lambda: quantize(torch.ones(4, 32).bfloat16(), SR, 1, torch.tensor(1.0)), "draws random bits"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
