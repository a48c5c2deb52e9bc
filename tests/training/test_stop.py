"""A stop in the middle of a step: the step is dropped, the state before it saved, and the resumed run repeats it."""

import json
import time

import pytest
import torch

from training.checkpoint import publish
from training.checkpoint.manifest import checkpoints
from training.checkpoint.state import read_all
from training.evaluate import EVAL_MICRO_BASE
from training.loop import Trainer
from training.ranks.signals import PREEMPT


def stop_at(monkeypatch, step: int, micro: int) -> None:
    """As if SIGTERM came while micro-batch `micro` of step `step` (0-based) is computed."""
    set_rng = Trainer._set_rng

    def setting(self, at, index):
        set_rng(self, at, index)
        if (at, index) == (step, micro):
            self.p.stop.level = PREEMPT

    monkeypatch.setattr(Trainer, "_set_rng", setting)


def losses(folder) -> list:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["samples"]) for row in rows if row["kind"] == "train"]


def evaluations(folder) -> list:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["loss_bf16"]) for row in rows if row["kind"] == "eval"]


@pytest.mark.parametrize(
    ("step", "every", "evaluated"), [(5, "5", []), (5, "null", []), (10, "5", [5])], ids=["saved", "unsaved", "final"]
)
def test_stop_within_an_evaluation_leaves_it_out_and_the_resumed_run_does_it(run, monkeypatch, step, every, evaluated):
    words = ["quant=quartet2", "evaluate.bf16=true", f"checkpoint.every={every}"]
    _, straight = run(*words, name="straight")
    with monkeypatch.context() as patch:
        stop_at(patch, step, EVAL_MICRO_BASE)
        code, stopped = run(*words, name="stopped")
    assert code == 75 and not (stopped / "result.json").exists()
    assert [step for step, *_ in evaluations(stopped)] == evaluated
    assert not (stopped / "eval" / f"{step}.npz").exists()
    assert checkpoints(stopped / "checkpoints")[-1].name == f"step_{step:08d}"
    with monkeypatch.context() as patch:  # again, in the evaluation that the resumed run begins with
        stop_at(patch, step, EVAL_MICRO_BASE)
        assert run(*words, name="stopped")[0] == 75
    assert run(*words, name="stopped")[0] == 0
    assert losses(stopped) == losses(straight) and evaluations(stopped) == evaluations(straight)
    one, other = (read_all(folder / "checkpoints" / "step_00000010") for folder in (straight, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_stop_within_a_step_drops_it_and_resumes_bitwise(run, monkeypatch):
    _, straight = run("quant=quartet2", name="straight")
    with monkeypatch.context() as patch:
        stop_at(patch, 5, 0)
        code, stopped = run("quant=quartet2", name="stopped")
    assert code == 75
    assert [step for step, *_ in losses(stopped)] == [1, 2, 3, 4, 5]  # not 6: its second micro-batch never ran
    assert checkpoints(stopped / "checkpoints")[-1].name == "step_00000005"
    assert run("quant=quartet2", name="stopped")[0] == 0
    assert losses(stopped) == losses(straight)
    one, other = (read_all(folder / "checkpoints" / "step_00000010") for folder in (straight, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_stop_in_the_first_step_leaves_no_checkpoint_and_a_run_that_starts(run, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 0, 0)
        code, folder = run()
    assert code == 75 and checkpoints(folder / "checkpoints") == []
    assert run()[0] == 0
    assert [step for step, *_ in losses(folder)] == list(range(1, 11))


def test_stop_during_a_long_save_waits_for_it_and_repeats_the_steps_since(run, monkeypatch):
    _, straight = run("quant=quartet2", name="straight")
    write = publish.publish
    with monkeypatch.context() as patch:
        patch.setattr("training.loop.LONG_SAVE_S", 0.0)
        patch.setattr(publish, "publish", lambda job: (time.sleep(3.0), write(job)))
        stop_at(patch, 6, 0)
        code, stopped = run("quant=quartet2", "checkpoint.every=5", name="stopped")
    assert code == 75
    assert [folder.name for folder in checkpoints(stopped / "checkpoints")] == ["step_00000005"]
    assert losses(stopped)[-1][0] == 6
    assert run("quant=quartet2", "checkpoint.every=5", name="stopped")[0] == 0
    assert losses(stopped) == losses(straight)
