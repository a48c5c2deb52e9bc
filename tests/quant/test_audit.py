"""The audit's own arithmetic, and that the published figures come out."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import backend
from kernels.spec import NVFP4_SCALES, QuantSpec
from quant import audit, library, recipefile
from quant.audit import Quantizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "quant_audit.py"


@pytest.fixture(autouse=True)
def reference():
    backend.use("reference")


@pytest.mark.parametrize(
    ("quantizer", "mse"),
    [
        (Quantizer(QuantSpec.resolve("e2m1", NVFP4_SCALES), None), 9.05),
        (Quantizer(QuantSpec.resolve("e2m1", NVFP4_SCALES, "four_over_six"), None), 7.56),
        (Quantizer(library.load("nvidia").operand("fprop.w").spec, None), 12.40),
        (audit.SR, 23.5),
        (audit.BIASED_EXAMPLE, 17.5),
        (audit.MS_EDEN, 9.32),
        (audit.MS_EDEN_128, 9.7),
        (Quantizer(library.load("quartet2_upstream").operand("dgrad.dy").spec, 128), 9.7),
    ],
    ids=lambda value: value.label if isinstance(value, Quantizer) else "",
)
def test_published_errors_within_one_percent(quantizer, mse):
    got, _ = audit.errors(quantizer, audit.gaussian(audit.SHAPE, 0))
    assert got * 1e3 == pytest.approx(mse, rel=0.01)


def test_the_whole_audit_has_every_figure_that_is_known():
    """gridflip too, which no recipe can take."""
    recipes = [slots for name in library.names() if (slots := library.load(name).audited())]
    used = {*audit.quantizers(recipes), *audit.WITHOUT_RECIPE, audit.BIASED_EXAMPLE, audit.MS_EDEN_128}
    labels = {replace(quantizer, rotation_dim=None).label for quantizer in used}
    assert audit.PUBLISHED_MSE.keys() <= labels
    assert all(audit.published(quantizer) for quantizer in audit.WITHOUT_RECIPE)


def test_alignment_of_upstreams_correction_shows_its_shrinkage():
    # docs/published.md#4-quantizer-errors: 5.9e-4 for the sum in scaled space, 7e-6 in tensor space. On 8 x 2M
    # elements the noise is 3e-5.
    x = audit.gaussian((2048, 2048), 0)
    upstream = Quantizer(library.load("quartet2_upstream").operand("dgrad.dy").spec, 128)
    mean = {q: sum(audit.errors(q, x, seed)[1] for seed in range(1, 4)) / 3 for q in (upstream, audit.MS_EDEN_128)}
    assert -7e-4 < mean[upstream] < -4e-4 and abs(mean[audit.MS_EDEN_128]) < 1.5e-4


def test_gemm_of_ms_eden_beats_sr():
    assert audit.gemm_error(audit.SR) / audit.gemm_error(audit.MS_EDEN) >= audit.GEMM_RATIO


def test_bias_curves_tell_biased_from_unbiased(monkeypatch):
    monkeypatch.setattr(audit, "DRAWS", (1, 4, 16, 64))
    x = audit.gaussian(audit.CURVE_SHAPE, 1)
    curves = {q.label: audit.bias_curve(q, x) for q in (audit.SR, audit.MS_EDEN, audit.BIASED_EXAMPLE)}
    assert [curve.is_biased for curve in curves.values()] == [False, False, True]
    biased = curves[audit.BIASED_EXAMPLE.label]
    assert biased.bias == pytest.approx(706e-6, rel=0.1)  # docs/published.md#4-quantizer-errors
    for label in (audit.SR.label, audit.MS_EDEN.label):
        errors = curves[label].errors
        assert errors[0] / errors[-1] == pytest.approx(64, rel=0.1)
    sparse = audit.bias_curve(audit.MS_EDEN, audit.sparse(audit.CURVE_SHAPE, 1))
    assert sparse.is_biased and sparse.bias > 5e-4


def test_inputs_are_what_they_say():
    sparse = audit.sparse((4, 256), 0)
    assert ((sparse != 0).view(4, 2, 128).sum(-1) <= 2).all() and (sparse != 0).any()
    heavy = audit.student_t((1000, 128), 0).float()
    assert heavy.median().abs() < 0.02
    assert heavy.abs().median() == pytest.approx(0.7649, rel=0.02)  # quartile of Student-t with 3 degrees of freedom


def test_signs_amax_and_limits_of_a_slot_are_audited(monkeypatch):
    """A recipe that differs in them only is another quantizer, under another label and no published figure."""
    monkeypatch.setattr(audit, "DRAWS", (1, 4, 16, 64))
    mapping = library.mapping("quartet2")
    mapping["dgrad"]["rotation"] = {"dim": 128, "signs": "fixed"}
    mapping["wgrad"]["dy"] = {"grid": "e2m1", "rounding": "sr", "amax": 1.0}
    mapping["wgrad"]["x"] = {"grid": "e2m1", "rounding": "sr", "target_max": 6}
    found = audit.quantizers([library.build(mapping)])
    slots = "dgrad.dy", "wgrad.dy", "wgrad.x"
    fixed, clipped, beyond = (next(q for q, used in found.items() if f"quartet2.{slot}" in used) for slot in slots)
    assert len({q.label for q in (*found, audit.SR, audit.MS_EDEN)}) == len({*found, audit.SR, audit.MS_EDEN})
    assert [audit.published(q) for q in (fixed, clipped, beyond)] == [9.32, None, None]
    x = audit.gaussian(audit.CURVE_SHAPE, 1)
    assert audit.errors(clipped, x)[0] > 0.5  # rotated, unnormalised elements have a standard deviation of 11
    assert all(audit.bias_curve(q, x).is_biased for q in (fixed, clipped))


def test_estimate_undoes_the_rotation():
    fine = Quantizer(QuantSpec.resolve("e4m3", library.load("fp8").operand("fprop.x").spec.scales), 32)
    x = audit.gaussian((64, 128), 3)
    assert audit.errors(fine, x)[0] < 1e-3
    assert torch.equal(audit.estimate(fine, torch.zeros_like(x), 1), torch.zeros(64, 128))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(audit, "DRAWS", (1, 16))
    monkeypatch.setattr(audit, "SHAPE", (512, 2048))
    spec = importlib.util.spec_from_file_location("quant_audit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_line_checks_and_writes_json(script, tmp_path, capsys):
    out = tmp_path / "audit.json"
    out.write_text("of before")
    (tmp_path / "before.json").hardlink_to(out)
    assert script.main(["fp8", "nvfp4_rtn", "--check", "--json", str(out)]) == 0
    assert (tmp_path / "before.json").read_text() == "of before"  # replaced, not written over
    report = json.loads(out.read_text())
    assert all(report["checks"].values()) and report["gemm_sr_over_ms_eden"] > 2.4
    printed = capsys.readouterr().out
    assert "1x16 rtn" in printed and "SR with 4/6 is biased" in printed and "FAILED" not in printed


def test_decompose_prints_and_writes_the_terms(script, tmp_path, capsys):
    assert script.main(["nvfp4_rtn", "--decompose", "--json", str(tmp_path / "terms.json")]) == 0
    printed = capsys.readouterr().out
    assert "2<s,grid>" in printed and "nvfp4_rtn.fprop.x" in printed
    row = json.loads((tmp_path / "terms.json").read_text())["rows"][0]
    assert row["normal"]["mse"] == pytest.approx(9.04e-3, rel=0.01)
    assert row["normal"]["dead_share"] == pytest.approx(0.068, rel=0.02)
    with pytest.raises(SystemExit, match="2"):
        script.main(["nvfp4_rtn", "--decompose", "--check"])
    assert "leave the others out" in capsys.readouterr().err


def test_check_fails_on_a_missed_figure(script, monkeypatch, capsys):
    monkeypatch.setitem(audit.PUBLISHED_MSE, "1x16 rtn", 9.3)
    assert script.main(["nvfp4_rtn", "--check"]) == 1
    assert "FAILED 1x16 rtn: MSE within 1 % of 9.3e-3" in capsys.readouterr().out
    assert script.main(["nvfp4_rtn", "--json", "-"]) == 0  # without --check it only reports
    assert not all(json.loads(capsys.readouterr().out)["checks"].values())


def test_unknown_recipe_is_one_clear_error(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["quartet"])
    assert "did you mean quartet2" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        script.main(["nvfp4_rtn", "--json", "/proc/x/y"])
    assert "/proc/x/y" in capsys.readouterr().err


def test_a_broken_recipe_file_is_named_and_the_others_are_audited(script, monkeypatch, tmp_path, capsys):
    for name, text in (("broken", "fprop: {x: [1\n"), ("unknown", "name: unknown\nfprop: {x: {grid: e9}}\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "fp8.yaml").write_text((recipefile.FOLDER / "fp8.yaml").read_text())
    monkeypatch.setattr(recipefile, "FOLDER", tmp_path)
    loaded, broken = script.load([])
    assert [recipe.name for recipe in loaded] == ["fp8"] and len(broken) == 2 and "broken.yaml" in broken[0]
    with pytest.raises(SystemExit):
        script.main(["fp8", "broken"])
    assert "broken.yaml" in capsys.readouterr().err
    monkeypatch.setattr(script.audit, "quantizers", lambda recipes: {})
    monkeypatch.setattr(script, "row", lambda *_: {})
    monkeypatch.setattr(script, "checks", lambda *_: {})
    assert script.main(["--json", "-"]) == 1
    assert capsys.readouterr().err.count("quant_audit: left out: ") == 2
