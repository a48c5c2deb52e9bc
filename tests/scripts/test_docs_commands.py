"""The commands of README and docs: their words are right; scripts/check/docs_commands.py runs them."""

import importlib.util
import sys

import pytest

from base.commands import ROOT

spec = importlib.util.spec_from_file_location("docs_commands", ROOT / "scripts" / "check" / "docs_commands.py")
docs = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = docs  # dataclasses look themselves up there
spec.loader.exec_module(docs)
GRIDS = ("run_grid.py", "cost.py")  # these compose every cell: tests/scripts/test_cost.py


def test_every_command_of_the_pages_has_right_words():
    found = [command for command in docs.commands() if not any(name in command.text for name in GRIDS)]
    wrong = [f"{command.page}: {command.text}\n    {said}" for command in found if (said := docs.problem(command))]
    assert len(found) > 60 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("make tset", "no make target tset"),
        ("pip install -e '.[gpu,clutass]'", "no extra clutass"),
        ("python -m pytest -m gpuu", "no marker"),
        ("python -m kernels.selftset", "no module"),
        ("python scripts/plan.py experiment=c4_grid", "no file scripts/plan.py"),
        ("python scripts/compare.py 'runs/*' --margn 3e-3", "knows no --margn"),
        ("python train.py quant=quartet", "did you mean quartet2"),
        ("python train.py -m quant=bf16,sr optim.lrr=1", "did you mean optim.lr"),
        ("nibble compar 'runs/*'", "no command compar"),
    ],
)
def test_a_wrong_word_is_named(text, said):
    assert said in docs.problem(docs.Command("page.md", text))


def test_commands_are_read_from_blocks_and_prose(tmp_path, monkeypatch):
    page = (
        "Type `make test`, or `other` and\n`python train.py\n  seed=1`.\n\n```\npython train.py a=1 \\\n    b=2\n```\n"
    )
    (tmp_path / "README.md").write_text(page)
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    found = [" ".join(command.text.split()) for command in docs.commands()]
    assert found == ["python train.py a=1 b=2", "make test", "python train.py seed=1"]


@pytest.mark.slow  # a training run and some forty processes
def test_the_commands_of_the_pages_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["docs_commands.py"])
    assert docs.main() == 0
