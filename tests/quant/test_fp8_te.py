"""Recipe fp8_te. On a CPU the layer runs against tests/quant/fake_te.py; only the gpu tests meet Transformer Engine."""

import io
import sys

import fake_te
import pytest
import torch
from torch import nn

from kernels import backend
from quant import library
from quant.plan import convert, plan_of, unquantized
from quant.products import te as fp8_te
from quant.products.te import Fp8TE, TELinear
from training.nonfinite import describe, examine
from training.start.build import check_recipes

IN, OUT, TOKENS = 32, 48, 16


@pytest.fixture
def te(monkeypatch):
    fake_te.install(monkeypatch)


def make_layer(scaling: str, seed: int = 0) -> TELinear:
    torch.manual_seed(seed)
    return Fp8TE(scaling).build(nn.Linear(IN, OUT, bias=False), 0, torch.zeros(3, dtype=torch.int64))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [2, 8, IN] and dy of a step; amaxes differ from step to step."""
    g = torch.Generator().manual_seed(100 + step)
    x = torch.randn(2, TOKENS // 2, IN, generator=g) * (1 + step)
    dy = torch.randn(2, TOKENS // 2, OUT, generator=g) * 1e-3
    return x.to(torch.bfloat16), dy.to(torch.bfloat16)


def train_step(layer: TELinear, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward and backward of one micro-batch and a plain update; y, dx, dw."""
    x, dy = batch(step)
    x.requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(dy)
    dw = layer.weight.grad
    with torch.no_grad():
        layer.weight -= 0.1 * dw
    return y.detach(), x.grad, dw


# --- the recipe as data ---------------------------------------------------------------------------------------------


def test_recipe_file_is_current_scaling():
    recipe = library.load("fp8_te")
    assert recipe == Fp8TE("current")
    assert library.label(recipe) == "fp8_te/current"
    assert recipe.is_quantized


def small_model() -> nn.Module:
    """Names as in models/llama.py, as far as the plan needs them."""
    block = nn.ModuleDict({"up": nn.Linear(32, 48, bias=False), "down": nn.Linear(48, 32, bias=False)})
    return nn.ModuleDict({"blocks": nn.ModuleList([block]), "lm_head": nn.Linear(32, 64, bias=False)})


def test_plan_gives_layers_to_transformer_engine_and_says_so(te, monkeypatch):
    monkeypatch.setattr(fp8_te, "unavailable", lambda scaling: None)
    mapping = library.mapping("fp8_te") | {"scaling": "delayed", "rules": [{"match": "*.down", "recipe": "bf16"}]}
    model = small_model()
    names = set(model.state_dict())
    made = plan_of(model, mapping)
    assert made.label.startswith("fp8_te/delayed") and made.fullgraph is False
    assert "fp8_te/delayed" in made.table() and made.to_dict()["recipes"]["fp8_te/delayed"]["scaling"] == "delayed"
    convert(model, made, torch.zeros(3, dtype=torch.int64))
    assert isinstance(model["blocks"][0]["up"], TELinear)
    assert not isinstance(model["blocks"][0]["down"], TELinear) and not isinstance(model["lm_head"], TELinear)
    state = {"scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd"}
    assert set(model.state_dict()) - names == {f"blocks.0.up.{name}" for name in state}


def test_plan_of_a_machine_that_lacks_it_fails_before_a_layer_is_replaced():
    model = small_model()
    made = plan_of(model, library.mapping("fp8_te"))
    if fp8_te.unavailable("current") is None:
        pytest.skip("this machine has Transformer Engine and a GPU")
    with pytest.raises(RuntimeError, match=r"recipe fp8_te/current: .*Transformer Engine"):
        convert(model, made, torch.zeros(3, dtype=torch.int64))
    assert not any(isinstance(module, TELinear) for module in model.modules())


def test_scalings_have_different_numerics_records():
    records = [Fp8TE(scaling).to_dict() for scaling in fp8_te.SCALINGS]
    assert records[0] == {"name": "fp8_te", "scheme": "fp8_te", "scaling": "current"}
    assert records[1] == {"name": "fp8_te", "scheme": "fp8_te", "scaling": "delayed", "amax_history": 1024}
    assert records[2]["scaling"] == "block"


def test_mistyped_fields_name_the_right_ones():
    with pytest.raises(ValueError, match="'scalng' of recipe fp8_te; did you mean scaling"):
        Fp8TE.from_dict({"scheme": "fp8_te", "scalng": "block"})
    with pytest.raises(ValueError, match="'tensorwise'; use one of current, delayed, block"):
        Fp8TE.from_dict({"scaling": "tensorwise"})


def test_layer_of_unfit_shape_is_refused_by_name():
    fits, model = small_model(), small_model()
    plan_of(fits, library.mapping("fp8_te")).check_tokens(64)
    with pytest.raises(ValueError, match=r"blocks\.0\.up: the 36 tokens .* multiple of 8 .*batch\.micro"):
        plan_of(fits, library.mapping("fp8_te")).check_tokens(36)
    model["blocks"][0]["down"] = nn.Linear(48, 40, bias=False)
    with pytest.raises(ValueError, match=r"down: 40 features .* multiple of 16.*match: blocks\.0\.down"):
        plan_of(model, library.mapping("fp8_te"))


def test_bias_is_refused():
    with pytest.raises(ValueError, match="bias=False"):
        TELinear(nn.Linear(IN, OUT), Fp8TE(), 0, torch.zeros(3, dtype=torch.int64))


def converted(scaling: str, monkeypatch) -> nn.Module:
    """A model whose layer `blocks.0.up` is Transformer Engine's."""
    monkeypatch.setattr(fp8_te, "unavailable", lambda scaling: None)
    torch.manual_seed(0)
    model = small_model()
    made = plan_of(model, library.mapping("fp8_te") | {"scaling": scaling})
    return convert(model, made, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("scaling", fp8_te.SCALINGS)
def test_evaluation_in_bf16_leaves_transformer_engine_out(te, monkeypatch, scaling):
    """evaluate.bf16=true reports the loss of the unquantized model, not that of FP8 once more."""
    backend.use("reference")
    model = converted(scaling, monkeypatch)
    layer, (x, dy) = model["blocks"][0]["up"], batch(0)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with unquantized(model):
        y = layer(x.requires_grad_())
        y.backward(dy)
    twin = nn.Linear(IN, OUT, bias=False)
    twin.weight.data = layer.weight.detach().clone()
    bf16 = library.load("bf16").build(twin, 0, torch.zeros(3, dtype=torch.int64))
    expected = bf16(x)
    expected.backward(dy)
    assert torch.equal(y, expected) and torch.equal(layer.weight.grad, twin.weight.grad)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    assert not torch.equal(layer(x), y)


@pytest.mark.parametrize("scaling", fp8_te.SCALINGS)
def test_what_transformer_engine_makes_non_finite_is_not_blamed_on_the_data(te, monkeypatch, scaling):
    backend.use("reference")
    model = converted(scaling, monkeypatch)
    layer = model["blocks"][0]["up"]

    def replay():
        y = layer(batch(0)[0]) * (float("nan") if layer.recipe.is_quantized else 1.0)
        return None if y.isfinite().all() else {"tensor": "y", "gemm": "fprop", "layer": "blocks.0.up"}

    finding = examine(model, 0, replay)
    assert finding.bf16_is_finite
    said = describe([finding], [])
    assert "the recipe is the cause" in said and "alone" not in said  # its GEMMs can't be parted


@pytest.mark.parametrize(("scaling", "fits"), [("current", True), ("block", True), ("delayed", False)])
def test_recomputation_is_refused_only_where_it_would_move_the_history(te, monkeypatch, scaling, fits):
    monkeypatch.setattr(fp8_te, "unavailable", lambda scaling: None)
    made = plan_of(small_model(), library.mapping("fp8_te") | {"scaling": scaling})
    if fits:
        return check_recipes(made, recompute=True)
    with pytest.raises(ValueError, match="recipe fp8_te/delayed; set recompute=false"):
        check_recipes(made, recompute=True)


# --- where it can't run ---------------------------------------------------------------------------------------------


def test_absent_transformer_engine_says_how_to_install(monkeypatch):
    monkeypatch.setattr(fp8_te, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"recipe fp8_te/block: .*not installed.*pip install .*'nibble-train\[te\]'"):
        Fp8TE("block").require()


def test_machine_without_gpu_is_refused_before_import(monkeypatch):
    monkeypatch.setattr(fp8_te, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA GPU"):
        Fp8TE().require()


def test_broken_installation_is_reported_with_its_error(monkeypatch):
    monkeypatch.setattr(fp8_te, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(
        RuntimeError, match=r"does not import \(.*transformer_engine.*\); on a CUDA machine: pip install"
    ):
        Fp8TE().require()


# --- the layer, against the stand-in --------------------------------------------------------------------------------


def test_gradients_are_those_of_the_rounded_operands_and_dw_keeps_fp32(te):
    layer = make_layer("current")
    weight = layer.weight.detach().clone()
    x, dy = batch(0)
    y, dx, dw = train_step(layer, 0)

    def rounded(tensor, dtype):
        return fake_te.round_to(tensor, fake_te.DTYPE_MAX[dtype] / tensor.float().abs().max(), dtype)

    xq, wq = rounded(x, torch.float8_e4m3fn), rounded(weight.to(torch.bfloat16), torch.float8_e4m3fn)
    dyq = rounded(dy, torch.float8_e5m2)
    assert torch.equal(y, (xq @ wq.T).to(torch.bfloat16))
    assert torch.equal(dx, (dyq @ wq).to(torch.bfloat16))
    expected = dyq.flatten(0, 1).T @ xq.flatten(0, 1)
    assert dw.dtype == torch.float32 and torch.equal(dw, expected)
    assert not torch.equal(dw, dw.to(torch.bfloat16).float())  # a BF16 dW would pass the line above only by accident


def test_micro_batches_accumulate(te):
    layer = make_layer("current")
    parts = []
    for step in (0, 1):
        x, dy = batch(step)
        layer.weight.grad = None
        layer(x.requires_grad_()).backward(dy)
        parts.append(layer.weight.grad.clone())
    layer.weight.grad = None
    for step in (0, 1):
        x, dy = batch(step)
        layer(x.requires_grad_()).backward(dy)
    assert torch.equal(layer.weight.grad, parts[0] + parts[1])


def test_state_dict_is_the_weight_and_plain_tensors(te):
    linear = nn.Linear(IN, OUT, bias=False)
    layer = Fp8TE("delayed").build(linear, 0, torch.zeros(3, dtype=torch.int64))
    assert layer.weight is linear.weight
    assert set(make_layer("current").state_dict()) == {"weight"}
    train_step(layer, 0)
    state = layer.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes == {
        "weight": (OUT, IN),
        "scale_fwd": (3,),
        "amax_history_fwd": (1024, 3),
        "scale_bwd": (2,),
        "amax_history_bwd": (1024, 2),
    }
    assert all(value.dtype == torch.float32 for value in state.values())


def test_delayed_scale_follows_the_largest_amax_of_the_window(te, monkeypatch):
    monkeypatch.setattr(fp8_te, "AMAX_HISTORY", 4)
    layer = make_layer("delayed")
    assert layer.scale_fwd.tolist() == [1, 1, 1] and layer.scale_bwd.tolist() == [1, 1]
    x_amaxes, dy_amaxes = [], []
    for step in (5, 2, 1, 0, 0, 0):
        x, dy = batch(step)
        x_amaxes.append(float(x.abs().max()))
        dy_amaxes.append(float(dy.abs().max()))
        train_step(layer, step)
        # Row 0 collects, so a window of 4 rows remembers 3 finished micro-batches and the one just ending.
        assert float(layer.scale_fwd[0]) == pytest.approx(448 / max(x_amaxes[-4:]), rel=1e-6)
        assert float(layer.scale_bwd[0]) == pytest.approx(57344 / max(dy_amaxes[-4:]), rel=1e-6)
    assert x_amaxes[0] > max(x_amaxes[-4:])  # the first is forgotten by now
    assert layer.amax_history_fwd[0].tolist() == [0, 0, 0]


def test_delayed_scaling_saturates_for_one_step_when_amax_jumps(te):
    layer = make_layer("delayed")
    x, _ = batch(0)
    for _ in range(2):
        layer(x)
    exact = (x.float() * 64) @ layer.weight.detach().to(torch.bfloat16).float().T
    first, second = layer(x * 64).detach().float(), layer(x * 64).detach().float()
    assert float((first - exact).norm() / exact.norm()) > 0.9
    assert float((second - exact).norm() / exact.norm()) < 0.06  # two E4M3 operands: 0.04 on Gaussian data


def test_resume_continues_bitwise(te):
    straight = make_layer("delayed")
    for step in range(3):
        train_step(straight, step)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    resumed = make_layer("delayed", seed=1)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in (1, 0):
        for a, b in zip(train_step(straight, step), train_step(resumed, step), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(straight.amax_history_bwd, resumed.amax_history_bwd)


def test_state_loaded_into_new_tensors_is_used(te):
    straight, other = make_layer("delayed"), make_layer("delayed", seed=1)
    for step in range(2):
        train_step(straight, step)
        train_step(other, 0)
    other.load_state_dict({k: v.clone() for k, v in straight.state_dict().items()}, assign=True)
    for a, b in zip(train_step(straight, 2), train_step(other, 2), strict=True):
        assert torch.equal(a, b)


def test_evaluation_leaves_the_state_untouched(te):
    layer, twin = make_layer("delayed"), make_layer("delayed")
    for step in range(2):
        train_step(layer, step)
        train_step(twin, step)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        layer(batch(0)[0] * 1000)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    for a, b in zip(train_step(layer, 2), train_step(twin, 2), strict=True):
        assert torch.equal(a, b)


def test_other_recipe_without_quantization_gives_the_bf16_product(te):
    layer = make_layer("delayed")
    train_step(layer, 0)
    before = layer.amax_history_fwd.clone()
    x, _ = batch(1)
    own, layer.recipe = layer.recipe, library.load("bf16")
    with torch.no_grad():
        y = layer(x)
    layer.recipe = own
    assert torch.equal(y, nn.functional.linear(x, layer.weight.to(torch.bfloat16)))
    assert torch.equal(layer.amax_history_fwd, before)


def test_amax_is_the_largest_over_ranks(te, monkeypatch):
    layer = make_layer("delayed")
    monkeypatch.setattr(fp8_te.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(fp8_te.dist, "get_world_size", lambda: 2)
    asked = []
    # The other rank saw twice as much.
    monkeypatch.setattr(fp8_te.dist, "all_reduce", lambda tensor, op: (asked.append(op), tensor.mul_(2)))
    x, _ = batch(0)
    train_step(layer, 0)
    assert asked == [torch.distributed.ReduceOp.MAX] * 2
    assert float(layer.scale_fwd[0]) == pytest.approx(448 / (2 * float(x.abs().max())), rel=1e-6)


def test_version_that_ignores_our_buffers_is_refused(te):
    layer = make_layer("delayed")
    layer(batch(0)[0])
    layer.engine.linear.fp8_meta["scaling_fwd"].amax_history = torch.zeros(1024, 3)
    with pytest.raises(RuntimeError, match="did not take over this layer's amax buffers"):
        layer(batch(0)[0])


def test_float32_input_is_refused(te):
    with pytest.raises(ValueError, match=r"takes bfloat16 .* got torch\.float32"):
        make_layer("current")(torch.zeros(8, IN))


def test_compiled_model_breaks_its_graph_at_the_layer_and_agrees(te):
    model = nn.Sequential(nn.Identity(), make_layer("current"), nn.GELU())
    x, _ = batch(0)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager")(x), model(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(x)


# --- Transformer Engine itself --------------------------------------------------------------------------------------

gpu = pytest.mark.gpu


@pytest.fixture
def real_te():
    reason = fp8_te.unavailable("block")
    if reason:
        pytest.skip(reason)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b).norm() / b.norm())


def cuda_case(scaling: str, seed: int = 0):
    torch.manual_seed(seed)
    layer = Fp8TE(scaling).build(nn.Linear(512, 768, bias=False, device="cuda"), 0, torch.zeros(3, device="cuda"))
    x = torch.randn(4, 256, 512, device="cuda").to(torch.bfloat16)
    dy = (torch.randn(4, 256, 768, device="cuda") * 1e-4).to(torch.bfloat16)
    return layer, x, dy


def cuda_step(layer, x, dy):
    x = x.detach().requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad.clone()


@gpu
@pytest.mark.parametrize("scaling", fp8_te.SCALINGS)
def test_products_are_fp8_close_to_exact(real_te, scaling):
    layer, x, dy = cuda_case(scaling)
    for _ in range(3):  # delayed scaling starts without a history
        y, dx, dw = cuda_step(layer, x, dy)
    x32, dy32, w = x.float(), dy.float(), layer.weight.detach().to(torch.bfloat16).float()
    exact = {"y": x32 @ w.T, "dx": dy32 @ w, "dw": dy32.flatten(0, 1).T @ x32.flatten(0, 1)}
    assert y.dtype == dx.dtype == torch.bfloat16 and dw.dtype == torch.float32
    for name, value in {"y": y, "dx": dx, "dw": dw}.items():
        # E4M3 x E4M3 0.037, E5M2 x E4M3 0.059 (docs/published.md#4-quantizer-errors); below 0.01 it would not be FP8
        # at all.
        assert 0.01 < relative(value, exact[name]) < 0.08, name


@gpu
def test_current_scaling_is_our_fp8_definition(real_te):
    layer, x, dy = cuda_case("current")
    y, dx, dw = cuda_step(layer, x, dy)

    def rounded(tensor, dtype):
        scale = fake_te.DTYPE_MAX[dtype] / tensor.float().abs().max()
        return (tensor.float() * scale).to(dtype).double() / scale.double()

    xq, wq = rounded(x, torch.float8_e4m3fn), rounded(layer.weight.detach().to(torch.bfloat16), torch.float8_e4m3fn)
    dyq = rounded(dy, torch.float8_e5m2)
    # BF16 outputs carry 2^-9 at most, 1.2e-3 in the mean; fprop's short accumulator adds about as much. dW is FP32 with
    # promotion: had it passed through BF16 it would miss 5e-4.
    assert relative(y, (xq @ wq.T).float()) < 3e-3
    assert relative(dx, (dyq @ wq).float()) < 2e-3
    assert relative(dw, (dyq.flatten(0, 1).T @ xq.flatten(0, 1)).float()) < 5e-4


@gpu
def test_delayed_state_is_ours_and_resumes_bitwise(real_te):
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    layer, x, dy = cuda_case("delayed")
    for factor in (1, 4, 2):
        cuda_step(layer, x * factor, dy * factor)
    assert not FP8GlobalStateManager.quantization_state.global_amax_buffer
    assert float(layer.scale_fwd[0]) == pytest.approx(448 / (4 * float(x.abs().max())), rel=1e-6)
    assert float(layer.scale_bwd[0]) == pytest.approx(57344 / (4 * float(dy.abs().max())), rel=1e-6)
    resumed, _, _ = cuda_case("delayed", seed=1)
    resumed.load_state_dict(layer.state_dict())
    with torch.no_grad():
        layer(x * 1000)
    for a, b in zip(cuda_step(layer, x, dy), cuda_step(resumed, x, dy), strict=True):
        assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("scaling", fp8_te.SCALINGS)
def test_compiled_training_follows_eager(real_te, scaling):
    def losses(compiled: bool) -> list[float]:
        first, x, _ = cuda_case(scaling)
        second = Fp8TE(scaling).build(nn.Linear(768, 512, bias=False, device="cuda"), 1, torch.zeros(3, device="cuda"))
        model = nn.Sequential(first, nn.SiLU(), second)
        run = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        out = []
        for _ in range(20):
            loss = (run(x).float() - x.float()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            out.append(float(loss))
        return out

    eager, compiled = losses(False), losses(True)
    assert eager[-1] < 0.7 * eager[0]
    assert compiled == pytest.approx(eager, rel=0.02)
