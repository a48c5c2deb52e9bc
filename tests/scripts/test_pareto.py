"""Predicted time to equal loss: the formula by hand, and runs priced by their commands, forks over parents."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from analysis import pareto
from analysis.pareto import Point
from analysis.runs import RunError, read_run
from scripts import price

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "results"
TRUNK = KEPT / "corpus_forward" / "corpus_forward-quartet2-x2-s0"
TAIL = KEPT / "corpus_forward_tails" / "corpus_forward-quartet2-x2-s0-tail2137"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pareto_script", ROOT / "scripts" / "pareto.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def point(gap=0.029, half=math.nan, step=1.1, label="arm"):
    return Point(label, "B200", 1, gap, half, step, 0.29, 0.25)


def test_time_and_its_interval_by_hand():
    """A tenth of a factor e of tokens more; its error 49 % of that by the slope, and the seeds' half of the gap."""
    assert point().time == pytest.approx(1.1 * math.exp(0.1))
    low, high = point().interval
    assert (low, high) == pytest.approx((1.1 * math.exp(0.1 - 0.049), 1.1 * math.exp(0.1 + 0.049)))
    wide = point(half=0.0145).interval
    assert wide[1] == pytest.approx(1.1 * math.exp(0.1 + math.hypot(0.049, 0.05)))


def test_the_front_has_what_no_other_beats_in_both():
    plain, four, worse = point(0.0, step=1.0, label="bf16"), point(0.02, step=0.8, label="four"), point(0.03, step=0.95)
    assert [p.label for p in pareto.front([worse, plain, four])] == ["four", "bf16"]


def test_the_slope_is_the_laws_derivative(tmp_path):
    law = {"e": 1.0, "a": 0.0, "alpha": 0.3, "b": 2.0, "beta": 0.5, "gamma": 1.0}
    (tmp_path / "law.json").write_text(json.dumps({"laws": {"coupled": law}}))
    expected = 0.5 * 2.0 * (2e8 / 1e10) ** -0.5
    assert pareto.slope_of_law(10**8, 2 * 10**8, tmp_path / "law.json") == pytest.approx(expected, rel=0.01)
    (tmp_path / "law.json").write_text("{}")
    with pytest.raises(RunError, match="give --slope"):
        pareto.slope_of_law(1, 1, tmp_path / "law.json")


def test_a_fork_costs_its_parents_steps_and_its_own(script):
    runs = [read_run(TRUNK), read_run(TAIL)]
    found = script.Pricer(runs).total(runs[1])
    words = ["experiment=corpus_forward", "cell=quartet2/x2/s0"]
    each = []
    for more in ([], ["quant.fprop=none"]):
        config = script.Composer().compose([*words, *more], typed=False).config
        each.append([price.mean_step(price.checked_of(config), machine).total for machine in price.MACHINES])
    assert found == pytest.approx([2137 * a + 915 * b for a, b in zip(*each, strict=True)], rel=1e-6)
    with pytest.raises(RunError, match="is a fork of corpus_forward-quartet2-x2-s0, which is not among"):
        script.Pricer(runs[1:]).total(runs[1])
    runs[0].info["numerics"]["quant.fprop.x.grid"] = "int4"
    with pytest.raises(RunError, match=r"no price, its command means another recipe by now: quant\.fprop\.x\.grid"):
        script.Pricer(runs).total(runs[0])


def test_the_command_line_draws_and_writes(script, tmp_path, monkeypatch, capsys):
    bf16 = TRUNK.with_name("corpus_forward-bf16-x2-s0")
    words = [str(bf16), str(TRUNK), str(TAIL), "--sd", "1.7e-3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["pareto.py", *words])
    assert script.main() == 0
    shown = capsys.readouterr().out
    assert "+31.2 ± 3.3" in shown and "quartet2@2137 > quartet2 fprop=none" in shown and "a roofline" in shown
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    assert len((tmp_path / "pareto.csv").read_text().splitlines()) == 1 + 3 * len(price.MACHINES)
    monkeypatch.setattr(sys, "argv", ["pareto.py", str(tmp_path)])
    assert script.main() == 2 and capsys.readouterr().err.count("\n") == 1
