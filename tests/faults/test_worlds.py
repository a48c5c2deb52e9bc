"""Whole runs on 1 and 2 ranks, in both parallel modes: same samples and curve, same evaluation, and they take over from
each other after kills."""

import itertools
import json
import time

import pytest
from forked import Ranks
from reading import steps_of, train_rows

pytestmark = pytest.mark.faults
# Three evaluation batches on two ranks: one rank has none in the last round.
EVALUATION = ["evaluate.final_tokens=384", "quant=quartet2"]
LOSS_ATOL = 5e-3  # roundings that fall the other way after a last-bit difference of a weight


def finish(overrides, tmp_path, name: str, world: int, *more: str) -> list[int]:
    return Ranks(overrides(name, *EVALUATION, *more), tmp_path / f"{name}.log", world).wait(240)


def assert_close(folder, reference) -> None:
    rows, expected = train_rows(folder), train_rows(reference)
    assert [row["samples"] for row in rows] == [row["samples"] for row in expected]
    assert rows[0]["loss"] == pytest.approx(expected[0]["loss"], abs=1e-6)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=LOSS_ATOL)
    results = [json.loads((path / "result.json").read_text()) for path in (folder, reference)]
    assert results[0]["final_loss"] == pytest.approx(results[1]["final_loss"], abs=LOSS_ATOL)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_follow_the_curve_of_one(overrides, tmp_path, mode):
    assert finish(overrides, tmp_path, "one", 1) == [0]
    assert finish(overrides, tmp_path, "two", 2, f"parallel={mode}") == [0, 0]
    assert_close(tmp_path / "runs" / "two", tmp_path / "runs" / "one")


def test_killed_run_goes_on_with_other_ranks_and_modes(overrides, tmp_path):
    """Each start has another world size or mode than the one that was killed."""
    assert finish(overrides, tmp_path, "one", 1) == [0]
    folder, log = tmp_path / "runs" / "moving", tmp_path / "moving.log"
    starts = itertools.cycle([(2, "fsdp"), (1, "auto"), (2, "ddp")])
    for target in (4, 7, 10):
        world, mode = next(starts)
        ranks = Ranks(overrides("moving", *EVALUATION, f"parallel={mode}"), log, world)
        while ranks.alive() and max([0, *steps_of(folder)]) < target:
            time.sleep(0.002)
        ranks.kill(ranks.alive())
        ranks.wait()
    assert finish(overrides, tmp_path, "moving", 2, "parallel=fsdp") == [0, 0]
    assert steps_of(folder) == list(range(1, 13))
    assert_close(folder, tmp_path / "runs" / "one")
