"""Products around six slots against their formulas in FP64, written here a second time, and blocks worked by hand."""

from functools import reduce

import pytest
import torch
from torch import Tensor, nn

from kernels import backend
from kernels import gemm as gemms
from kernels import quantize as ops
from kernels.rotation import restored
from kernels.spec import MXFP4_SCALES
from launcher.compose import compose
from models.llama import Llama, LlamaConfig
from quant import library
from quant.linear import Call, QuantLinear
from quant.plan import plan_of
from quant.product import Product
from quant.products.mean_split import quantized, split
from training.start.memory import kept_of

M, K, N = 128, 128, 256
RNG, LAYER = torch.tensor([1, 2, 3]), 7
CALL = Call(RNG, torch.tensor(LAYER))
E2M1 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
SCHEMES = ["averis", "quartet2_averis", "quartet1"]


@pytest.fixture(autouse=True)
def reference():
    backend.use("reference")


@pytest.fixture(scope="module")
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """X with a mean in some channels and outliers in others; W; dY with a mean."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(M, K, generator=g) + (torch.rand(K, generator=g) < 0.05) * 8
    x[:, ::16] *= 1 + 9 * (torch.rand(M, K // 16, generator=g) < 0.1)
    dy = (torch.randn(M, N, generator=g) + torch.randn(N, generator=g)) * 1e-3
    return x.bfloat16(), torch.randn(N, K, generator=g) * 0.05, dy.bfloat16()


def build(name: str, **changes) -> Product:
    return library.build(library.mapping(name) | changes)


def run(recipe, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y, dX, dW in FP64 of one layer."""
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.data.copy_(w)
    leaf = x.clone().requires_grad_()
    y = QuantLinear(linear, recipe, LAYER, RNG)(leaf)
    y.backward(dy)
    return y.detach().double(), leaf.grad.double(), linear.weight.grad.double()


def error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


# --- trust mask -------------------------------------------------------------------------------------------------------


def transform(x: Tensor) -> Tensor:
    """x H in FP64, H of 32 as a power of Kronecker products."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    h = reduce(torch.kron, [two] * 5) / 32**0.5
    return (x.double().view(x.shape[0], -1, 32) @ h).view(x.shape)


def quest(x: Tensor) -> tuple[Tensor, Tensor]:
    """(Q(x), where |x| is within 6 scales) of FP64 x, block by block of 32."""
    blocks = x.view(x.shape[0], -1, 32)
    std = blocks.square().mean(-1, keepdim=True).sqrt()
    scale = torch.exp2((2.92247856 / 6 * std).log2().round())
    z = blocks / scale
    odd = (torch.arange(15) - 7) % 2  # of a level's code: ties go to the even one
    nearest = E2M1[((z.unsqueeze(-1) - E2M1).abs() + 1e-9 * odd).argmin(-1)]
    return (nearest * scale).view(x.shape), (z.abs() <= 6).view(x.shape)


def test_quartet1_is_quests_forward_and_masks_what_it_clipped(tensors):
    """With an exact backward: dX = (Mx (dY Wh)) H, dW = (Mw (dY^T Xh)) H."""
    x, w, dy = tensors
    y, dx, dw = run(build("quartet1", dgrad="none", wgrad="none"), x, w, dy)
    (xh, mx), (wh, mw) = (quest(transform(a.bfloat16()).bfloat16().double()) for a in (x, w))
    assert 0 < (~mx).double().mean() < 0.05 and 0 < (~mw).double().mean() < 0.05
    assert error(y, xh @ wh.t()) < 3e-3
    assert error(dx, transform(mx * (dy.double() @ wh))) < 4e-3
    assert error(dw, transform(mw * (dy.double().t() @ xh))) < 1e-5
    assert transform(dw)[~mw].abs().max() < 1e-6 * dw.abs().max()
    assert error(dw, transform(dy.double().t() @ xh)) > 0.05  # the mask does something


def test_quartet1s_dx_is_rounded_once(tensors):
    """Behind the transform, as docs/numerics.md#2-dtypes has it: half a step of BF16, and FP32's own error."""
    x, w, dy = tensors
    dx = run(build("quartet1", dgrad="none", wgrad="none"), x, w, dy)[1]
    (wh, _), (_, mx) = (quest(transform(a.bfloat16()).bfloat16().double()) for a in (w, x))
    exact = transform(mx * (dy.double() @ wh))
    assert ((dx.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()


def test_quartet1s_backward_averages_to_that_of_its_forward(tensors):
    """SR of 3/4 under floor scales clips nothing: the mean over random bits comes near at the rate of a mean."""
    x, w, dy = tensors
    recipe = build("quartet1")
    exact = run(build("quartet1", dgrad="none", wgrad="none"), x, w, dy)[1:]
    total = [torch.zeros_like(e) for e in exact]
    for step in range(1, 65):
        RNG[1] = step
        total = [t + g for t, g in zip(total, run(recipe, x, w, dy)[1:], strict=True)]
    RNG[1] = 2
    once, many = run(recipe, x, w, dy)[1:], [t / 64 for t in total]
    for one, mean, e in zip(once, many, exact, strict=True):
        assert error(mean, e) < error(one, e) / 6 < 0.06


def test_a_block_by_hand():
    """8 alone among 32: rms 1.414, reach 4.133, scale 2^round(log2 .689) = 1/2, so that 8 is clipped to 3. Ones: rms 1,
    scale 2^round(log2 .487) = 1/2, exact."""
    recipe = build("quartet1")
    spec = recipe.operand("fprop.x").spec
    x = torch.zeros(2, 32)
    x[0, 3], x[1] = 8.0, 1.0
    made = ops.quantize(x.bfloat16(), spec, 1, ops.amax(x.bfloat16(), 1))
    assert (
        made.values[0].tolist() == [3.0 if i == 3 else 0.0 for i in range(32)] and made.values[1].tolist() == [1] * 32
    )
    mask = recipe.mask("fprop.x", x)
    assert mask.bits.tolist() == [[0b11110111, 255, 255, 255], [255] * 4]
    assert mask.applied(torch.ones(2, 32))[0, :5].tolist() == [1, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hadamard": 48}, r"quant\.hadamard=48; use one of 16, 32"),
        (
            {"fprop": {"rotation": {"dim": 32}, "x": {"grid": "none"}, "w": {"grid": "none"}}},
            "source=fprop|leave it out",
        ),
        (
            {"fprop": {"x": {"grid": "e2m1"}, "w": {"grid": "none"}}},
            r"fprop\.x: .*scales \[1x32 e8m0\] with rounding=rtn",
        ),
        ({"hadamrad": 32}, "unknown field 'hadamrad'"),
    ],
)
def test_what_a_trust_mask_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        build("quartet1", **change)


def test_clipping_scales_take_rounding_to_nearest_alone():
    mapping = library.mapping("quartet1")
    mapping["dgrad"]["dy"] = {
        "grid": "e2m1",
        "scales": ["1x32 e8m0"],
        "scale_rule": "rms",
        "rounding": "sr",
        "prescale": 0.75,
    }
    with pytest.raises(ValueError, match=r"dgrad\.dy: scale_rule=rms .* use scale_rule=floor with prescale=0\.75"):
        library.build(mapping)


# --- mean split -------------------------------------------------------------------------------------------------------


def averis(r, w, s, mq, nq) -> tuple[Tensor, Tensor, Tensor]:
    """Y, dX, dW of what was split, in FP64: columns of ones written out."""
    one = torch.ones(r.shape[0], 1, dtype=torch.float64)
    y = r @ w.t() + one @ (w @ mq.t()).t()
    dx = s @ w + one @ (w.t() @ nq.t()).t()
    return y, dx, s.t() @ r + (s.t() @ one) @ mq + nq.t() @ (r.t() @ one + r.shape[0] * mq.t()).t()


def test_the_formulas_are_the_plain_products_where_nothing_is_rounded(tensors):
    x, w, dy = (t.double() for t in tensors)
    mu, nu = x.mean(0, keepdim=True), dy.mean(0, keepdim=True)
    for got, exact in zip(averis(x - mu, w, dy - nu, mu, nu), (x @ w.t(), dy @ w, dy.t() @ x), strict=True):
        assert error(got, exact) < 1e-14


@pytest.mark.parametrize("name", ["averis", "quartet2_averis"])
def test_a_mean_split_is_its_formulas(name, tensors, monkeypatch):
    """On the operands that went into the three GEMMs, turned back by hand; means quantized by a layer of one row."""
    x, w, dy = tensors
    seen, gemm = {}, gemms.gemm

    def spy(a, b, kind, alpha, out_dtype):
        seen[kind] = [(q.values.float() * q.scale) for q in (a, b)]
        return gemm(a, b, kind, alpha, out_dtype)

    monkeypatch.setattr(gemms, "gemm", spy)
    recipe = build(name)
    y, dx, dw = run(recipe, x, w, dy)
    turned = {}
    for number, kind in enumerate(("fprop", "dgrad", "wgrad")):
        rotation, parts = recipe.gemm(kind).rotation, seen[kind]
        if rotation.dim:
            signs = ops.rotation(CALL.rng, CALL.layer, number, rotation.dim, 1, rotation.signs)
            axis = {"dgrad": (1, 0), "wgrad": (0, 0)}[kind]
            parts = [
                restored(p.contiguous(), signs) if a else restored(p.t().contiguous(), signs).t()
                for p, a in zip(parts, axis, strict=True)
            ]
        turned[kind] = [part.double() for part in parts]
    mu, nu = (t.float().mean(0, keepdim=True).bfloat16() for t in (x, dy))
    mq, nq = (quantized(CALL, *given).double() for given in ((mu, recipe.mean_x), (nu, recipe.mean_dy)))
    assert 0.02 < error(mq, mu.double()) < 0.2 and 0.02 < error(nq, nu.double()) < 0.3
    (r, wf), (sd, wd), (sw, rw) = turned["fprop"], turned["dgrad"], turned["wgrad"]
    assert error(y, averis(r, wf, sd, mq, nq)[0]) < 3e-3
    one = torch.ones(M, 1, dtype=torch.float64)
    assert error(dx, sd @ wd + one @ (wf.t() @ nq.t()).t()) < 3e-3
    assert error(dw, averis(rw, wf, sw, mq, nq)[2]) < 1e-5
    assert error(dw, sw.t() @ rw) > 0.1  # the means matter


def test_a_planted_mean_costs_little():
    """12.6 in one channel of twenty: the error of X relative to X, about .095, and .105 behind a Hadamard transform of
    16, is .032 with the mean taken out and .038 with the mean quantized too."""
    x = torch.randn(256, 1280, generator=torch.Generator().manual_seed(2))
    x = (x + 12.6 * (torch.arange(1280) % 20 == 3)).bfloat16()
    recipe = build("averis")
    spec = recipe.operand("fprop.x").spec

    def made(operand: Tensor, signs: Tensor | None = None) -> Tensor:
        found = ops.quantize(operand, spec, 1, ops.amax(operand, 1, signs), signs)
        return found.values * found.scale

    signs = ops.rotation(CALL.rng, CALL.layer, 0, 16, 1, "random")
    mean, rest = split(x)
    assert 0.085 < error(made(x).double(), x.double()) < error(restored(made(x, signs), signs).double(), x.double())
    assert 0.03 < error((made(rest) + quantized(CALL, mean, recipe.mean_x)).double(), x.double()) < 0.04


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fprop": {"rotation": {"dim": 16}, "x": {"grid": "e2m1"}, "w": {"grid": "e2m1"}}}, r"rotat"),
        (
            {"fprop": {"x": {"grid": "hif4"}, "w": {"grid": "e2m1"}}},
            r"fprop\.x: .* use scales \[tensor fp32, 1x16 e4m3\]",
        ),
    ],
)
def test_what_a_mean_split_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        build("averis", dgrad={"dy": {"grid": "none"}, "w": {"grid": "none"}}, **change)


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_the_memory_planner_knows_what_is_kept(name, tensors):
    x = tensors[0]
    linear = nn.Linear(K, N, bias=False)
    y = QuantLinear(linear, build(name), LAYER, RNG)(x.clone().requires_grad_())
    saved = [t for t in y.grad_fn.next_functions[0][0].saved_tensors if t is not linear.weight]
    got = sum(t.nbytes for t in saved if t.numel() > 3)
    kept = build(name).kept_bytes()
    assert got == pytest.approx(kept.inputs * M * K + kept.weights * N * K, abs=4 * K)  # a mean: one FP32 row


@pytest.mark.slow  # Dynamo traces the reference quantizers operation by operation: half a minute each
@pytest.mark.parametrize("name", SCHEMES)
def test_it_compiles_without_a_graph_break(name, tensors):
    torch.compiler.reset()
    x, w, dy = tensors
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data.copy_(w)
    layer = QuantLinear(linear, build(name), LAYER, RNG)
    leaf = x.clone().requires_grad_()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(leaf)
    y.backward(dy)
    for got, eager in zip((y, leaf.grad, linear.weight.grad), run(build(name), x, w, dy), strict=True):
        assert torch.equal(got.double(), eager)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_start_screen_shows_slots_and_scheme(name):
    with torch.device("meta"):
        plan = plan_of(Llama(LlamaConfig(1, 256, 2, 256, vocab_size=64)), compose([f"quant={name}"]).config.quant)
    lines = plan.table().splitlines()
    assert all(any(line.lstrip().startswith(slot) for line in lines) for slot in ("fprop.x", "dgrad.w", "wgrad.x"))
    assert any(line.split()[0] == build(name).scheme for line in lines)
    assert kept_of(plan).is_quantized


def test_a_gemm_left_out_keeps_the_scheme():
    recipe = library.build(compose(["quant=averis", "quant.dgrad=none"]).config.quant)
    assert recipe.scheme == "mean_split" and library.label(recipe) == "averis dgrad=none"
    assert recipe.alone()["wgrad"].scheme == "mean_split"
    assert build("quartet1").operand("fprop.x").spec.scales == MXFP4_SCALES
