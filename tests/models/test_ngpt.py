"""nGPT against a plain FP64 reimplementation, its counts, its unit vectors, its start."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend
from kernels.quantize import reference_impl
from launcher.compose import compose
from models.ngpt import Ngpt, NgptConfig, norm
from models.unit import COLUMNS, ROWS, unit
from quant.library import mapping
from quant.plan import Precision, plan_of
from training.export import check_exportable
from training.loss import LossModel
from training.optim.groups import build_optimizers
from training.start.build import build_model
from training.start.derive import derive
from training.start.shapes import model_of, shape_of

TINY = NgptConfig(layers=2, width=32, heads=2, hidden=48, vocab_size=50, max_seq_len=16)


def tiny_model(seed: int = 3) -> Ngpt:
    """FP32, with every learned vector away from its neutral start; some of alpha are negative."""
    model = Ngpt(TINY, compute_dtype=torch.float32)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 3.0, generator=generator))
            if name.endswith("alpha"):
                parameter.mul_(5.0)[::3].neg_()
    return model


def plain_unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def plain_forward(w: dict[str, Tensor], tokens: Tensor, shape: NgptConfig = TINY, linear=F.linear) -> Tensor:
    """One sequence [T] -> logits [T, V], position by position, in FP64. `linear`: of the blocks."""
    length, half, root = len(tokens), shape.head_dim // 2, math.sqrt(shape.width)
    angle = torch.arange(length)[:, None] * 1e4 ** -(torch.arange(half, dtype=torch.float64) / half)

    def turn(x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(z).flatten(-2)

    h = w["embed.weight"][tokens]
    for layer in range(shape.layers):
        p, heads = f"blocks.{layer}.", []
        qkv = linear(h, w[f"{p}attn.qkv.weight"]).chunk(3, -1)
        for head in range(shape.heads):
            here = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
            q, k, v = (part[:, here] for part in qkv)
            scale, out = w[f"{p}attn.qk_scale"][here] * root, []
            q, k = plain_unit(turn(q)) * scale, plain_unit(turn(k)) * scale
            for i in range(length):
                scores = (k[: i + 1] @ q[i]) * math.sqrt(shape.head_dim)
                out.append(scores.softmax(0) @ v[: i + 1])
            heads.append(torch.stack(out))
        a = plain_unit(linear(plain_unit(torch.cat(heads, -1)), w[f"{p}attn.out.weight"]))
        h = plain_unit(h + (w[f"{p}attn_alpha"] * 0.05 * root).abs() * (a - h))
        gate, up = (linear(h, w[f"{p}mlp.gate_up.weight"]) * w[f"{p}mlp.uv_scale"] * root).chunk(2, -1)
        z = plain_unit(gate / (1 + (-gate).exp()) * up)
        b = plain_unit(linear(z, w[f"{p}mlp.down.weight"]))
        h = plain_unit(h + (w[f"{p}mlp_alpha"] * 0.05 * root).abs() * (b - h))
    return (h @ w["lm_head.weight"].T) * w["logit_scale"] * root


def test_forward_agrees_with_a_plain_fp64_reimplementation():
    model = tiny_model()
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    weights = {name: value.double() for name, value in model.state_dict().items()}
    expected = torch.stack([plain_forward(weights, row) for row in tokens])
    assert expected.abs().max() > 1
    # FP32 against FP64 through 2 layers: some hundred roundings of 6e-8 on values of size 1.
    torch.testing.assert_close(model(tokens).double(), expected, atol=1e-5, rtol=0)


class StraightThrough(torch.autograd.Function):
    """x W^T as ngpt_nvfp4 multiplies it, and the gradients that its stochastic rounding has on average, in FP64."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(quantized(w, "fprop.w", 1), quantized(x, "wgrad.x", 0))
        return quantized(x, "fprop.x", 1) @ quantized(w, "fprop.w", 1).T

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        w, x = ctx.saved_tensors
        return dy @ w, dy.T @ x


def quantized(x: Tensor, slot: str, axis: int) -> Tensor:
    spec, one = Precision.from_dict(mapping("ngpt_nvfp4")).recipe.operand(slot).spec, torch.ones(())
    made = reference_impl.quantize(x.bfloat16(), spec, axis, one, None, None, ("values",))
    return made.values.double() * made.scale.double()


def mean_gradients(shape: NgptConfig, weights: dict[str, Tensor], recipe: str, tokens: Tensor, draws: int):
    with torch.device("meta"):
        plan = plan_of(model_of(shape), mapping(recipe))
    rng = torch.zeros(3, dtype=torch.int64)
    model = build_model(shape, plan, 0, rng)[0]
    model.load_state_dict(weights)
    for draw in range(draws):
        rng[1] = draw
        (F.cross_entropy(model(tokens[None, :-1])[0].float(), tokens[1:], reduction="sum") / draws).backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


def test_gradients_agree_with_fp64_autograd():
    """BF16's with the plain model's: roundings of 2^-9. ngpt_nvfp4's, mean of 16 draws of .2 each, with those of the
    plain model that multiplies the same codes, but for codes that BF16 between the linears changes."""
    backend.use("reference", "cpu")
    shape = NgptConfig(layers=2, width=64, heads=2, hidden=96, vocab_size=50, max_seq_len=64)
    model = Ngpt(shape, compute_dtype=torch.float32)
    model.init_weights(3)
    model.logit_scale.data.mul_(4)
    tokens = torch.randint(0, 50, (65,), generator=torch.Generator().manual_seed(0))
    for recipe, draws, linear, limit in (("bf16", 1, F.linear, 0.015), ("ngpt_nvfp4", 16, StraightThrough.apply, 0.15)):
        weights = {name: value.double().requires_grad_() for name, value in model.state_dict().items()}
        logits = plain_forward(weights, tokens[:-1], shape, linear)
        F.cross_entropy(logits, tokens[1:], reduction="sum").backward()
        for name, got in mean_gradients(shape, model.state_dict(), recipe, tokens, draws).items():
            expected = weights[name].grad
            assert (got - expected).norm() < limit * expected.norm(), (recipe, name)


@pytest.mark.parametrize(("preset", "parameters"), [("ngpt_30m", 30_507_264), ("ngpt_100m", 102_830_080)])
def test_parameter_counts_of_the_presets(preset, parameters):
    config = compose([f"model={preset}", "data=text", "data.files=x.txt"]).config
    shape = shape_of(config, 1000)
    with torch.device("meta"):
        model = model_of(shape)
    assert shape.parameters_non_embedding == parameters
    assert shape.parameters == parameters + 2000 * shape.width + 1000 == sum(p.numel() for p in model.parameters())
    groups = build_optimizers(model, config.optim, 1e-3)[0].param_groups
    assert config.optim.weight_decay > 0 and [group["weight_decay"] for group in groups] == [0.0]


def test_vectors_get_length_one_by_hand():
    matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -1e-30]])
    assert torch.equal(unit(matrix, ROWS), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]]))
    assert torch.equal(unit(matrix.T.contiguous(), COLUMNS), unit(matrix, ROWS).T)
    many = unit(torch.randn(300, 200, generator=torch.Generator().manual_seed(0)), ROWS)
    assert torch.equal(unit(many, ROWS), many)  # once is enough


def test_everything_starts_at_length_one():
    config = NgptConfig(2, 256, 2, 512, 1000, 16)
    model = Ngpt(config, compute_dtype=torch.float32)
    assert model.init_weights(0) == Ngpt(config).init_weights(0) != model.init_weights(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            over = COLUMNS if name.endswith(("out.weight", "down.weight")) else ROWS
            lengths = parameter.double().norm(dim=over)
            torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-6, rtol=0, msg=name)
    tokens = torch.arange(16)[None]
    hidden, logits = model.hidden(tokens).double(), model(tokens)
    torch.testing.assert_close(hidden.norm(dim=-1), torch.ones(1, 16).double(), atol=2e-6, rtol=0)
    others = logits[0].masked_select(F.one_hot(tokens[0], 1000) == 0)
    assert others.std().item() == pytest.approx(1 / 16, rel=0.05)  # D^-1/2


def test_no_linear_reads_more_than_the_recipes_amax():
    """Rounded to BF16, wherever the learned vectors have gone."""
    model, seen = tiny_model(), []
    model.blocks[0].mlp.uv_scale.data.mul_(100)  # a hidden state of thousands, before its norm
    for module in model.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given: seen.append(given[0].bfloat16().abs().max().item()))
            assert module.weight.bfloat16().abs().max() <= 1
    model(torch.arange(16)[None])
    recipe = Precision.from_dict(mapping("ngpt_nvfp4")).recipe
    assert len(seen) == 8 and max(seen) <= 1.0
    assert {recipe.operand(slot).amax for slot in ("fprop.x", "fprop.w", "dgrad.w", "wgrad.x")} == {1.0}


def test_one_graph_whose_loss_is_that_of_the_logits():
    """No break in what training compiles; and the loss has the logits' scales."""
    shape = NgptConfig(layers=1, width=128, heads=1, hidden=256, vocab_size=300, max_seq_len=128)
    backend.use("reference", "cpu")
    with torch.device("meta"):
        plan = plan_of(model_of(shape), mapping("bf16"))
    tokens = torch.randint(0, 300, (1, 129), generator=torch.Generator().manual_seed(0))
    plain, compiled = (LossModel(build_model(shape, plan, 0, torch.zeros(3, dtype=torch.int64))[0]) for _ in range(2))
    for model in (plain, compiled):
        with torch.no_grad():
            model.model.logit_scale.mul_(torch.linspace(10, 30, 300))
    compiled.compile(fullgraph=True, dynamic=False, backend="eager")
    losses = [model(tokens) for model in (plain, compiled)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    for (name, a), (_, b) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) and a.grad.any(), name
    expected = F.cross_entropy(plain.model(tokens[:, :-1])[0].float(), tokens[0, 1:], reduction="sum")
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_what_it_refuses_says_why():
    with pytest.raises(ValueError, match=r"optim=muon isn't possible with model=ngpt_30m.*length one.*optim=adamw"):
        derive(compose(["model=ngpt_30m", "optim=muon", "data=text", "data.files=x"]).config, 30_507_264, 1)
    with pytest.raises(ValueError, match=r"Ngpt can't be exported to transformers.*norms and scales"):
        check_exportable(tiny_model())
    for word in ("model.residual_dtype=bfloat16", "model.norm_eps=0.001"):
        with pytest.raises(ValueError, match=f"{word}: model.family=ngpt has none"):
            shape_of(compose(["model=ngpt_30m", word, "data=text", "data.files=x"]).config, 300)
    with pytest.raises(ValueError, match="17 positions; the model was built for 16"):
        tiny_model().hidden(torch.zeros(1, 17, dtype=torch.int64))


def test_norm_is_the_released_codes():
    assert norm(torch.tensor([3e-3, 4e-3])).tolist() == pytest.approx(
        [3e-3 / math.sqrt(26e-6), 4e-3 / math.sqrt(26e-6)]
    )
