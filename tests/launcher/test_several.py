"""Runs of one process, one after another: what ends all of them, and what only one."""

import pytest

from launcher.several import one_after_another

WORDS = ["a=1", "b=2", "--", "a=2", "--", "a=3"]


@pytest.mark.parametrize(
    ("codes", "ran", "code"),
    [
        ([0, 0, 0], 3, 0),
        ([2, 0, 1], 3, 2),
        ([0, 75, 0], 2, 75),
        ([130, 0, 0], 1, 130),
        ([0, ZeroDivisionError(), 0], 3, 1),
    ],
)
def test_a_stop_ends_all_and_an_error_its_own_run(codes, ran, code, capsys):
    seen, left = [], list(codes)

    def run(words):
        seen.append(words)
        if isinstance(found := left.pop(0), Exception):
            raise found
        return found

    assert one_after_another(WORDS, run) == code
    assert seen == [["a=1", "b=2"], ["a=2"], ["a=3"]][:ran]
    assert ("ZeroDivisionError" in capsys.readouterr().err) == any(isinstance(c, Exception) for c in codes)
