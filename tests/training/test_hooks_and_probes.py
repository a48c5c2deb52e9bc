"""What happens around a step and who looks at it: a toy of each (toys.py), and the moving average, in whole runs."""

import pytest
import torch
from toys import Drag, Norm

from training.checkpoint.manifest import checkpoints
from training.checkpoint.state import read_all
from training.hooks import HOOKS
from training.hooks.base import Hook
from training.probes import PROBES

SHORT = ["evaluate.tokens=256", "evaluate.final_tokens=256"]
BF16 = ["quant=bf16", "evaluate.every=null", *SHORT]
NUMBERS = ("loss", "grad_norm", "lr", "samples")


class Spoil(Hook):
    """Makes one step's gradient NaN."""

    def before_update(self, step: int) -> None:
        if step == 5:
            next(self.run.model.parameters()).grad.fill_(float("nan"))


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(HOOKS, "drag", Drag)
    monkeypatch.setitem(HOOKS, "spoil", Spoil)
    monkeypatch.setitem(PROBES, "norm", Norm)


def numbers(found: list[dict]) -> list[list]:
    return [[row[name] for name in NUMBERS] for row in found]


def end_of(folder) -> dict[str, torch.Tensor]:
    return read_all(checkpoints(folder / "checkpoints")[-1])


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_without_hooks_a_checkpoint_names_none(run):
    _, folder = run(*BF16, "steps=2")
    assert {name.split(".")[0] for name in end_of(folder)} == {"model", "optim"}


def test_a_hook_acts_on_the_weights_and_its_state_resumes_within_a_window(run, rows, stop_after):
    words = [*BF16, "hooks.drag={}"]
    _, plain = run(*BF16, name="plain")
    _, straight = run(*words, name="straight")
    one, other = (numbers(rows(folder, "train")) for folder in (plain, straight))
    assert one[:3] == other[:3] and one[3][0] != other[3][0]  # the first window ends after step 3
    with stop_after(6):  # within the second window, which began with step 5
        run(*words, name="stopped")
    stored = end_of(straight.parent / "stopped")
    assert "hooks.drag.embed.weight" in stored and "hooks.drag.embed.weight" in end_of(straight)
    _, stopped = run(*words, name="stopped")
    assert numbers(rows(stopped, "train")) == numbers(rows(straight, "train"))
    assert same(end_of(stopped), end_of(straight))


def test_a_skipped_step_leaves_hooks_alone_however_late_it_is_seen(run, rows):
    """The host sees the bad step 6 at once, or after the window in which it lies and the next one's begin."""
    words = [*BF16, "hooks.drag={}", "hooks.ema.decay=0.5", "hooks.spoil={}", "nonfinite=skip", "checkpoint.every=null"]
    found = {}
    for every in (1, 10):
        _, folder = run(*words, f"log.every={every}", name=f"log-{every}")
        found[every] = end_of(folder)
        assert [row["step"] for row in rows(folder, "train")] == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert same(found[1], found[10])
    assert all(torch.isfinite(tensor).all() for tensor in found[1].values())


def test_a_rollback_takes_the_hooks_back_too(run):
    words = [*BF16, "hooks.drag={}", "hooks.spoil={}", "nonfinite=rollback", "checkpoint.every=2", "log.every=8"]
    code, folder = run(*words)
    assert code == 0 and torch.isfinite(end_of(folder)["hooks.drag.embed.weight"]).all()


def test_the_average_is_scored_beside_the_weights(run, rows, stop_after):
    plainly = ["quant=nvfp4_rtn", "evaluate.bf16=true", "evaluate.every=2", "steps=4", *SHORT]
    words = [*plainly, "hooks.ema.decay=0.9"]
    _, plain = run(*plainly, name="plain")
    _, folder = run(*words, name="averaged")
    assert numbers(rows(plain, "train")) == numbers(rows(folder, "train"))
    for without, row in zip(rows(plain, "eval"), rows(folder, "eval"), strict=True):
        assert [*row] == [*list(without)[:-1], "loss_ema", "time"] and row["loss"] == without["loss"]
        assert row["loss_ema"] not in (row["loss"], row["loss_bf16"])
    # By hand: after one step the share is 1 - 1/10 of the way to the weights.
    with stop_after(1):
        run(*words, name="one")
    at_one = end_of(folder.parent / "one")
    with stop_after(2):
        run(*words, name="two")
    at_two = end_of(folder.parent / "two")
    before, weight = at_one["hooks.ema.embed.weight"], at_two["model.embed.weight"]
    torch.testing.assert_close(at_two["hooks.ema.embed.weight"], before + (1 - 2 / 11) * (weight - before))


def test_a_hook_is_part_of_who_a_run_is(run):
    _, one = run(*BF16, "steps=2", name=None)
    _, other = run(*BF16, "steps=2", "hooks.ema.decay=0.9", name=None)
    assert one != other


def test_a_probe_sees_every_step_and_changes_nothing(run, rows, stop_after):
    words = [*BF16, "probes.norm.every=3"]
    _, plain = run(*BF16, name="plain")
    _, folder = run(*words, name="probed")
    assert numbers(rows(plain, "train")) == numbers(rows(folder, "train"))
    seen = rows(folder, "norm")
    assert [(row["step"], row["looks"]) for row in seen] == [(3, 1), (6, 2), (9, 3)]
    assert all(row["norm"] > 0 for row in seen)
    with stop_after(7):
        run(*words, name="stopped")
    _, stopped = run(*words, name="stopped")
    strip = [{name: value for name, value in row.items() if name != "time"} for row in seen]
    assert [{name: value for name, value in row.items() if name != "time"} for row in rows(stopped, "norm")] == strip
    kept = {name: value for name, value in end_of(folder).items() if not name.startswith("probes.")}
    assert same(kept, end_of(plain))


def test_probes_come_and_go_between_two_starts_of_a_run(run, rows, stop_after):
    with stop_after(4):
        run(*BF16, "probes.norm.every=3")
    with stop_after(7):
        run(*BF16)
    code, folder = run(*BF16, "probes.norm.every=3")
    assert code == 0 and [(row["step"], row["looks"]) for row in rows(folder, "norm")] == [(3, 1), (9, 1)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hooks.emma={}"], "hooks.emma.*did you mean ema"),
        (["hooks.ema.decy=0.9"], "hooks.ema.decy.*did you mean decay"),
        (["hooks.ema.decay=2"], "hooks.ema.decay=2"),
        (["hooks.ema=0.9"], r"hooks.ema=0.9.*hooks.ema.decay=\.\.\."),
        (["probes.nrm={}"], "probes.nrm.*did you mean norm"),
        (["quant.hooks.ema.decay=0.9", "hooks.ema.decay=0.8"], "hooks.ema.*leave one of them out"),
        (["quant.hooks=3"], "quant.hooks=3 must be a mapping"),
    ],
)
def test_wrong_names_and_values_are_refused_before_any_work(run, tmp_path, words, told):
    with pytest.raises(ValueError, match=told):
        run(*words)
    assert not (tmp_path / "runs").exists()


def test_a_recipe_may_name_its_hooks(run):
    _, folder = run(*BF16, "steps=2", "quant.hooks.ema.decay=0.9")
    assert "hooks.ema.embed.weight" in end_of(folder)
