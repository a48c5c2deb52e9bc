"""What every script owes the person who types it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from base.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").rglob("[a-z]*.py"))

# Ctrl-C at the first import that takes long, or where the work begins.
INTERRUPTED = """
import argparse, importlib.abc, runpy, sys
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name in ("numpy", "torch", "hydra", "yaml"):
            raise KeyboardInterrupt
def interrupt(*_):
    raise KeyboardInterrupt
sys.meta_path.insert(0, Slow())
argparse.ArgumentParser.parse_args = interrupt
sys.argv = [sys.argv[1], "x"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_is_one_line_from_the_first_import_on(script):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, f"{Path(script).stem}: interrupted\n")


WITHOUT_TRITON = """
import os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.modules["triton"] = None  # importing it fails, as where it isn't installed
sys.argv = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", [path for path in SCRIPTS if "bench" in path or "check_fast" in path])
def test_help_needs_no_triton(script):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and Path(script).stem in done.stdout and not done.stderr, done.stderr


# One process for all: most of the time goes into imports.
EVERY_HELP = """
import contextlib, io, runpy, sys
for file in sys.argv[1:]:
    sys.argv, said, code = [file, "--help"], io.StringIO(), None
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(file, run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    except Exception as error:
        code = repr(error)
    if code or len(said.getvalue()) < 100:
        print(file, code, said.getvalue())
"""


def test_every_command_has_help():
    done = subprocess.run(
        [sys.executable, "-c", EVERY_HELP, *COMMANDS.values()], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "words",
    [
        ["--kills", "-1"],
        ["--kills", "0"],
        ["--steps", "0"],
        ["--every", "-4"],
        ["--damage", "2"],
        ["--tolerance", "nan"],
        ["--tolerance", "inf"],
        ["--step-seconds", "-1"],
    ],
    ids="".join,
)
def test_verify_resume_takes_only_numbers_that_can_prove_something(words, monkeypatch, capsys):
    script = load(next(path for path in SCRIPTS if path.endswith("verify_resume.py")))
    monkeypatch.setattr(sys, "argv", ["verify_resume.py", *words])
    with pytest.raises(SystemExit, match="2"):
        script.parse()
    assert f"argument {words[0]}: " in capsys.readouterr().err


def test_verify_resume_proves_nothing_without_a_kill(monkeypatch, capsys, tmp_path):
    script = load(next(path for path in SCRIPTS if path.endswith("verify_resume.py")))
    monkeypatch.setattr(sys, "argv", ["verify_resume.py", "--folder", str(tmp_path)])
    for name, result in (("run_to_end", None), ("killed_start", None), ("compare", [])):
        monkeypatch.setattr(script, name, lambda *_, result=result: result)
    assert script.main() == 1
    assert "nothing is proved" in capsys.readouterr().out
