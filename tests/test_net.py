"""scripts/check/net.py says what differs and what is gone. That it compares the right things, only running it shows."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "scripts" / "check" / "net.py"


@pytest.fixture(scope="module")
def net():
    spec = importlib.util.spec_from_file_location("net", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("now", "same", "said"),
    [
        ({"a": 1, "b": "x"}, True, "2 equal"),
        ({"a": 1, "b": "x", "c": 0}, True, "1 new"),
        ({"a": 1, "b": "y"}, False, "differs: b  x -> y"),
        ({"a": 1}, False, "missing: b"),
    ],
    ids=["equal", "new", "differs", "missing"],
)
def test_what_differs_or_is_gone_is_named_and_fails(net, capsys, now, same, said):
    assert net.report("layers", {"a": 1, "b": "x"}, now, 0.0) is same
    assert said in " ".join(capsys.readouterr().out.split(" ")).replace("     ", "")


def test_a_base_that_is_no_commit_is_refused(net):
    with pytest.raises(ValueError, match=r"--base nonsense.*give a commit"), net.worktree("nonsense"):
        pass
