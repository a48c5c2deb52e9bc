"""Every step is logged, the last ones too, whatever the intervals; and Muon's runs go through the same loop."""

import pytest


def test_steps_after_the_last_interval_are_logged(run, rows):
    _, folder = run("quant=bf16", "steps=7", "log.every=4", "checkpoint.every=null", "evaluate.every=null")
    assert [row["step"] for row in rows(folder, "train")] == [1, 2, 3, 4, 5, 6, 7]


def test_nanochat_with_muon_learns_and_resumes_bitwise(run, rows, stop_after):
    words = ["model.family=nanochat", "model.residual_dtype=bfloat16", "optim=muon", "optim.lr=0.02", "schedule=wsd"]
    words += ["quant=nvidia", "model.heads=1", "optim.scalar_lr=0.05"]
    _, straight = run(*words, name="straight")
    losses = [row["loss"] for row in rows(straight, "train")]
    assert losses[0] == pytest.approx(5.704, abs=0.05) and losses[-1] < losses[0] - 1  # ln 300
    with stop_after(6):
        run(*words, name="stopped")
    _, stopped = run(*words, name="stopped")
    assert [row["loss"] for row in rows(stopped, "train")] == losses


def test_a_window_without_end_is_read_in_pieces(run, rows, monkeypatch):
    """log.every=1e12 allocated 16 TB; now each step is logged once, whatever it says."""
    monkeypatch.setattr("training.loop.BUFFERED_STEPS", 3)
    _, folder = run("quant=bf16", "steps=8", "log.every=1e12", "checkpoint.every=null", "evaluate.every=null")
    assert [row["step"] for row in rows(folder, "train")] == list(range(1, 9))
    assert len({row["ms_per_step"] for row in rows(folder, "train")}) == 4  # windows of 1, 3, 3 and 1 steps
