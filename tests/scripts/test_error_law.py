"""The published forwards as scripts/fit_error_law.py makes them, by their known errors on N(0,1)."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from kernels import backend
from quant import audit

SCRIPT = Path(__file__).parents[2] / "scripts" / "fit_error_law.py"


@pytest.fixture
def script():
    backend.use("reference")
    spec = importlib.util.spec_from_file_location("error_law_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_arms_have_their_known_errors(script):
    """Of X: 4/6, plain, override .92 (docs/published.md#4-quantizer-errors), QuEST; of W: 16x16 tiles."""
    found = script.errors(audit.gaussian((512, 1024), 0), audit.gaussian((512, 1024), 1))
    known = {"forward_1x16_46": 7.56, "forward_1x16": 9.04, "forward_1x16_override92": 10.24}
    known |= {"forward_1x16_rht16": 9.04, "forward_quartet:quest/had1": 12.3}
    for arm, mse in known.items():
        assert found[arm]["mse"] * 1e3 == pytest.approx(mse, rel=0.01), arm
    assert found["forward_16x16"]["w"] * 1e3 == pytest.approx(12.4, rel=0.01)
    for arm, numbers in found.items():  # independent operands: their errors add up in the product
        assert numbers["y"] == pytest.approx(numbers["x"] + numbers["w"], rel=0.03), arm
    clipped = script.quest(torch.cat((torch.full((1, 1), 100.0), torch.ones(1, 15)), dim=1))
    assert clipped[1] == 1 / 16 and float(clipped[0][0, 0]) < 75  # 6 * 2.92 / 6 * sqrt(mean of squares) = 73.7


def test_a_rotation_raises_the_error_of_heavy_tails_and_of_nothing_else(script):
    found = script.errors(audit.student_t((256, 1024), 0), audit.gaussian((128, 1024), 1))
    plain, turned = found["forward_1x16"], found["forward_1x16_rht16"]
    assert turned["x"] > 1.1 * plain["x"] and turned["w"] == pytest.approx(plain["w"], rel=0.01)


def test_other_losses_than_the_published_ones_are_refused(script, monkeypatch, tmp_path, capsys):
    path = tmp_path / "runs.csv"
    path.write_text("size,N,D,scheme,variant,final_loss\n30M,1,2,bf16,-,3.0\n")
    monkeypatch.setattr(sys, "argv", ["fit_error_law.py", "--published", str(path)])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "has no forward_1x16_46" in capsys.readouterr().err
