"""The quantized linear layer against FP64 from the same codes, against plain BF16, and what it saves."""

import pytest
import torch
from support import KINDS, SLOT_RECIPES
from torch import Tensor, nn

from kernels import backend
from kernels.philox import Draw
from kernels.quantize import amax, amax_packed, quantize, requantize, rotation
from kernels.spec import FP8_SCALES, NVFP4_SCALES, NVFP4_SQUARE_SCALES, QuantSpec
from quant import library
from quant.linear import QuantLinear
from quant.recipe import GEMMS, SLOTS, Operand, Recipe

M, K, N = 256, 128, 384
RNG, LAYER = torch.tensor([11, 5, 3]), 6


@pytest.fixture(autouse=True)
def reference():
    backend.use("reference")


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [M,K] bf16, w [N,K] float32, dy [M,N] bf16 with the small values of a gradient."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g).bfloat16()
    return x, torch.randn(N, K, generator=g) * 0.05, (torch.randn(M, N, generator=g) * 1e-4).bfloat16()


def run(recipe: Recipe, x: Tensor, w: Tensor, dy: Tensor, compiled=None) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dw) of one layer."""
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data.copy_(w)
    layer = QuantLinear(linear, recipe, LAYER, RNG)
    x = x.clone().requires_grad_()
    y = (compiled(layer) if compiled else layer)(x)
    y.backward(dy)
    return y.detach(), x.grad, linear.weight.grad


# --- FP64 from the same codes: the recipe table of docs/recipes/README.md, written out a second time ---


def spec(grid: str, rounding: str = "rtn", select: str = "absmax", scales=NVFP4_SCALES, **eden) -> QuantSpec:
    return QuantSpec.resolve(grid, scales, select, rounding, **eden)


RTN, SR = spec("e2m1"), spec("e2m1", "sr")
FOUR_SIX, SQUARE = spec("e2m1", select="four_over_six"), spec("e2m1", scales=NVFP4_SQUARE_SCALES)
EDEN, UPSTREAM = spec("e2m1", "ms_eden"), spec("e2m1", "ms_eden", eden_block="rotation", eden_space="scaled")
E4M3, E5M2 = spec("e4m3", scales=FP8_SCALES[0]), spec("e5m2", scales=FP8_SCALES[0])
ROW, NONE = spec("e4m3", scales=FP8_SCALES[1]), spec("none")
# recipe: specs of the six slots, rotation of dgrad and wgrad, source of dgrad.w and wgrad.x
TABLE = {
    "bf16": ([NONE] * 6, None, None, "input"),
    "fp8": ([E4M3, E4M3, E5M2, E4M3, E5M2, E4M3], None, None, "input"),
    "fp8_rowwise": ([ROW] * 6, None, None, "input"),
    "nvfp4_rtn": ([RTN] * 6, None, None, "input"),
    "sr": ([RTN, RTN, SR, SR, SR, SR], 128, 128, "fprop"),
    "nvidia": ([RTN, SQUARE, SR, SQUARE, SR, RTN], None, 16, "input"),
    "tetrajet2": ([RTN, RTN, SR, SR, SR, SR], 32, 32, "fprop"),
    "quartet2": ([FOUR_SIX, FOUR_SIX, EDEN, EDEN, EDEN, EDEN], 128, 128, "fprop"),
    "quartet2_upstream": ([FOUR_SIX, FOUR_SIX, UPSTREAM, UPSTREAM, UPSTREAM, UPSTREAM], 128, 128, "fprop"),
}


def exact(x: Tensor, slot: int, axis: int, operand: Operand, signs: Tensor | None) -> Tensor:
    """FP64 value of an operand, in its natural layout, with all scales."""
    quantizer = operand.spec
    measured = None if quantizer.grid == "none" else amax(x, axis, signs, quantizer.per_row)
    largest = measured if operand.amax == "exact" else torch.full_like(measured, operand.amax)
    out = quantize(x, quantizer, axis, largest, signs, Draw(RNG, torch.tensor(LAYER), slot))
    return out.values.double() * (1.0 if out.scale is None else out.scale.double())


def exact_again(x: Tensor, first: QuantSpec, slot: int, quantizer: QuantSpec, signs: Tensor | None) -> Tensor:
    """FP64 value of an operand quantized along axis 1 by `first` and again along axis 0."""
    made, draw = quantize(x, first, 1, amax(x, 1), want=("values", "packed")), Draw(RNG, torch.tensor(LAYER), slot)
    if made.packed is None:  # FP8
        inner = made.values.to(torch.bfloat16)
        out = quantize(inner, quantizer, 0, amax(inner, 0, signs), signs, draw)
        return out.values.double() * out.scale.double() * made.scale.double()
    largest = amax_packed(made.packed, 0, signs)
    out = requantize(made.packed, quantizer, 0, largest, signs, draw)
    return out.values.double() * out.scale.double()


def in_fp64(name: str, x: Tensor, w: Tensor, dy: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(product, sum of absolute products) of the three GEMMs in FP64."""
    recipe = library.load(name)
    operands = [recipe.operand(slot) for slot in SLOTS]
    specs = [operand.spec for operand in operands]
    w = w.bfloat16()
    rotations = [recipe.gemm(gemm).rotation for gemm in GEMMS]
    signs = [
        rotation(RNG, torch.tensor(LAYER), i, turn.dim, turn.rounds, "random") if turn.dim else None
        for i, turn in enumerate(rotations)
    ]
    qx, qw = exact(x, 0, 1, operands[0], signs[0]), exact(w, 1, 1, operands[1], signs[0])
    d_dy, w_dy = exact(dy, 2, 1, operands[2], signs[1]), exact(dy, 4, 0, operands[4], signs[2])
    d_w, w_x = (
        exact_again(tensor, specs[first], slot, specs[slot], signs[gemm])
        if recipe.operand(SLOTS[slot]).source == "fprop"
        else exact(tensor, slot, 0, operands[slot], signs[gemm])
        for tensor, first, slot, gemm in ((w, 1, 3, 1), (x, 0, 5, 2))
    )
    norms = [turn.dim**turn.rounds if turn.dim else 1 for turn in rotations]
    pairs = zip(((qx, qw.t()), (d_dy, d_w), (w_dy.t(), w_x)), norms, strict=True)
    return [(a @ b / norm, a.abs() @ b.abs() / norm) for (a, b), norm in pairs]


@pytest.mark.parametrize("name", SLOT_RECIPES)
def test_every_gemm_agrees_with_fp64_from_the_same_codes(name):
    x, w, dy = tensors()
    # Sums of k FP32 terms err by at most k 2^-24 of the sum of absolute products, the scales by 3 more roundings, the
    # output by half a unit in the last place: BF16 2^-8, FP32 2^-24 of the value at most.
    for got, (value, size), k, unit in zip(
        run(library.load(name), x, w, dy), in_fp64(name, x, w, dy), (K, N, M), (2**-8, 2**-8, 2**-24), strict=True
    ):
        bound = (k + 3) * 2**-24 * size + unit * value.abs() * 1.01
        assert ((got.double() - value).abs() <= bound).all(), ((got.double() - value).abs() / bound).max()


@pytest.mark.parametrize("name", TABLE)
def test_published_recipes_are_those_of_the_table(name):
    specs, dgrad_dim, wgrad_dim, source = TABLE[name]
    recipe = library.load(name)
    assert [recipe.operand(slot).spec for slot in SLOTS] == specs
    assert [recipe.gemm(gemm).rotation_dim for gemm in GEMMS] == [None, dgrad_dim, wgrad_dim]
    assert {recipe.operand(slot).source == "fprop" for slot in ("dgrad.w", "wgrad.x")} == {source == "fprop"}


# --- the baseline ---


class PlainBF16(torch.autograd.Function):
    """The BF16 baseline, written without the project's code: FP32 products of BF16 operands, one rounding."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x.float(), weight.bfloat16().float().t()).bfloat16()

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        dx = torch.mm(dy.float(), weight.bfloat16().float()).bfloat16()
        return dx, torch.mm(dy.float().t(), x.float())


def six_none(base: str) -> Recipe:
    mapping = library.mapping(base)
    return library.build(mapping | dict.fromkeys(("fprop", "dgrad", "wgrad"), "none"))


@pytest.mark.parametrize(
    "recipe", [library.load("bf16"), six_none("quartet2"), six_none("bf16")], ids=["bf16", "q2", "none"]
)
def test_six_none_is_bitwise_the_bf16_baseline(recipe):
    x, w, dy = tensors(1)
    weight, leaf = w.clone().requires_grad_(), x.clone().requires_grad_()
    y = PlainBF16.apply(leaf, weight)
    y.backward(dy)
    got = run(recipe, x, w, dy)
    assert got[2].dtype == torch.float32
    assert torch.equal(got[0], y) and torch.equal(got[1], leaf.grad) and torch.equal(got[2], weight.grad)


def test_forward_only_multiplies_by_the_dequantized_fprop_operands():
    x, w, dy = tensors(2)
    mapping = library.mapping("quartet2") | {"dgrad": "none", "wgrad": "none"}
    _, dx, dw = run(library.build(mapping), x, w, dy)
    wb = w.bfloat16()
    qw, qx = (quantize(t, FOUR_SIX, 1, amax(t, 1), want=("packed",)).packed.dequantize().double() for t in (wb, x))
    torch.testing.assert_close(dx.double(), dy.double() @ qw, rtol=2**-8, atol=1e-9)
    torch.testing.assert_close(dw.double(), dy.double().t() @ qx, rtol=1e-5, atol=1e-9)
    nothing = {"grid": "none", "source": "input"}
    mapping["wgrad"], mapping["dgrad"] = {"dy": nothing, "x": nothing}, {"dy": nothing, "w": nothing}
    _, dx, dw = run(library.build(mapping), x, w, dy)
    torch.testing.assert_close(dx.double(), dy.double() @ wb.double(), rtol=2**-8, atol=1e-9)
    torch.testing.assert_close(dw.double(), dy.double().t() @ x.double(), rtol=1e-5, atol=1e-9)


def test_backward_only_leaves_the_forward_exact():
    x, w, dy = tensors(3)
    mapping = library.mapping("quartet2") | {"fprop": "none"}
    y, dx, _ = run(library.build(mapping), x, w, dy)
    assert torch.equal(y, run(library.load("bf16"), x, w, dy)[0])
    exact_dx = dy.double() @ w.bfloat16().double()
    error = (dx.double() - exact_dx).square().sum() / exact_dx.square().sum()
    assert 0.012 < error < 0.025  # two MS-EDEN operands: 2 x 9.3e-3


def test_requantizing_what_an_fp8_forward_used():
    """source fprop behind an FP8 fprop: the FP8 codes are quantized again, their scale stays outside."""
    x, w, dy = tensors(13)
    mapping = library.mapping("quartet2") | {"fprop": library.mapping("fp8")["fprop"]}
    _, dx, dw = run(library.build(mapping), x, w, dy)
    qx, qw = exact(x, 0, 1, Operand(E4M3), None), exact(w.bfloat16(), 1, 1, Operand(E4M3), None)
    for got, value in ((dx, dy.double() @ qw), (dw, dy.double().t() @ qx)):
        error = (got.double() - value).square().sum() / value.square().sum()
        assert 0.012 < error < 0.025  # two MS-EDEN operands: 2 x 9.3e-3


def test_one_operand_alone_behind_a_rotation():
    x, w, dy = tensors(4)
    mapping = library.mapping("quartet2") | {"fprop": "none"}
    mapping["dgrad"] = mapping["dgrad"] | {"dy": {"grid": "none"}}
    _, dx, _ = run(library.build(mapping), x, w, dy)
    exact_dx = dy.double() @ w.bfloat16().double()
    error = (dx.double() - exact_dx).square().sum() / exact_dx.square().sum()
    assert 0.007 < error < 0.012  # one MS-EDEN operand: 9.3e-3


# --- randomness, memory, interface ---


def test_backward_repeats_and_depends_on_the_counters():
    x, w, dy = tensors(5)
    recipe = library.load("sr")
    first, again = run(recipe, x, w, dy), run(recipe, x, w, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    try:
        for place in range(3):
            RNG[place] += 1
            other = run(recipe, x, w, dy)
            assert torch.equal(other[0], first[0]) and not torch.equal(other[1], first[1])
            RNG[place] -= 1
    finally:
        RNG.copy_(torch.tensor([11, 5, 3]))


def test_fixed_signs_and_no_signs():
    x, w, dy = tensors(12)
    mapping = library.mapping("nvfp4_rtn")  # RTN: the signs are the only randomness
    for signs, same in (("random", False), ("fixed", True), ("none", True)):
        mapping["dgrad"]["rotation"] = {"dim": 16, "rounds": 1, "signs": signs}
        recipe = library.build(mapping)
        first = run(recipe, x, w, dy)
        try:
            RNG[1] += 1
            assert torch.equal(run(recipe, x, w, dy)[1], first[1]) == same
        finally:
            RNG[1] -= 1


def saved_bytes(recipe: Recipe) -> dict[torch.dtype, int]:
    """Bytes that autograd keeps for the backward, by dtype, weight and random state aside."""
    x, w, dy = tensors(6)
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() > 3 and tensor.dtype != torch.float32:
            kept[tensor.dtype] = kept.get(tensor.dtype, 0) + tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(recipe, x, w, dy)
    return kept


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bf16", {torch.bfloat16: 2 * M * K}),
        ("quartet2", {torch.uint8: (M + N) * K // 2, torch.float8_e4m3fn: (M + N) * K // 16}),
        ("nvidia", {torch.uint8: (M + N) * K // 2, torch.float8_e4m3fn: M * K // 16 + N * K // 256}),
        ("nvfp4_rtn", {torch.uint8: M * K // 2, torch.float8_e4m3fn: M * K // 16}),
        ("fp8", {torch.float8_e4m3fn: (M + N) * K}),
        ("fp8_rowwise", {torch.float8_e4m3fn: M * K}),
    ],
)
def test_saves_what_the_recipe_says(name, expected):
    assert saved_bytes(library.load(name)) == expected


def test_nothing_is_saved_without_gradients():
    x, w, _ = tensors(7)
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data.copy_(w)
    layer = QuantLinear(linear, library.load("quartet2"), LAYER, RNG)
    with torch.no_grad():
        y = layer(x.view(2, M // 2, K))
    assert y.shape == (2, M // 2, N) and not y.requires_grad
    assert torch.equal(y.view(M, N), run(library.load("quartet2"), x, w, torch.zeros(M, N).bfloat16())[0])


@pytest.mark.parametrize("name", ["bf16", "quartet2", "nvidia", "fp8"])
def test_frozen_weight_and_detached_input_get_no_gradient(name):
    x, w, dy = tensors(8)
    recipe = library.load(name)
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data.copy_(w)
    layer = QuantLinear(linear, recipe, LAYER, RNG)
    layer(x).backward(dy)
    _, dx, dw = run(recipe, x, w, dy)
    assert torch.equal(linear.weight.grad, dw) and x.grad is None
    linear.weight.grad = None
    linear.weight.requires_grad_(False)
    leaf = x.detach().requires_grad_()
    layer(leaf).backward(dy)
    assert linear.weight.grad is None and torch.equal(leaf.grad, dx)


def test_errors():
    with pytest.raises(ValueError, match="no bias"):
        QuantLinear(nn.Linear(32, 32), library.load("bf16"), 0, RNG)
    with pytest.raises(ValueError, match="takes bfloat16"):
        QuantLinear(nn.Linear(32, 32, bias=False), library.load("bf16"), 0, RNG)(torch.ones(4, 32))


def test_nan_reaches_every_output():
    x, w, dy = tensors(9)
    dy[3, 4] = float("nan")
    _, dx, dw = run(library.load("quartet2"), x, w, dy)
    assert dx.isnan().all() and dw.isnan().all()


def with_fixed_amax(name: str, amax: float) -> Recipe:
    mapping = library.mapping(name)
    for slot in SLOTS:
        gemm, name = slot.split(".")
        mapping[gemm] = mapping[gemm] | {name: mapping[gemm][name] | {"amax": amax}}
    return library.build(mapping)


def test_fixed_amax_takes_the_place_of_the_measured_one():
    x, w, dy = tensors(14)
    got = run(with_fixed_amax("nvfp4_rtn", 3.0), x, w, dy)
    assert not any(torch.equal(a, b) for a, b in zip(got, run(library.load("nvfp4_rtn"), x, w, dy), strict=True))

    def fixed(tensor: Tensor, axis: int) -> Tensor:
        out = quantize(tensor.bfloat16(), RTN, axis, torch.tensor(3.0))
        return out.values.double() * out.scale.double()

    exact = fixed(x, 1) @ fixed(w, 1).t(), fixed(dy, 1) @ fixed(w, 0), fixed(dy, 0).t() @ fixed(x, 0)
    for out, value in zip(got, exact, strict=True):
        torch.testing.assert_close(out.double(), value, rtol=2**-8, atol=1e-6 * value.abs().max())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["quartet2", "nvidia", "fp8"])
def test_a_fixed_amax_hides_no_bad_number(name, bad):
    """docs/numerics.md#6-edges. Without the measured amax Inf would saturate, and packed codes have no NaN."""
    recipe = with_fixed_amax(name, 3.0)
    x, w, dy = tensors(15)
    x[3, 4] = bad
    y, dx, dw = run(recipe, x, w, dy)
    assert y.isnan().all() and dw.isnan().all() and dx.isfinite().all()
    x, w, dy = tensors(15)
    dy[3, 4] = bad
    y, dx, dw = run(recipe, x, w, dy)
    assert y.isfinite().all() and dx.isnan().all() and dw.isnan().all()


def check_compiled(name: str, **options) -> None:
    """fullgraph, forward and backward, with the bits of eager."""
    x, w, dy = tensors(10)
    torch._dynamo.reset()
    eager = run(library.load(name), x, w, dy)
    traced = run(library.load(name), x, w, dy, lambda layer: torch.compile(layer, fullgraph=True, **options))
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


@pytest.mark.parametrize("name", ["fp8_rowwise", "nvidia"])
def test_traces_as_one_graph(name):
    check_compiled(name, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_recipe_traces_through_aot_autograd(name):
    check_compiled(name, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "quartet2", "nvidia"])
def test_inductor_gives_the_same_bits(name):
    """Minutes: Inductor drops BF16 roundings that it fuses, which formats.round_bf16 prevents."""
    check_compiled(name)


def test_steps_do_not_recompile_and_draw_new_bits():
    torch._dynamo.reset()
    x, w, dy = tensors(11)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data.copy_(w)
    rng = torch.tensor([1, 0, 0])
    compiled = torch.compile(QuantLinear(linear, library.load("quartet2"), LAYER, rng), backend=counter, fullgraph=True)
    gradients = []
    for step in range(3):
        rng.copy_(torch.tensor([1, step, step % 2]))
        leaf = x.clone().requires_grad_()
        compiled(leaf).backward(dy)
        gradients.append(leaf.grad)
    assert counter.frame_count == 1
    assert not torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[1], gradients[2])
