"""A NaN planted in an activation, a gradient or a weight: found, named, and dealt with as the policy says."""

import json

import pytest
import torch
from support import KINDS

from analysis.runs import read_run
from kernels import backend
from launcher.compose import ConfigError, compose
from quant import library
from quant.linear import QuantLinear
from quant.recipe import GEMMS, Recipe
from training.checkpoint.manifest import checkpoints
from training.checkpoint.state import non_finite, read_all
from training.checkpoint.storage import CheckpointError
from training.inference import load_trained
from training.nonfinite import Guard, NonFiniteError, describe
from training.start import build as building_blocks

BAD_STEP = 7  # 1-based; checkpoint.every=5 and log.every=4 put it after a checkpoint and inside a logging window
NAN = float("nan")
UNUSED = 3  # the token of "#", which the test's text doesn't have: no loss and no gradient ever sees its row


@pytest.fixture
def plant(monkeypatch):
    """plant(layer, kind): from now on runs carry a NaN in `layer` during step BAD_STEP (weights: from then on)."""
    build = building_blocks.build_model

    def choose(layer: str, kind: str, when=lambda module: True, steps=(BAD_STEP,)) -> None:
        def building(*arguments, **options):
            model, init_hash = build(*arguments, **options)
            module = model.get_submodule(layer)
            rng = module.rng

            def due() -> bool:
                return int(rng[1]) + 1 in steps and int(rng[2]) == 1 and torch.is_grad_enabled() and when(module)

            def forward(module, inputs, y):
                if kind == "activation" and due():
                    y = y.clone()
                    y[0, 3, 5] = NAN
                if kind == "gradient" and due():
                    y.register_hook(lambda gradient: torch.where(torch.arange(gradient.shape[-1]) == 2, NAN, gradient))
                return y

            def before(module, inputs):
                if kind == "weight" and due():
                    with torch.no_grad():
                        module.weight[1, 1] = NAN
                if kind == "unused row" and due():
                    with torch.no_grad():
                        model.embed.weight[UNUSED] = NAN

            module.register_forward_hook(forward)
            module.register_forward_pre_hook(before)
            return model, init_hash

        monkeypatch.setattr(building_blocks, "build_model", building)

    return choose


def rows(folder, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def steps_of(folder) -> list[int]:
    return [row["step"] for row in rows(folder, "train")]


def event(folder, name: str) -> dict:
    found = [row for row in rows(folder, "event") if row["event"] == name]
    assert len(found) == 1
    return found[0]


def test_stop_names_the_tensor_and_keeps_the_state_before(run, plant, tmp_path):
    _, clean = run("quant=quartet2", "checkpoint.every=6", "checkpoint.keep_last=9", name="clean")
    plant("blocks.0.attn.out", "activation")
    with pytest.raises(
        NonFiniteError, match=rf"step {BAD_STEP}: loss nan.*y of fprop in blocks\.0\.attn\.out, micro-batch 1"
    ):
        run("quant=quartet2", name="planted")
    planted = tmp_path / "runs" / "planted"
    assert "So it is in BF16: the recipe isn't the cause" in event(planted, "nonfinite")["cause"]
    assert steps_of(planted) == [1, 2, 3, 4, 5, 6]
    newest = checkpoints(planted / "checkpoints")[-1]
    assert newest.name == "step_00000006"
    one, other = read_all(newest), read_all(clean / "checkpoints" / "step_00000006")
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_nan_in_a_gradient_is_named_in_the_backward(run, plant):
    plant("blocks.0.mlp.down", "gradient")
    with pytest.raises(NonFiniteError, match=r"dy of dgrad in blocks\.0\.mlp\.down"):
        run("quant=sr")


def test_nan_in_a_weight_is_named_and_not_saved(run, plant, tmp_path):
    plant("blocks.0.attn.qkv", "weight")
    with pytest.raises(
        NonFiniteError, match=r"Weights that are not finite: blocks\.0\.attn\.qkv\.weight.*nothing was saved"
    ):
        run("quant=quartet2")
    assert checkpoints(tmp_path / "runs" / "test" / "checkpoints")[-1].name == "step_00000005"


@pytest.mark.parametrize("name", ["quartet2", "nvidia"])
def test_a_recipe_that_causes_it_is_told_from_the_data(run, plant, name):
    plant("blocks.0.mlp.gate_up", "activation", when=lambda module: module.recipe.fprop.is_quantized)
    with pytest.raises(NonFiniteError, match=r"In BF16 it is finite: the recipe is the cause\. fprop quantized alone"):
        run(f"quant={name}")


@pytest.mark.parametrize("name", KINDS)
def test_one_gemm_quantized_alone_multiplies_by_the_same_operands(name):
    """Also where a slot reuses fprop's codes, which are then made from the tensor itself."""
    backend.use("reference")
    recipe = library.load(name)

    def product_of(kind: int, recipe: Recipe) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        linear = torch.nn.Linear(128, 128, bias=False)
        linear.weight.data = torch.randn(128, 128, generator=generator) * 0.1
        x, dy = (torch.randn(128, 128, generator=generator).bfloat16() for _ in range(2))
        y = QuantLinear(linear, recipe, 3, torch.tensor([1, 2, 3]))(x.requires_grad_())
        y.backward(dy)
        return (y.detach(), x.grad, linear.weight.grad)[kind]

    for number, gemm in enumerate(GEMMS):
        alone = recipe.alone()[gemm]
        assert [alone.gemm(other).is_quantized for other in GEMMS] == [
            other == gemm and recipe.gemm(other).is_quantized for other in GEMMS
        ]
        if all(operand.source != "fprop" for operand in recipe.gemm(gemm).operands):
            assert torch.equal(product_of(number, alone), product_of(number, recipe))


def test_skip_leaves_out_exactly_that_batch(run, plant):
    """Skipping is bitwise a training in which that step's update never happened."""
    plant("blocks.0.attn.out", "activation")
    code, folder = run("quant=quartet2", "nonfinite=skip")
    assert code == 0
    assert steps_of(folder) == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert event(folder, "skip")["bad_step"] == BAD_STEP
    assert all(torch.isfinite(tensor).all() for tensor in read_all(checkpoints(folder / "checkpoints")[-1]).values())
    moments = read_all(checkpoints(folder / "checkpoints")[-1])
    assert moments["optim.0.blocks.0.attn.qkv.weight.step"].item() == 9  # nine updates in ten steps


def test_rollback_takes_the_checkpoint_and_goes_on_after_the_batch(run, plant):
    plant("blocks.0.mlp.down", "weight")
    code, folder = run("quant=quartet2", "nonfinite=rollback")
    assert code == 0
    assert steps_of(folder) == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert event(folder, "rollback")["bad_step"] == BAD_STEP
    end = read_all(checkpoints(folder / "checkpoints")[-1])
    assert end["optim.0.blocks.0.attn.qkv.weight.step"].item() == 8  # 5 of the checkpoint, 8 to 10 after it


def test_skipping_a_broken_weight_is_refused(run, plant):
    plant("blocks.0.mlp.down", "weight")
    with pytest.raises(NonFiniteError, match=r"doesn't mend the state\. Add nonfinite=rollback"):
        run("nonfinite=skip")


def test_a_run_that_is_bad_at_every_step_is_stopped(run, plant, tmp_path):
    plant("blocks.0.attn.out", "activation", steps=range(4, 99))
    with pytest.raises(NonFiniteError, match="4 such steps in a row, in spite of skip"):
        run("nonfinite=skip")
    assert [row["bad_step"] for row in rows(tmp_path / "runs" / "test", "event") if row["event"] == "skip"] == [4, 5, 6]


def test_bad_steps_that_do_not_follow_each_other_end_no_run(run, plant):
    plant("blocks.0.attn.out", "activation", steps=(2, 4, 6, 8))
    code, folder = run("nonfinite=skip")
    assert code == 0 and steps_of(folder) == [1, 3, 5, 7, 9, 10]


def test_rollback_without_a_checkpoint_says_what_to_change(run, plant):
    plant("blocks.0.attn.out", "activation", steps=(2,))
    with pytest.raises(NonFiniteError, match=r"no checkpoint to roll back to yet; lower checkpoint\.every"):
        run("nonfinite=rollback")


def test_metrics_stay_valid_json(run, plant):
    plant("blocks.0.attn.out", "activation")
    _, folder = run("nonfinite=skip")

    def refuse(text: str):
        raise AssertionError(f"{text} is not JSON")

    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def finite_on_disk(folder) -> bool:
    saved = [read_all(path) for path in checkpoints(folder / "checkpoints")]
    return all(torch.isfinite(tensor).all() for tensors in saved for tensor in tensors.values())


def test_a_state_that_no_loss_shows_is_not_saved_and_the_advice_works(run, plant, tmp_path):
    plant("blocks.0.attn.qkv", "unused row")
    with pytest.raises(NonFiniteError, match=r"step 10: .*embed\.weight.*nothing was saved\. Add nonfinite=rollback"):
        run()
    folder = tmp_path / "runs" / "test"
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step_00000005"] and finite_on_disk(folder)
    assert not (folder / "result.json").exists() and read_run(folder).status == "diverged (10/10)"
    with pytest.raises(NonFiniteError, match=r"nothing was saved\. Add nonfinite=rollback"):
        run("nonfinite=skip")
    assert run("nonfinite=rollback")[0] == 0
    assert (folder / "result.json").exists() and finite_on_disk(folder)


def test_without_a_checkpoint_the_advice_is_another_run(run, plant, tmp_path):
    plant("blocks.0.attn.qkv", "unused row", steps=(2,))
    for policy in ("stop", "rollback"):
        with pytest.raises(NonFiniteError, match=r"optim\.lr|checkpoint\.every"):
            run(f"nonfinite={policy}")
    assert not checkpoints(tmp_path / "runs" / "test" / "checkpoints")


def test_a_state_that_goes_bad_after_each_rollback_ends_the_run(run, plant):
    plant("blocks.0.attn.qkv", "unused row", steps=range(3, 99))
    with pytest.raises(NonFiniteError, match=r"step 6: .*came back after a rollback; .*optim\.lr"):
        run("nonfinite=rollback", "checkpoint.every=2")


@pytest.mark.parametrize("eps", ["0", "1e-46"])
def test_an_eps_that_is_zero_in_fp32_is_refused(eps):
    """A row of the embedding without a gradient would be 0 / 0 at the first step."""
    with pytest.raises(ConfigError, match=rf"optim\.eps={eps}: needs"):
        compose([f"optim.eps={eps}"])


def test_state_beside_the_weights_is_named():
    """Moments that overflow, and what hooks keep; weights first, since the rest follows from them."""
    assert describe([], ["optim.0.embed.weight.exp_avg_sq"]).endswith("optim.0.embed.weight.exp_avg_sq.")
    assert "weights" in describe([], ["hooks.ema.embed.weight"])
    assert "embed.weight" in describe([], ["model.embed.weight", "optim.0.norm.weight.exp_avg"])
    assert "norm" not in describe([], ["model.embed.weight", "optim.0.norm.weight.exp_avg"])


def test_the_check_of_a_state_is_exact():
    tensors = {"weight": torch.full((4, 4), 3e38), "count": torch.tensor([1, 2]), "empty": torch.empty(0)}
    assert non_finite(tensors) == []  # its sum overflows, its values don't
    for bad in (NAN, float("inf"), -float("inf")):
        tensors["weight"][2, 1] = bad
        assert non_finite(tensors | {"fine": torch.zeros(3)}) == ["weight"]


def test_a_checkpoint_written_before_saves_were_checked_is_refused(run, monkeypatch):
    monkeypatch.setattr("training.checkpoint.state.non_finite", lambda *_: [])
    build = building_blocks.build_model
    monkeypatch.setattr(building_blocks, "build_model", lambda *a, **k: spoiled(*build(*a, **k)))
    _, folder = run()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"not finite \(model\.embed\.weight"):
        load_trained(folder)
    (folder / "result.json").unlink()
    with pytest.raises(CheckpointError, match="not finite"):
        run()


def spoiled(model, init_hash):
    with torch.no_grad():
        model.embed.weight[UNUSED] = NAN
    return model, init_hash


def test_guard_freezes_until_lowered():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = Guard([optimizer], torch.device("cpu"))

    def update(norm: float) -> torch.Tensor:
        weight.grad = torch.ones(3)
        guard.watch(torch.tensor(norm))
        optimizer.step()
        return weight.detach().clone()

    first = update(1.0)
    assert not torch.equal(first, torch.ones(3))
    assert torch.equal(update(NAN), first)
    assert torch.equal(update(1.0), first)  # still raised
    guard.lower()
    assert not torch.equal(update(1.0), first)
    with pytest.raises(ValueError, match="fused=True"):
        Guard([torch.optim.SGD([weight])], torch.device("cpu"))
