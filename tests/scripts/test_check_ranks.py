"""scripts/check/check_ranks.py fails where a case shows what it looks for, not only where a case could not run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts" / "check"
EQUAL = {"same_samples": True, "largest_loss_difference": 8e-4}


@pytest.fixture
def check_ranks(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))  # it takes functions from verify_resume.py beside it
    spec = importlib.util.spec_from_file_location("check_ranks", SCRIPTS / "check_ranks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("part", "values", "code"),
    [
        ("equal", EQUAL, 0),
        ("equal", EQUAL | {"same_samples": False}, 1),
        ("equal", EQUAL | {"largest_loss_difference": 3.0}, 1),
        ("equal", EQUAL | {"largest_loss_difference": float("nan")}, 1),
        ("resume", {"exit_code": 0}, 0),
        ("resume", {"exit_code": 1, "says": "losses differ"}, 1),
        ("faults", {"exit_code": 1, "orphans": 0}, 0),
        ("faults", {"exit_code": 1, "orphans": 2}, 1),
        ("large", {"ms_median": 1.0}, 0),
        ("large", {"preempted_orphans": 1}, 1),
        ("scale", {"failed": "Failed: no GPU"}, 1),
    ],
)
def test_exit_code_follows_what_was_found(check_ranks, monkeypatch, tmp_path, capsys, part, values, code):
    out = tmp_path / f"{part}.json"
    out.write_text("of before")
    (tmp_path / "before.json").hardlink_to(out)
    monkeypatch.setitem(check_ranks.PARTS, part, lambda arguments: iter([("a case", values)]))
    monkeypatch.setattr(check_ranks.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(check_ranks.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["check_ranks.py", part, "--gpus=2", f"--out={tmp_path}"])
    assert check_ranks.main() == code
    assert ("FAILED" in capsys.readouterr().out) == bool(code)
    assert "a case" in json.loads(out.read_text())
    assert (tmp_path / "before.json").read_text() == "of before"  # replaced, not written over


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["check_ranks.py", "equal", "--gpus=0"], "--gpus 0: there are"),
        (["check_packed.py", "--model=nope"], "invalid choice: 'nope'"),
        (["check_packed.py", "--model=llama_tiny", "--recipe=foo"], "no recipe 'foo' in configs/quant"),
        (["check_packed.py", "--model=llama_tiny", "--recipe=quartet2", "--tokens=100"], "contraction of 100"),
        (["check_packed.py", "--steps=0"], "at least 1 is needed, got '0'"),
        (["verify_resume.py", "--worlds=1,a"], "at least 1 is needed, got 'a'"),
    ],
)
def test_wrong_words_to_the_checks_are_one_line(words, says, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location(words[0].removesuffix(".py"), SCRIPTS / words[0])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda wanted: None)
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert says in capsys.readouterr().err
