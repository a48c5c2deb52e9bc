import json
import math
import shutil

import numpy as np
import pytest
from synthetic import non_finite, write_run

from analysis import noise
from analysis.compare import group_runs, pick_baseline, table
from analysis.keep import keep
from analysis.pairing import RESOLVED, Floor, seed_gap
from analysis.runs import find_runs


def seeds(root, recipe, losses, **kwargs):
    for seed, loss in enumerate(losses):
        write_run(root, recipe, seed, loss, **kwargs)


def floor_of(root):
    (entry,) = noise.measure(find_runs([f"{root}/*"])).values()
    return entry


def test_spreads_are_pooled_over_recipes_by_hand(tmp_path):
    seeds(tmp_path, "bf16", [3.00, 3.02, 3.04])  # squares .0008, df 2
    for seed, loss in ((3, 3.10), (4, 3.12)):  # squares .0002, df 1; other seeds: no part that one does to both
        write_run(tmp_path, "sr", seed, loss)
    floors = noise.measure(find_runs([f"{tmp_path}/*"]))
    (entry,) = floors.values()
    assert entry["seed"]["df"] == 3 and entry["seed"]["sd"] == pytest.approx(math.sqrt(0.001 / 3))
    assert entry["recipes"]["bf16"] == {"mean": pytest.approx(3.02), "seeds": 3, "sd": pytest.approx(0.02)}
    assert "rerun" not in entry


def test_reruns_nudges_and_seeds_are_told_apart(tmp_path):
    seeds(tmp_path, "bf16", [3.00, 3.02])
    write_run(tmp_path, "bf16", 0, 3.00002, name="rerun")
    write_run(tmp_path, "bf16", 0, 3.004, name="nudged", numerics={"perturb": 1e-6}, hash="other")
    (entry,) = noise.measure(find_runs([f"{tmp_path}/*"])).values()
    assert entry["rerun"] == {"sd": pytest.approx(0.00002 / math.sqrt(2)), "df": 1}
    assert entry["nudge"]["df"] == 1 and entry["nudge"]["sd"] == pytest.approx(0.004 / math.sqrt(2), rel=0.01)
    assert entry["seed"]["df"] == 1 and entry["seed"]["sd"] == pytest.approx(0.02 / math.sqrt(2), rel=0.01)


def test_a_copy_is_no_rerun(tmp_path):
    """Neither of a whole run nor of one that went on after it was copied."""
    seeds(tmp_path, "bf16", [3.00, 3.02])
    path = write_run(tmp_path, "sr", 0, 3.1)
    shutil.copytree(path, tmp_path / "again")
    metrics = tmp_path / "again" / "metrics.jsonl"
    for lines in (None, 50):
        metrics.write_text("".join(metrics.read_text().splitlines(True)[:lines]))
        with pytest.raises(ValueError, match=r"again and .*llama_tiny-sr-0: one is a copy of the other"):
            find_runs([f"{tmp_path}/*"])
    with pytest.raises(ValueError, match="one is a copy"):
        find_runs([str(path), str(keep(find_runs([str(path)])[0], tmp_path / "kept"))])


def test_paired_spread_is_what_a_seed_does_not_do_to_all_recipes(tmp_path):
    seeds(tmp_path, "bf16", [3.00, 3.02])
    seeds(tmp_path, "sr", [3.10, 3.13, 3.50])  # the third seed is not common
    (entry,) = noise.measure(find_runs([f"{tmp_path}/*"])).values()
    # Gaps .10 and .11: their standard deviation over sqrt(2) is that of one run.
    assert entry["paired"] == {"sd": pytest.approx(0.01 / math.sqrt(2) / math.sqrt(2)), "df": 1}
    # Student's t 12.706 for one degree of freedom: 12.706 * .005 * sqrt(2 / 2) = .0635
    assert "over 2 seeds" in noise.text({"key": entry}) and "paired +-63.53e-3" in noise.text({"key": entry})


def test_what_a_seed_does_to_all_recipes_was_drawn_once_a_seed(tmp_path):
    seeds(tmp_path, "bf16", [3.00, 3.02])
    seeds(tmp_path, "sr", [3.10, 3.13])
    entry = floor_of(tmp_path)
    # Mean squares: of seeds .000625, of what is left .000025, each of one degree of freedom. Satterthwaite:
    # .00065^2 / (.000625^2 + .000025^2) = 1.0799. F = 25; F(1, 1) has 647.8 and .001544 as 95 % bounds.
    assert entry["seed"] == {"sd": pytest.approx(math.sqrt(0.00065 / 2)), "df": pytest.approx(1.0799, abs=1e-4)}
    bounds = [(25 / quantile - 1) / 2 for quantile in (647.79, 0.0015437)]
    low, high = (ratio / (1 + ratio) for ratio in bounds)
    expected = {"value": 1 - 0.000025 / 0.000325, "low": low, "high": high}
    assert entry["correlation"] == pytest.approx(expected, rel=1e-4)
    assert "+0.92 (95 % -0.93 .. +1.00)" in noise.text({"key": entry})


def test_unpaired_verdicts_hold_where_seeds_are_shared_in_the_floor():
    """Nine recipes share three seeds, whose common part is five times the noise: gaps between runs of other seeds are
    called resolved in 7 % of 1,000 cases without a gap (16 % with 18 degrees of freedom instead of about two)."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(1000):
        common = rng.normal(0, 5e-3, 3)
        losses = {str(r): dict(enumerate(common + rng.normal(0, 1e-3, 3))) for r in range(9)}
        spread = noise.between_seeds(losses, noise.paired(losses))
        one, other = rng.normal(0, math.hypot(5e-3, 1e-3), (2, 2))
        gap = seed_gap({0: one[0], 1: one[1]}, {2: other[0], 3: other[1]}, Floor((spread.sd, spread.df)))
        wrong += gap.verdict == RESOLVED
    assert 30 <= wrong <= 100


def test_paired_intervals_cover_where_recipes_share_a_baseline_and_half_of_them_lack_a_seed():
    """1,500 draws of four recipes, two with three seeds and two with two, correlation 0.9: the residuals have 4 degrees
    of freedom. Coverage of each kind of pair is .95 +- 4 standard errors; with 5 degrees it would be .92 to .93."""
    rng, hits, squares = np.random.default_rng(0), np.zeros(3), []
    for _ in range(1500):
        common = rng.normal(0, 3e-3, 3)
        losses = {str(r): dict(enumerate(common[: 3 - r // 2] + rng.normal(0, 1e-3, 3 - r // 2))) for r in range(4)}
        left = noise.paired(losses)
        assert left.df == 4
        squares.append(left.sd**2)
        floor = Floor((1.0, 1), (left.sd, left.df))
        for i, (one, other) in enumerate(("01", "02", "23")):
            low, high = seed_gap(losses[one], losses[other], floor).interval
            hits[i] += low < 0 < high
    assert hits / 1500 == pytest.approx(0.95, abs=0.0225)
    assert np.mean(squares) == pytest.approx(1e-6, rel=0.07)  # 4 standard errors


def test_one_recipe_or_one_common_seed_has_no_paired_spread(tmp_path):
    seeds(tmp_path, "bf16", [3.00, 3.02])
    assert "paired" not in floor_of(tmp_path)
    write_run(tmp_path, "sr", 1, 3.1)
    assert "paired" not in floor_of(tmp_path)


def test_a_recipe_of_one_seed_leaves_the_paired_spread_of_the_others_as_it_is(tmp_path):
    seeds(tmp_path, "bf16", [3.00, 3.02])
    seeds(tmp_path, "sr", [3.10, 3.13])
    before = floor_of(tmp_path)
    write_run(tmp_path, "bf16", 0, 2.5, numerics={"optim.lr": 2e-3}, name="fast")
    after = floor_of(tmp_path)
    assert after["paired"] == {"sd": pytest.approx(before["paired"]["sd"]), "df": 1}
    assert "over 2 seeds" in noise.text({"key": after})


def test_learning_rates_are_no_seeds(tmp_path):
    seeds(tmp_path, "bf16", [3.0, 3.1])
    seeds(tmp_path / "fast", "bf16", [2.0, 2.1], numerics={"optim.lr": 2e-3})
    (entry,) = noise.measure(find_runs([f"{tmp_path}/*", f"{tmp_path}/fast/*"])).values()
    means = {label: (row["mean"], row["seeds"]) for label, row in entry["recipes"].items()}
    assert means == {"bf16 (optim.lr=0.001)": (pytest.approx(3.05), 2), "bf16 (optim.lr=0.002)": (2.05, 2)}


def test_reruns_count_once_and_the_order_of_the_folders_does_not_matter(tmp_path):
    seeds(tmp_path / "a", "bf16", [3.00, 3.02])
    write_run(tmp_path / "a", "bf16", 0, 3.03, name="nudged", numerics={"perturb": 1e-6}, hash="other")
    write_run(tmp_path / "b", "bf16", 0, 3.01)
    entries = [
        noise.measure(find_runs([f"{tmp_path}/{folder}/*" for folder in order])).popitem()[1] for order in ("ab", "ba")
    ]
    assert entries[0] == entries[1] and entries[0]["recipes"]["bf16"] == {
        "mean": pytest.approx(3.0125),  # of 3.005 and 3.02
        "seeds": 2,
        "sd": pytest.approx(0.015 / math.sqrt(2)),
    }
    assert entries[0]["nudge"] == {"sd": pytest.approx(0.025 / math.sqrt(2)), "df": 1}


def test_other_lengths_and_data_have_their_own_floor(tmp_path):
    seeds(tmp_path, "bf16", [3.0, 3.1])
    seeds(tmp_path, "bf16", [2.0, 2.3], data_fingerprint="other", name=None, model="llama_30m")
    floors = noise.measure(find_runs([f"{tmp_path}/*"]))
    assert sorted(round(f["seed"]["sd"] * math.sqrt(2), 3) for f in floors.values()) == [0.1, 0.3]


def test_number_of_seeds_that_resolve_a_difference():
    # Student's t of 10 degrees of freedom: 2.228 and 0.879. 2 * 3.107^2 * (.003 / .002)^2 = 43.4 -> 44
    assert noise.Spread(0.003, 10).seeds_to_resolve(0.002) == 44
    assert noise.Spread(0.003, 10).seeds_to_resolve(0.01) == 2  # 1.7, but one seed gives no verdict
    # One degree: 12.706 and 1.376. 2 * 14.08^2 * 2.25 = 892. Many: 1.960 and 0.842. 2 * 2.802^2 * 2.25 = 35.3
    assert noise.Spread(0.003, 1).seeds_to_resolve(0.002) == 893
    assert noise.Spread(0.003, 10**6).seeds_to_resolve(0.002) == 36


def test_unfinished_and_diverged_runs_do_not_count(tmp_path):
    seeds(tmp_path, "bf16", [3.0, 3.1])
    write_run(tmp_path, "bf16", 5, 9.0, steps_done=60)
    write_run(tmp_path, "bf16", 6, float("nan"))
    non_finite(write_run(tmp_path, "bf16", 7, 9.0, steps_done=60), 61)
    assert floor_of(tmp_path)["recipes"]["bf16"]["seeds"] == 2


def test_compare_uses_the_cached_floor_for_its_verdict(tmp_path, main_of):
    seeds(tmp_path / "runs", "bf16", [3.0, 3.001])
    seeds(tmp_path / "runs", "sr", [3.005, 3.006])  # per-seed gaps agree: the paired interval alone would be tiny
    groups = group_runs(find_runs([f"{tmp_path}/runs/*"]))
    base = pick_baseline(groups, None)
    assert table(groups, base)[1].gap.verdict == "resolved"
    assert table(groups, base, floor=Floor((0.01, 8)))[1].gap.verdict == "not resolved: inside the noise"
    cache = tmp_path / "floor.json"
    noisy = tmp_path / "noisy"
    seeds(noisy, "bf16", [3.0, 3.02, 3.04])
    runs = [f"{noisy}/*", "--cache", str(cache)]
    done = main_of("noise_floor.py")(*runs)
    assert done.returncode == 0 and "sd  20.000e-3  df    2" in done.stdout
    done = main_of("compare.py")(f"{tmp_path}/runs/*", "--floor", cache)
    assert "noise floor sd 20.00e-3, df 2" in done.stdout and "not resolved" in done.stdout


def test_a_cache_that_can_not_be_read_or_written_is_one_line(tmp_path, main_of):
    seeds(tmp_path / "runs", "bf16", [3.0, 3.1])
    text = tmp_path / "README.md"
    text.write_text("# no floors")
    for cache in ("/proc/x", text):
        done = main_of("noise_floor.py")(f"{tmp_path}/runs/*", "--cache", cache)
        assert done.returncode == 2 and str(cache) in done.stderr and done.stderr.count("\n") == 1
    assert text.read_text() == "# no floors"


def test_a_cached_floor_of_more_runs_stays_unless_replaced(tmp_path, main_of):
    seeds(tmp_path, "bf16", [3.0, 3.1, 3.2])
    write_run(tmp_path, "bf16", 0, 3.01, name="rerun")
    cache = tmp_path / "floor.json"
    all_runs, fewer = [f"{tmp_path}/*bf16*", f"{tmp_path}/rerun"], [f"{tmp_path}/*bf16*"]

    def measure(*words):
        return main_of("noise_floor.py")(*words, "--cache", cache), cache.read_text()

    first, text = measure(*all_runs)
    assert first.returncode == 0 and measure(*all_runs)[0].returncode == 0  # the same runs again
    done, after = measure(*fewer)
    assert done.returncode == 2 and after == text and "df    2" in done.stdout
    assert "rerun df 1, now 0" in done.stderr and "--replace" in done.stderr and done.stderr.count("\n") == 1
    done, after = measure(*fewer, "--replace")
    assert done.returncode == 0 and "rerun" not in after
    assert measure(*all_runs)[0].returncode == 0  # more runs


def test_fewer_seeds_or_recipes_are_fewer_runs(tmp_path):
    whole = {"paired": {"sd": 1, "df": 2}, "recipes": {"bf16": {"seeds": 3}, "sr": {"seeds": 2}}}
    for part in ({"bf16": {"seeds": 3}}, {"bf16": {"seeds": 2}, "sr": {"seeds": 2}}):
        with pytest.raises(ValueError, match=r"seeds of all recipes 5, now [34]"):
            noise.refuse_fewer({"key": whole | {"recipes": part}}, {"key": whole}, tmp_path)
    noise.refuse_fewer({"key": whole, "new": {}}, {"key": whole}, tmp_path)
    noise.refuse_fewer({"key": whole}, {"key": {"seed": {"sd": 1, "df": 9}}}, tmp_path)  # a file of another hand


def test_runs_scored_on_more_text_at_the_end_have_their_own_floor(tmp_path):
    seeds(tmp_path, "bf16", [3.0, 3.1])
    path = write_run(tmp_path, "bf16", 2, 9.0)
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    records[-1]["targets"] = 10**6
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (entry,) = noise.measure(find_runs([f"{tmp_path}/*"])).values()
    assert entry["recipes"]["bf16"]["seeds"] == 2 and entry["seed"]["df"] == 1


def test_runs_scored_on_equally_much_other_text_make_no_floor(tmp_path):
    write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "bf16", 1, 3.1, rows_seed=8)
    with pytest.raises(ValueError, match=r"not the same validation tokens.*a noise floor needs"):
        noise.measure(find_runs([f"{tmp_path}/*"]))
