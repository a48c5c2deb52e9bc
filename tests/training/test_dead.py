"""A run whose weights were thrown so far that nothing is learned any more: said while it goes on, marked at its end."""

import json
import math

import pytest

from analysis import states
from analysis.runs import read_run
from training.dead import Pulse, nothing_learned, without_gradient

GUESS = math.log(300)


def trained(*pairs: tuple[float, float]) -> list[dict]:
    return [{"step": i, "loss": loss, "grad_norm": norm} for i, (loss, norm) in enumerate(pairs, 1)]


def test_a_dead_run_says_so_once_and_is_marked(run, tmp_path, capsys):
    code, folder = run("quant=bf16", "optim.lr=100", "schedule.warmup_steps=1", "evaluate.every=null")
    said = capsys.readouterr().out
    assert code == 0 and said.count("warning: dead at step") == 1 and "this run is dead" in said and "optim.lr" in said
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "dead" and "uniform guess" in result["why"]
    assert read_run(folder).status == "dead (10/10)" and read_run(folder).diverged_at == 10
    assert states.state_of(tmp_path / "runs", "test").status == states.DEAD
    assert run("quant=bf16", "optim.lr=100", "schedule.warmup_steps=1", "evaluate.every=null")[0] == 0
    assert "this run is dead" in capsys.readouterr().out


def test_a_run_that_learns_is_not_dead(run, capsys):
    _, folder = run("quant=bf16")
    assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    assert "dead" not in capsys.readouterr().out and read_run(folder).status == "finished"


@pytest.mark.parametrize(
    ("rows", "final", "dead"),
    [
        (trained((6.0, 1.0), (GUESS, 0.0), (GUESS, 0.0), (GUESS, 0.0)), GUESS, True),
        (trained((9.0, 0.0), (9.0, 0.0), (9.0, 0.0)), 9.0, True),  # saturated, elsewhere
        (trained((9e4, 1e4), (8e4, 1e4), (7e4, 1e4)), 7e4, True),  # far off, with gradients
        (trained((GUESS, 0.0), (GUESS, 0.0)), GUESS, False),  # too early to tell
        (trained((1e-9, 0.0), (1e-9, 0.0), (1e-9, 0.0)), 0.01, False),  # all known by heart
        (trained((GUESS + 0.03, 1.4)), GUESS + 0.03, False),  # hardly begun
        (trained((5.0, 1.0), (5.0, 1.0), (5.0, 1.0)), float("nan"), True),
    ],
)
def test_what_counts_as_dead(rows, final, dead):
    assert bool(nothing_learned(rows, final, 300)) == dead


def test_the_warning_comes_with_the_third_step_across_windows():
    said = []
    pulse = Pulse(300, said.append)
    for row in trained((6.0, 1.0), *[(GUESS, 0.0)] * 6):
        pulse.feel([row])
    assert len(said) == 1 and "at step 4" in said[0] and without_gradient(trained(*[(GUESS, 0.0)] * 3), 300)
