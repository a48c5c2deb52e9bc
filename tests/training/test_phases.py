"""Precision phases and forks in whole runs: a phased run is the fork at that step, and both resume bit for bit."""

import json
import shutil

import pytest
import torch

from quant.phases import _draw
from training.checkpoint.manifest import checkpoints
from training.checkpoint.state import read_all
from training.start import describe

SHORT = ["evaluate.every=null", "evaluate.tokens=256", "evaluate.final_tokens=256", "batch.sequences=4"]
TAIL = "quant.phases=[{from: .5, set: {fprop: none}}]"
NUMBERS = ("step", "loss", "grad_norm", "lr", "samples")


def numbers(found: list[dict]) -> list[list]:
    return [[row[name] for name in NUMBERS] for row in found]


def end_of(folder) -> dict[str, torch.Tensor]:
    return read_all(checkpoints(folder / "checkpoints")[-1])


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_phased_run_is_its_trunk_and_then_the_fork_at_that_step(run, rows, stop_after):
    words = ["quant=quartet2", *SHORT[1:], "evaluate.every=8"]
    _, plain = run(*words, "checkpoint.at=[.5]", "checkpoint.every=null", name="plain")
    assert [path.name for path in checkpoints(plain / "checkpoints")] == ["step_00000005", "step_00000010"]
    _, phased = run(*words, TAIL, name="phased")
    _, tail = run_fork(run, plain, 5, "quant.fprop=none", name="tail")
    trunk, whole, forked = (numbers(rows(folder, "train")) for folder in (plain, phased, tail))
    assert whole[:5] == trunk[:5] and whole[5:] != trunk[5:] and whole[5:] == forked
    assert same(end_of(phased), end_of(tail))
    scored = [[row["loss"] for row in rows(folder, "eval")] for folder in (phased, tail)]
    assert len(scored[0]) == 2 and scored[0] == scored[1]  # as the last step was trained

    _, child = run_fork(run, plain, 5, name="child")  # nothing changed
    assert numbers(rows(child, "train")) == trunk[5:] and same(end_of(child), end_of(plain))
    info = json.loads((child / "run.json").read_text())
    parent = json.loads((plain / "run.json").read_text())
    assert info["hash"] != parent["hash"] == info["parent"]["hash"] == info["parent"]["trunk"]
    assert info["parent"]["step"] == 5 and info["recipe_label"] == "quartet2@5 > quartet2"

    with stop_after(8):  # before that step's evaluation, with which the next start begins
        run(*words, TAIL, name="stopped")
    _, stopped = run(*words, TAIL, name="stopped")
    assert numbers(rows(stopped, "train")) == whole and same(end_of(stopped), end_of(phased))
    assert [row["loss"] for row in rows(stopped, "eval")] == scored[0]
    with stop_after(7):
        run_fork(run, plain, 5, "quant.fprop=none", name="tail-2")
    _, again = run_fork(run, plain, 5, "quant.fprop=none", name="tail-2")
    assert numbers(rows(again, "train")) == forked


def run_fork(run, parent, step: int, *words: str, name: str):
    """A fork takes everything from its parent, so the small run's own settings are left out."""
    return run(f"fork={parent}@{step}", *words, name=name, bare=True)


def test_the_average_of_a_fork_begins_with_the_parents_weights(run, rows):
    _, trunk = run("quant=bf16", *SHORT, "checkpoint.at=[.8]", "checkpoint.every=null", name="trunk")
    _, child = run_fork(
        run, trunk, 8, "hooks.ema.decay=0.9", "checkpoint.every=1", "checkpoint.keep_last=9", name="child"
    )
    before = read_all(trunk / "checkpoints" / "step_00000008")
    after = read_all(child / "checkpoints" / "step_00000009")
    for name in ("embed.weight", "blocks.0.mlp.down.weight"):
        old, new = before[f"model.{name}"], after[f"model.{name}"]
        torch.testing.assert_close(after[f"hooks.ema.{name}"], old + (1 - 9 / 18) * (new - old))
    assert numbers(rows(child, "train")) == numbers(rows(trunk, "train"))[8:]


def test_steps_are_drawn_by_the_seed_and_the_rest_runs_as_before(run, rows):
    """Of all steps about a half: the first that is drawn is the first that leaves the plain run's curve."""
    _, plain = run("quant=nvfp4_rtn", *SHORT, name="plain")
    _, drawn = run("quant=nvfp4_rtn", *SHORT, "quant.phases=[{share: .5, seed: 1, set: {fprop: none}}]", name="drawn")
    phase = json.loads((drawn / "run.json").read_text())["phases"][0]
    one, other = (numbers(rows(folder, "train")) for folder in (plain, drawn))
    moved = [a[1] != b[1] for a, b in zip(one, other, strict=True)]
    assert 0 < phase["steps"] < 10 and True in moved
    assert moved.index(True) == next(step for step in range(10) if _draw(1, step) < 0.5)
    other_seed = "quant.phases=[{share: .5, seed: 2, set: {fprop: none}}]"
    assert [_draw(1, step) < 0.5 for step in range(10)] != [_draw(2, step) < 0.5 for step in range(10)], other_seed


def test_only_what_is_named_is_trained_from_its_step_on(run, rows, stop_after):
    words = ["quant=bf16", *SHORT, "optim.train=['*norm*','embed*']", "checkpoint.at=[.5]"]
    _, plain = run("quant=bf16", *SHORT, name="plain")
    _, folder = run(*words, "optim.train_from=0.5", name="frozen")
    assert numbers(rows(folder, "train"))[:5] == numbers(rows(plain, "train"))[:5]
    before, after = read_all(folder / "checkpoints" / "step_00000005"), end_of(folder)
    moved = {
        name.removeprefix("model.")
        for name in before
        if name.startswith("model.") and not before[name].equal(after[name])
    }
    assert moved == {"embed.weight", "norm.weight", "blocks.0.attn_norm.weight", "blocks.0.mlp_norm.weight"}
    moments = "optim.0.blocks.0.mlp.down.weight.exp_avg"
    assert torch.equal(before[moments], after[moments])
    at_once = [*words, "checkpoint.every=3"]
    with stop_after(4):
        run(*at_once, name="at-once")
    _, stopped = run(*at_once, name="at-once")  # the moments of what was never trained are there to be loaded
    _, straight = run(*at_once, name="straight")
    assert same(end_of(stopped), end_of(straight))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["steps=20"], "steps=20.*the parent's 10 steps; leave steps out, or add schedule=wsd"),
        (["seed=1"], "seed=1, the parent has 0; a fork keeps it"),
        (["model.layers=2"], "model.layers=2, the parent has 1"),
        (["batch.sequences=8"], "batch.sequences=8, the parent has 4"),
        (["data.val_fraction=0.1"], "the parent was trained on other text .*; give that one"),
        (
            ["quant=quartet2", "quant.phases=[{from: .2, to: .5, set: {fprop: none}}]"],
            r"quant\.phases\[0\] ends at step 5, before the fork begins; leave it out",
        ),
        (["debug=smoke"], "debug=: a fork has everything else from its parent"),
    ],
)
def test_a_fork_of_something_else_is_refused(run, made_trunk, tmp_path, words, told):
    with pytest.raises(ValueError, match=told):
        run_fork(run, made_trunk, 5, *words, name="refused")
    assert not (made_trunk.parent / "refused").exists()


def test_a_fork_that_has_a_checkpoint_goes_on_without_its_parents(run, made_trunk, stop_after):
    copy = made_trunk.parent / "copy"
    shutil.copytree(made_trunk, copy)
    with stop_after(7):
        run_fork(run, copy, 5, "checkpoint.every=null", name="tail")
    shutil.rmtree(copy / "checkpoints")
    code, _ = run_fork(run, copy, 5, "checkpoint.every=null", name="tail")
    assert code == 0


def test_a_fork_without_its_parent_says_what_is_there(run, made_trunk):
    with pytest.raises(ValueError, match="no checkpoint of that step is there; there are: 5, 10"):
        run_fork(run, made_trunk, 7, name="refused")
    with pytest.raises(ValueError, match="is no run's folder; write fork=RUN@STEP"):
        run_fork(run, made_trunk.parent / "nowhere", 5, name="refused")
    with pytest.raises(ValueError, match="write fork=RUN@STEP"):
        run("fork=nothing", bare=True)


@pytest.fixture(scope="module")
def trunk_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trunks")


@pytest.fixture
def made_trunk(run, trunk_folder):
    """Trained once for the module."""
    folder = trunk_folder / "trunk"
    if not folder.exists():
        run(
            "quant=bf16",
            *SHORT,
            "checkpoint.at=[.5]",
            "checkpoint.every=null",
            "checkpoint.keep_last=1",
            f"paths.runs={trunk_folder}",
            name="trunk",
        )
    return folder


@pytest.mark.parametrize(
    ("recipe", "phases", "told"),
    [
        (
            "nvidia",
            "[{from: .5, set: {fprop: none}}]",
            r"dgrad\.w of nvidia reuses.*add dgrad: \{w: \{source: input\}\}",
        ),
        ("quartet2", "[{from: .5, set: {fprop: none}}, {from: .4, set: {dgrad: none}}]", "begins at step 4, before"),
        ("quartet2", "[{from: .99, set: {fprop: none}}]", "holds none of 10 steps"),
        ("bf16", "[{from: .5, set: {fprop: none}}]", "changes no layer"),
        ("quartet2", "[{form: .5, set: {fprop: none}}]", "'form'; did you mean from"),
        ("quartet2", "[{from: 5, set: {fprop: none}}]", r"quant\.phases\[0\]\.from=5"),
        ("quartet2", "[{from: .5}]", "write '"),
        ("quartet2", "[{from: .5, set: {fprop: {x: {rounding: srr}}}}]", r"quant\.phases\[0\].*srr"),
        ("quartet2", "[{from: .5, set: {rules: []}}]", "rules belongs to the whole run"),
        (
            "quartet2",
            "[{from: .5, set: {scheme: shaped}}]",
            r"would become another kind of layer.*a fork \(fork=RUN@STEP quant",
        ),
        ("quartet2_shaped_w", "[{from: .5, set: {shape: [x, w]}}]", r"is built for quartet2_shaped_w and lacks.*'x'"),
        ("quartet2_shaped_r64", "[{from: .5, set: {rank: 32}}]", r"is built for quartet2_shaped_r64 and lacks.*32"),
        ("nvfp4_te", "[{from: .5, set: {rht: false}}]", "is built for nvfp4_te.*use a fork"),
    ],
)
def test_wrong_phases_are_refused_before_any_work(run, tmp_path, recipe, phases, told):
    with pytest.raises(ValueError, match=told):
        run(f"quant={recipe}", f"quant.phases={phases}")
    assert not (tmp_path / "runs").exists()


def test_memory_that_only_a_later_phase_needs_is_missed_before_any_work(run, tmp_path, monkeypatch):
    """Operands kept in BF16 take more than codes: the device has room for the run as it begins."""
    words = ["quant=quartet2", *SHORT, TAIL]
    seen = []

    def has(device, local_world):
        seen.append(1)
        return room

    monkeypatch.setattr(describe, "memory_of", has)
    monkeypatch.setattr(
        describe, "expected_memory", lambda config, described, *rest: Total(2 if described.phases else 1)
    )
    room = 1.5
    with pytest.raises(
        ValueError, match=r"quant\.phases: steps 5 to 9.* needs 2.0 GiB, this device has 1.5.*batch.micro"
    ):
        run(*words)
    assert seen and not (tmp_path / "runs").exists()


class Total:
    """A MemoryEstimate of so many GiB."""

    def __init__(self, total: float):
        self.total = total
