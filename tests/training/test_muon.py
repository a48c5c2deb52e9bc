"""Muon against its formulas, one matrix at a time, and how it sits beside AdamW."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.llama import Llama, LlamaConfig
from models.nanochat import Nanochat, NanochatConfig
from training.config import OptimSection
from training.optim.groups import build_optimizers, set_rates
from training.optim.muon import POLAR_EXPRESS, Muon, PlainMuon, polar, reduce_variance
from training.optim.schedule import Schedule


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
def test_polar_turns_singular_values_into_ones(shape):
    factor = polar(randn(1, *shape))[0]
    s = torch.linalg.svdvals(factor)
    exact = torch.linalg.svd(randn(1, *shape)[0], full_matrices=False)
    # Five steps reach 1 within about 10 % from 1e-3 of the norm upwards.
    assert s.max() < 1.15 and s.min() > 0.85
    cosine = (factor * (exact[0] @ exact[2])).sum() / (s.norm() * min(shape) ** 0.5)
    assert cosine > 0.995


def test_polar_works_on_each_matrix_of_a_batch_alone():
    batch = randn(3, 16, 24)
    torch.testing.assert_close(polar(batch)[1], polar(batch[1:2])[0], atol=1e-5, rtol=1e-5)


def test_variance_reduction_levels_rows_and_keeps_the_norm():
    update = randn(1, 6, 4) * torch.tensor([1, 1, 1, 10, 1, 1.0])[:, None]
    scaled, variance = reduce_variance(update, torch.zeros(1, 6, 1))
    assert scaled.norm() == pytest.approx(update.norm().item(), rel=1e-5)
    rows = scaled.square().mean(-1).sqrt()
    assert rows.max() / rows.min() == pytest.approx(1, rel=1e-4)  # from a cold start every row gets the same rms
    torch.testing.assert_close(variance, 0.05 * update.square().mean(-1, keepdim=True))


def plain_update(w: Tensor, g: Tensor, state: dict, lr: float, momentum: float, decay: float) -> Tensor:
    """The docstring's formulas for one matrix, FP64."""
    state["m"] = momentum * state.get("m", 0) + (1 - momentum) * g
    u = (1 - momentum) * g + momentum * state["m"]
    is_tall = u.shape[0] > u.shape[1]
    x = (u.T if is_tall else u) / (1.02 * u.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    u = x.T if is_tall else x
    by_row = u.shape[0] >= u.shape[1]
    square = u.square().mean(1 if by_row else 0, keepdim=True)
    state["v"] = 0.95 * state.get("v", 0) + 0.05 * square
    leveled = u / state["v"].sqrt()
    u = leveled * u.norm() / leveled.norm()
    step = lr * max(1, w.shape[0] / w.shape[1]) ** 0.5
    return w - step * (u + decay * w * (u * w >= 0))


def test_steps_agree_with_the_formulas():
    weights = [randn(12, 8, seed=1), randn(8, 12, seed=2), randn(12, 8, seed=3)]
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    plain, states = [w.double() for w in weights], [{}, {}, {}]
    optimizer = Muon(params, lr=0.02, weight_decay=0.1)
    for step in range(3):
        optimizer.set_progress(step, 10)
        momentum, decay = 0.85 + 0.1 * step / 300, 0.1 * (1 - step / 10)
        for i, parameter in enumerate(params):
            parameter.grad = randn(*parameter.shape, seed=100 + 3 * step + i)
            plain[i] = plain_update(plain[i], parameter.grad.double(), states[i], 0.02, momentum, decay)
        optimizer.step()
    for parameter, expected in zip(params, plain, strict=True):
        torch.testing.assert_close(parameter.detach().double(), expected, atol=2e-5, rtol=0)


def test_sharded_weights_take_the_steps_of_whole_ones(tmp_path):
    """Bit for bit, as those of whole ones on two ranks: a matrix is orthogonalized whole, by one of them."""
    for world in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if world > 1 else []
        command = [
            sys.executable,
            *launcher,
            str(Path(__file__).with_name("muon_worker.py")),
            str(tmp_path / f"{world}"),
        ]
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    alone, two = load_file(tmp_path / "1"), load_file(tmp_path / "2")
    assert sum(alone.pop("whole made")) == 3 * 6 and len(alone) == 18
    for way in ("whole", "sharded"):
        assert two.pop(f"{way} made").tolist() == 3 * [1]  # of three of one shape; the others are rank 0's
        for name, expected in alone.items():
            assert torch.equal(two.pop(name.replace("whole", way, 1)), expected), name
    assert not two


def test_decay_and_momentum_follow_the_run():
    optimizer = Muon([torch.nn.Parameter(randn(4, 4))], lr=0.02, weight_decay=0.2)
    optimizer.set_progress(1000, 2000)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.95)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1)


def test_a_raised_flag_leaves_weights_and_moments_alone():
    parameter = torch.nn.Parameter(randn(8, 4))
    optimizer = Muon([parameter], lr=0.02, weight_decay=0.1)
    parameter.grad = randn(8, 4, seed=5)
    optimizer.step()
    before = [parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values())]
    parameter.grad = torch.full((8, 4), float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = [parameter.detach(), *optimizer.state[parameter].values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    optimizer.found_inf.zero_()
    parameter.grad = randn(8, 4, seed=6)
    optimizer.step()
    assert not torch.equal(parameter.detach(), before[0])


def test_groups_and_rates_are_the_published_ones():
    model = Nanochat(NanochatConfig(24, 192, 2, 256, 100, 16))
    section = OptimSection(name="muon", betas=[0.8, 0.95], eps=1e-10, weight_decay=0.2, clip=None)
    optimizers = build_optimizers(model, section, 0.02)
    set_rates(optimizers, Schedule("wsd", 0.02, 100, 0, 0.0, 0.0, decay_steps=40), 80)  # half of the rate is left
    adamw, muon = optimizers
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in adamw.param_groups for p in group["params"]}
    # width 192 is a quarter of 768: twice the rate
    assert rates == pytest.approx(
        {"embed.weight": 0.3, "lm_head.weight": 0.004, "residual_scales": 0.0025, "embedding_scales": 0.25}
    )
    assert all(group["weight_decay"] == 0 for group in adamw.param_groups)
    assert [group["lr"] for group in muon.param_groups] == pytest.approx([0.01] * 3)
    assert muon.param_groups[0]["weight_decay"] == pytest.approx(0.2 * (12 / 24) ** 2 * 0.2)
    assert sum(len(group["params"]) for group in muon.param_groups) == 24 * 6


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="optim=muon is made for model=nanochat_560m"):
        build_optimizers(Llama(LlamaConfig(1, 32, 2, 64, 50)), OptimSection(name="muon"), 0.02)
    with pytest.raises(ValueError, match=r"needs matrices, got shape \(4,\)"):
        Muon([torch.nn.Parameter(randn(4))], 0.02, 0.0)


def test_plain_muon_follows_its_formula_matrix_by_matrix():
    """Two steps of a weight that holds a 4 x 8 above an 8 x 8 matrix, FP64 against it."""
    weight = torch.nn.Parameter(randn(12, 8))
    optimizer = PlainMuon([weight], 0.01, 0.1, {weight: (4, 8)})
    expected, momentum = weight.detach().double(), torch.zeros(12, 8, dtype=torch.float64)
    for step in range(2):
        weight.grad = randn(12, 8, seed=step + 1)
        gradient = weight.grad.double()
        momentum = 0.95 * momentum + 0.05 * gradient
        parts = (0.05 * gradient + 0.95 * momentum).split((4, 8))
        update = torch.cat([0.2 * 8**0.5 * polar(part.float()[None])[0].double() for part in parts])
        expected = expected - 0.01 * (update + 0.1 * expected)
        optimizer.set_progress(step, 10)
        optimizer.step()
        optimizer.zero_grad()
    assert (weight.detach().double() - expected).abs().max() < 1e-6
    kept = weight.detach().clone()
    weight.grad, optimizer.found_inf = torch.full((12, 8), float("nan")), torch.ones(())
    optimizer.step()
    assert torch.equal(weight.detach(), kept)


def test_a_llamas_fused_weights_are_parted_and_the_rest_is_adamws():
    model = Llama(LlamaConfig(2, 32, 4, 48, 50, kv_heads=2))
    adamw, muon = build_optimizers(model, OptimSection(name="muon_rms", weight_decay=0.1), 1e-3)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rows = {names[p].split(".", 2)[2]: group["rows"] for group in muon.param_groups for p in group["params"]}
    assert rows["attn.qkv.weight"] == (32, 16, 16) and rows["mlp.gate_up.weight"] == (48, 48)
    assert rows["attn.out.weight"] == (32,) and rows["mlp.down.weight"] == (32,)
    rest = {names[p].rpartition("blocks.")[2] for group in adamw.param_groups for p in group["params"]}
    assert {"embed.weight", "lm_head.weight", "norm.weight", "0.attn_norm.weight"} <= rest and len(rest) == 7


def test_a_llama_trains_and_resumes_bitwise_by_plain_muon(run, rows, stop_after):
    words = ["optim=muon_rms", "optim.lr=1e-2", "quant=fp8", "steps=6", "evaluate.every=null", "checkpoint.every=null"]
    _, whole = run(*words, name="whole")
    with stop_after(3):
        run(*words, name="cut")
    _, cut = run(*words, name="cut")
    losses = [[row["loss"] for row in rows(folder, "train")] for folder in (whole, cut)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0] - 0.1
