"""The leaderboard's intervals and words: one seed has an interval, and "equal" needs two one-sided tests."""

import json

import pytest
from synthetic import write_run

from analysis import leaderboard
from analysis.contrasts import Spread
from analysis.runs import find_runs

KEPT = Spread(1.2e-3, 7, "kept")
RATE = {leaderboard.LR: 1.7e-3}


def runs_of(tmp_path, losses, **more):
    for recipe, row in losses.items():
        for seed, loss in enumerate(row):
            write_run(tmp_path, recipe, seed, loss, numerics=RATE, **more)
    return find_runs([f"{tmp_path}/*"])


def verdicts(found):
    return {arm.label: leaderboard.verdict(arm.versus) for arm in found if arm.versus}


def test_one_seed_has_an_interval_from_the_pooled_spread(tmp_path):
    losses = {"bf16": [3.6], "quartet2": [3.6287], "near": [3.6267], "far": [3.6211], "same": [3.6287]}
    found, spread = leaderboard.arms(runs_of(tmp_path, losses), KEPT)
    assert [arm.label for arm in found] == ["bf16", "far", "near", "quartet2", "same"]
    assert spread == KEPT
    gap = next(arm.gap for arm in found if arm.label == "quartet2")
    assert gap.half_width == pytest.approx(2.3646 * 1.2e-3 * 2**0.5, rel=1e-3)
    # The very same loss, from one seed, is not called equal.
    assert verdicts(found) == {"far": "ahead", "near": "open", "same": "open"}
    assert "| +28.7 +- 4.0 (" in leaderboard.board(found, spread)


def test_equal_takes_seeds(tmp_path):
    noise = [0.0, 0.8e-3, -0.6e-3, 0.3e-3, -0.5e-3]
    losses = {"bf16": [3.6 - n for n in noise], "quartet2": [3.63 + n for n in noise]}
    losses["same"] = [3.63 - n for n in noise]
    found, spread = leaderboard.arms(runs_of(tmp_path, losses), KEPT)
    assert spread.df > KEPT.df and spread.sd < KEPT.sd
    assert verdicts(found)["same"] == "equal"


def test_other_rates_models_and_unfinished_runs_stay_out(tmp_path):
    runs = runs_of(tmp_path, {"bf16": [3.6], "quartet2": [3.63]}, model="llama_30m")
    write_run(tmp_path, "sr", 0, 3.7, model="llama_30m", numerics={leaderboard.LR: 1.2e-3})
    write_run(tmp_path, "nvidia", 0, 3.64, model="llama_30m", numerics=RATE, steps_done=50)
    write_run(tmp_path, "bf16", 0, 3.5, model="ngpt_30m", numerics=RATE)
    write_run(tmp_path, "ngpt_nvfp4", 0, 3.52, model="ngpt_30m", numerics=RATE)
    runs = find_runs([f"{tmp_path}/*"])
    assert {run.info["recipe"] for run in leaderboard.at(runs, "llama_30m", 1.7e-3)} == {"bf16", "quartet2"}
    own = leaderboard.own_baseline(leaderboard.at(runs, "ngpt_30m", None))
    assert "| `ngpt_nvfp4` | 0.0017 | 0 | 3.5200 | +20.0 |" in own
    assert "no run" in leaderboard.own_baseline([])


def test_parts_of_a_gap_come_from_the_scored_weights(tmp_path):
    runs = runs_of(tmp_path, {"bf16": [3.6], "quartet2": [3.63]})
    for run in runs:
        own = 0.012 if run.info["recipe"] == "quartet2" else 0.0
        rows = {"own": {"loss": 3.63, "over_bf16": own}, "bf16": {"loss": 3.618, "over_bf16": 0.0}}
        rows["nvfp4"] = {"loss": 3.63 if own else 3.622, "over_bf16": own}
        (run.path / "score").mkdir()
        (run.path / "score" / "100.json").write_text(json.dumps({"forwards": rows}))
    assert "| 12.0 | 18.0 | +8.0 | |" in leaderboard.board(*leaderboard.arms(runs, KEPT))


def test_properties_name_what_is_not_measured(tmp_path):
    found, _ = leaderboard.arms(runs_of(tmp_path, {"bf16": [3.6], "quartet2": [3.63]}), KEPT)
    for name, ms in (("a", 70), ("b", 60)):
        rows = [{"recipe": "bf16", "ms_median": 50}, {"recipe": "quartet2", "ms_median": ms}]
        (tmp_path / f"step_m_{name}.json").write_text(json.dumps(rows))
    ratios = leaderboard.step_ratios(tmp_path, "m")
    operand = {"bits": 4.5, "align": -2e-3, "clipped": 0.01}
    captured = {"quartet2": {"fprop": {"fprop.x": operand}, "mean": {"fprop.x": 7.2e-3, "y": 5.7e-3}, "native": "none"}}
    line = "| `quartet2` | 4.5, - | 7.2 / - / 5.7 | -2.0, - | 1.00, - | 1.20 | none |"
    assert line in leaderboard.properties(found, captured, ratios)
    assert "| `quartet2` | - | - / - / - | - | - | - | - |" in leaderboard.properties(found, {}, {})
