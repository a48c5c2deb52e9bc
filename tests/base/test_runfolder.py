"""The one reader of metrics.jsonl, forwards and backwards, and what counts as declared."""

import json
import random

import pytest

from base import runfolder
from base.runfolder import RunError, newest_rows, read_metrics, undeclared


def write(folder, *rows, end="\n"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / runfolder.METRICS).write_text("\n".join(lines) + end)


def train(step, **more):
    return {"kind": "train", "step": step, **more}


def test_forwards_and_backwards_are_the_same_rows(tmp_path, monkeypatch):
    draw = random.Random(0)
    rows = [train(step, text="x" * draw.choice([0, 5, 300])) for step in range(60)]
    for end in ("\n", '\n{"kind": "train", "st', ""):
        write(tmp_path, *rows, end=end)
        expected = rows if end else rows[:-1]  # the last line is unterminated
        assert read_metrics(tmp_path) == expected
        for window in (1, 7, 64, 1000, 1 << 16):
            monkeypatch.setattr(runfolder, "WINDOW", window)
            assert list(newest_rows(tmp_path)) == expected[::-1]


@pytest.mark.parametrize("text", ["", "\n", '{"kind": "tr'])
def test_a_file_without_a_whole_row(text, tmp_path):
    assert list(newest_rows(tmp_path)) == read_metrics(tmp_path) == []  # no file at all
    (tmp_path / runfolder.METRICS).write_text(text)
    assert list(newest_rows(tmp_path)) == []
    if text != "\n":  # an empty line is no row
        assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"kind": "train"}', '{"step": 1}', '{"kind": "event", "step": 1}'])
def test_a_bad_line_is_named_forwards_and_passed_over_backwards(line, tmp_path):
    write(tmp_path, train(1), line, train(2))
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: malformed record"):
        read_metrics(tmp_path)
    assert list(newest_rows(tmp_path)) == [train(2), train(1)]


def test_what_is_not_declared_is_named():
    assert undeclared(train(1, loss=2.0)) == set()
    assert undeclared(train(1, los=2.0)) == {"los"}
    assert undeclared({"kind": "probe", "step": 1}) == {"kind probe"}
    event = {"kind": "event", "event": "skip", "step": 1, "tokens": 1, "bad_step": 1, "time": 0.0}
    assert undeclared(event) == set() and undeclared(event | {"why": ""}) == {"why"}
    assert undeclared(event | {"event": "skipped"}) == {"event skipped"}
