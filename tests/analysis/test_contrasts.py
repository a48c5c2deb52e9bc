import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic import non_finite, write_run

from analysis import contrasts
from analysis.contrasts import DIFFERENT, EQUIVALENT, OPEN, Spread, adjusted, contrast, holm, parse

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare.py"
SPREAD = Spread(1.2e-3, 60, "test")
QUARTER = {"quartet2": 0.25, "bf16": 0.75}


def losses(arm=0.0, quartet2=0.035, seeds=3):
    return {
        "bf16": {s: 3.0 + 0.01 * s for s in range(seeds)},
        "quartet2": {s: 3.0 + quartet2 + 0.01 * s for s in range(seeds)},
        "arm": {s: 3.0 + arm + 0.01 * s for s in range(seeds)},
    }


def test_value_and_half_width_by_hand():
    found = contrast("arm", QUARTER, 100, losses(arm=0.010), SPREAD, 3e-3)
    assert found.value == pytest.approx(0.010 - 0.25 * 0.035)
    # sqrt((1 + 1/16 + 9/16) / 3) of the sd of a run, times Student's 2.0003 of 60 degrees of freedom
    assert found.half_width == pytest.approx(2.0002978 * 1.2e-3 * (1.625 / 3) ** 0.5, rel=1e-6)
    assert found.half_width == pytest.approx(1.77e-3, abs=1e-5)


def test_p_values_by_hand():
    found = contrast("arm", {"bf16": 1.0}, 100, losses(arm=0.001), Spread(1.5e-3, 1e9, "test"), 3e-3)
    se = 1.5e-3 * (2 / 3) ** 0.5  # z = .8165, and the margin is 1.633 away on one side, 3.266 on the other
    assert found.se == pytest.approx(se)
    assert found.p_different == pytest.approx(0.41422, abs=1e-4)
    assert found.p_equivalent == pytest.approx(0.05124, abs=1e-4)
    assert found.p_below(0.0) == pytest.approx(1 - 0.41422 / 2, abs=1e-4)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def outcome(arm, spread=SPREAD, seeds=3, margin=3e-3):
    (found,) = adjusted([contrast("arm", QUARTER, 100, losses(arm + 0.25 * 0.035, seeds=seeds), spread, margin)])
    return found.outcome


def test_three_outcomes():
    assert outcome(0.0) == EQUIVALENT and outcome(0.006) == DIFFERENT and outcome(0.0016) == OPEN
    assert outcome(0.0, seeds=1) == OPEN and outcome(0.0, spread=None) == OPEN
    assert outcome(0.0, Spread(0.01, 60, "noisy")) == OPEN  # nothing is equal for want of runs
    assert outcome(0.001, Spread(1e-4, 60, "quiet")) == EQUIVALENT  # resolved, and no loss


def simulated(shift, trials=400, arms=6, seeds=3, sd=1.2e-3, df=None):
    """Outcomes [trials, arms] of arms whose contrast is `shift`; sd known, or estimated with so many degrees."""
    rng, out = np.random.default_rng(0), []
    for _ in range(trials):
        effect = 0.01 * rng.normal(size=seeds)  # what a seed does to all recipes
        rows = {"bf16": 3.0 + effect, "quartet2": 3.035 + effect}
        rows |= {f"arm{i}": 3.0 + 0.25 * 0.035 + shift + effect for i in range(arms)}
        table = {name: dict(enumerate(row + sd * rng.normal(size=seeds))) for name, row in rows.items()}
        spread = contrasts.spread_of(table, None) if df is None else Spread(sd, df, "known")
        found = [contrast(f"arm{i}", QUARTER, 100, table, spread, 3e-3) for i in range(arms)]
        out.append([c.outcome for c in adjusted(found)])
    return np.array(out)


@pytest.mark.parametrize("df", [None, 1e9])
def test_one_of_twenty_sets_without_a_difference_shows_one(df):
    """The spread is estimated from the runs themselves, or known: the error of the whole family stays below 5 %."""
    found = simulated(0.0, df=df) == DIFFERENT
    assert found.any(axis=1).mean() < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


@pytest.mark.parametrize("df", [None, 1e9])
def test_one_of_twenty_sets_at_the_margin_is_called_equivalent(df):
    found = simulated(3e-3, df=df) == EQUIVALENT
    assert found.any(axis=1).mean() < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def test_there_is_power_where_the_design_says_so():
    """Three seeds of sd 1.2e-3: a half-width of 1.7e-3, so 5e-3 is seen; without a difference ten seeds show that."""
    assert (simulated(5e-3, trials=100, arms=1, df=1e9) == DIFFERENT).mean() > 0.95
    assert (simulated(0.0, trials=100, arms=1, seeds=10, df=1e9) == EQUIVALENT).mean() > 0.95


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quartet3:.25,bf16:.75", "'quartet3' is not among the recipes: arm, bf16, quartet2"),
        ("bf16", "'bf16' has no weight; write bf16:1"),
        ("quartet2:.25,bf16", "'bf16' has no weight"),
        ("bf16:.5", "sum to 1"),
        ("bf16:1.5,quartet2:-.5", "above 0"),
        ("bf16:nan", "above 0"),
        ("bf16:x", "'x' is no weight"),
    ],
)
def test_a_wrong_mixture_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text, ["arm", "bf16", "quartet2"])


def test_a_label_may_hold_colons_and_weights_add_up():
    assert parse("a (x:1):.5,b:.25,b:.25", ["a (x:1)", "b"]) == {"a (x:1)": 0.5, "b": 0.5}


def test_a_claim_is_one_sided_and_of_one_arm():
    """Half of the two-sided p below zero, and below the margin where equivalence asks for both sides."""
    for arm, outcome in ((-0.004, "below"), (0.001, "not above"), (-0.001, "not above"), (0.0035, OPEN)):
        one, two = (
            contrast("arm", QUARTER, 100, losses(arm + 0.25 * 0.035), SPREAD, 3e-3, one_sided=side)
            for side in (True, False)
        )
        assert one.p_different == pytest.approx(two.p_different / 2 if arm < 0 else 1 - two.p_different / 2)
        assert one.p_equivalent == one.p_below(3e-3) <= two.p_equivalent
        assert adjusted([one])[0].outcome == outcome
    asked = contrasts.read("arm[nvfp4]<quartet2:.25,bf16[nvfp4]:.75", ["arm", "bf16 (lr=1, seed=2)", "quartet2"])
    assert asked.arm == "arm[nvfp4]" and asked.mixture == {"quartet2": 0.25, "bf16 (lr=1, seed=2)[nvfp4]": 0.75}
    with pytest.raises(ValueError, match=r"'bf16' may be bf16 \(a\), bf16 \(b\): give one of them whole"):
        contrasts.read("bf16:1", ["bf16 (a)", "bf16 (b)"])


def compare(tmp_path, *words, runs=("runs/*",)):
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.argv = ["compare.py", *(f"{tmp_path}/{glob}" for glob in runs), "--out", str(tmp_path / "out"), *words]
    return module.main()


def test_the_command_line_judges_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    for recipe, shift in {"bf16": 0.0, "quartet2": 0.035, "arm": 0.005, "bad": 0.03, "gone": 0.0}.items():
        for seed in range(3):
            noise = 1e-4 * ((7 * seed + len(recipe)) % 3)
            path = write_run(
                tmp_path / "runs", recipe, seed, 3.0 + shift + noise, steps_done=60 if recipe == "gone" else 100
            )
            if recipe == "gone":
                non_finite(path, 61)
    assert compare(tmp_path, "--contrast", "quartet2:.25,bf16:.75", "--margin", "5e-3") == 0
    shown = capsys.readouterr().out
    lines = {line.split()[1]: line for line in shown.splitlines() if " - (0.25 quartet2 + 0.75 bf16): " in line}
    assert lines["arm"].startswith("equivalent") and lines["bad"].startswith("different")
    assert lines["gone"].startswith("open") and "diverged" in lines["gone"]
    rows = {row["recipe"]: row for row in csv.DictReader((tmp_path / "out" / "contrasts.csv").open())}
    assert set(rows) == {"arm", "bad", "gone"} and float(rows["arm"]["value"]) == pytest.approx(
        0.005 - 0.25 * 0.035, abs=3e-4
    )
    assert "equivalent" in (tmp_path / "out" / "compare.md").read_text()
    assert compare(tmp_path, "--margin", "5e-3") == 0 and "quartet2 - (bf16): " in capsys.readouterr().out
    assert compare(tmp_path, "--contrast", "nope:1") == 2 and "'nope' is not among" in capsys.readouterr().err


def test_claims_over_two_experiments_and_other_forwards(tmp_path, capsys, monkeypatch):
    """Holm over the claims alone, not over the recipes beside them; served losses are those of score/<step>.json."""
    monkeypatch.setattr(sys, "argv", [])
    shifts = {"bf16": 0.0, "quartet2": 0.030, "arm": 0.020, "aside": 0.029}
    for recipe, shift in shifts.items():
        for seed in range(3):
            noise = 1e-4 * ((7 * seed + len(recipe)) % 3)
            folder = tmp_path / "runs" if recipe == "bf16" else tmp_path / "others"
            path = write_run(folder, recipe, seed, 3.0 + shift + noise)
            (path / "score").mkdir()
            scores = {"nvfp4": {"loss": 3.03 + noise - shift / 10}, "own": {"loss": 3.0 + shift + noise}}
            (path / "score" / "100.json").write_text(json.dumps({"step": 100, "forwards": scores}))
    first, runs = ["--contrast", "arm<quartet2:.75,bf16:.25"], ("runs/*", "others/*")
    second = ["--contrast", "arm[nvfp4]<quartet2[nvfp4]:.7,bf16[nvfp4]:.3"]
    assert compare(tmp_path, *first, *second, runs=runs) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "seeds; p " in line]
    assert len(lines) == 2 and lines[0].startswith("below ") and "arm - (0.75 quartet2 + 0.25 bf16): -2." in lines[0]
    assert "arm[nvfp4] - (0.7 quartet2[nvfp4] + 0.3 bf16[nvfp4]): +0.1" in lines[1]
    rows = list(csv.DictReader((tmp_path / "out" / "contrasts.csv").open()))
    assert float(rows[0]["holm_different"]) == pytest.approx(2 * float(rows[0]["p_below_zero"]))
    served = {(row["recipe"], row["forward"]): row for row in csv.DictReader((tmp_path / "out" / "served.csv").open())}
    assert len(served) == 8 and float(served["arm", "nvfp4"]["over_baseline"]) == pytest.approx(0.028, abs=3e-4)
    for name in ("compare.html", "compare.md"):
        assert "ame final weights under other forwards" in (tmp_path / "out" / name).read_text()
    assert compare(tmp_path, "--contrast", "arm<bf16[fp8]:1", runs=runs) == 2
    assert "no loss under the forward 'fp8' at its end; it has nvfp4, own" in capsys.readouterr().err
