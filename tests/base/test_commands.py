"""The commands: one table, each with its file; outside a checkout texts say `nibble NAME`."""

import subprocess
import sys

import pytest

from base import commands
from base.commands import ROOT


def test_every_command_has_a_file_and_every_script_a_command():
    scripts = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").glob("[a-z]*.py")}
    assert {*commands.COMMANDS.values()} == scripts | {"train.py"}


@pytest.mark.parametrize(
    ("text", "installed"),
    [
        ("python train.py model=x", "nibble train model=x"),
        ("prepare it with scripts/prepare_data.py", "prepare it with nibble prepare"),
        ("torchrun --nproc-per-node=4 train.py ...", "torchrun --nproc-per-node=4 -m train ..."),
        ("runs/my-train.py and scripts/bench/bench_step.py", "runs/my-train.py and scripts/bench/bench_step.py"),
    ],
)
def test_commands_are_spelled_as_they_are_typed(text, installed):
    assert commands.spelled(text, checkout=False) == installed
    assert commands.spelled(text, checkout=True) == text


def test_an_installed_copys_own_path_is_not_recorded():
    words = [str(ROOT / "train.py"), "data.files=a b.txt"]
    assert commands.typed(words, checkout=False) == "nibble train 'data.files=a b.txt'"
    assert commands.typed(["train.py", "steps=1"], checkout=True) == "train.py steps=1"


def nibble(*words):
    return subprocess.run([sys.executable, "nibble.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_nibble_lists_its_commands_and_names_the_nearest():
    listed = nibble("--help")
    assert listed.returncode == 0 and all(f"\n  {name} " in listed.stdout for name in commands.COMMANDS)
    wrong = nibble("compar")
    assert wrong.returncode == 2 and "did you mean compare" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_nibble_hands_on_words_and_exit_code():
    done = nibble("train", "modle=x")
    assert done.returncode == 2 and "did you mean model" in done.stderr and done.stderr.count("\n") == 1
