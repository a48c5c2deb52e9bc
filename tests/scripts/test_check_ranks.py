"""scripts/check/check_ranks.py fails where a case shows what it looks for, not only where a case could not run."""

import importlib.util
import json
import os
import subprocess
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


def test_all_goes_on_after_a_part_that_fails_and_stops_beginning_when_time_is_over(check_ranks, monkeypatch, tmp_path):
    now = [0.0]

    def long(arguments):
        yield "x2", {"ms_min": 1.25, "ms_median": 2.5, "mfu": 0.5}
        now[0] += 2 * check_ranks.ALL_S

    def broken(arguments):
        raise RuntimeError("no such GPU")
        yield

    monkeypatch.setattr(check_ranks, "PARTS", {"equal": broken, "scale": long, "faults": long})
    monkeypatch.setattr(check_ranks.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(check_ranks.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "argv", ["check_ranks.py", "all", "--rehearse", "--gpus=4", f"--out={tmp_path}"])
    assert check_ranks.main() == 1
    first, *table = (tmp_path / "table.md").read_text().splitlines()
    assert "all --rehearse" in first and "4 x " in first
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[3:]]
    assert [(row[0], row[2]) for row in rows] == [("equal", "FAILED"), ("scale", "ok"), ("faults", "FAILED")]
    assert "no such GPU" in rows[0][4] and rows[1][3] == "1.2 / 2.5" and "not begun" in rows[2][4]


def test_two_nodes_are_halves_of_this_one(check_ranks):
    """What each of eight ranks is told, of which the launcher sees one node."""
    told = []
    for rank in range(8):
        places = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "8", "PATH": os.environ["PATH"]}
        command = ["sh", "-c", check_ranks.TWO_NODES, "env"]
        said = dict(line.split("=", 1) for line in subprocess.check_output(command, env=places, text=True).splitlines())
        told.append((said["CUDA_VISIBLE_DEVICES"], said["LOCAL_RANK"], said["LOCAL_WORLD_SIZE"]))
    assert told == [(gpus, str(n), "4") for gpus in ("0,1,2,3", "4,5,6,7") for n in range(4)]
