"""env.json says which code made a run: our repository's commit, what was changed or not in it, or that nobody knows."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.records import runfolder
from training.records.runfolder import code_state, environment


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """repository(top, root): a git repository at `top` whose one commit has everything; our code lies at `root`."""

    def make(top: Path, root: Path, commit: bool = True) -> Path:
        file = root / "training" / "records" / "runfolder.py"
        (root / "configs" / "quant").mkdir(parents=True)
        file.parent.mkdir(parents=True)
        file.write_text("x = 1\n")
        (root / "configs" / "quant" / "sr.yaml").write_text("name: sr\n")
        run_git(top, "init", "-q")
        run_git(top, "add", "-A" if commit else "README")
        run_git(top, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all", "--allow-empty")
        monkeypatch.setattr(runfolder, "ROOT", root.resolve())
        monkeypatch.setattr(runfolder, "THIS_FILE", "training/records/runfolder.py")
        return root

    return make


def run_git(folder: Path, *words: str) -> str:
    (folder / "README").touch()
    return subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True, text=True).stdout.strip()


def test_our_own_commit_clean_and_changed(repository, tmp_path):
    root = repository(tmp_path, tmp_path)
    sr = root / "configs" / "quant" / "sr.yaml"
    assert code_state([sr]) == {"commit": run_git(root, "rev-parse", "HEAD"), "dirty": False, "untracked": []}
    (root / "notes.txt").write_text("not in use")
    assert code_state([sr])["dirty"] is False
    sr.write_text("name: other\n")
    assert code_state([sr])["dirty"] is True


def test_an_untracked_file_in_use_makes_it_dirty(repository, tmp_path, monkeypatch):
    root = repository(tmp_path, tmp_path)
    mine = root / "configs" / "quant" / "mine.yaml"
    mine.write_text("name: mine\n")
    (root / ".gitignore").write_text("*.yaml\n")  # ignored files are in no commit either
    assert code_state([mine])["untracked"] == ["configs/quant/mine.yaml"] and code_state([mine])["dirty"] is True
    outside = tmp_path.parent / "outside.yaml"
    assert code_state([outside])["untracked"] == ["outside.yaml"]
    module, unreal = type(sys)("hack"), type(sys)("unreal")
    module.__file__, unreal.__file__ = str(root / "hack.py"), "_unreal.py"  # the second as torch._classes has it
    monkeypatch.setitem(sys.modules, "unreal", unreal)
    monkeypatch.chdir(root)
    assert code_state()["untracked"] == [] and code_state()["dirty"] is False
    monkeypatch.setitem(sys.modules, "hack", module)
    assert code_state()["untracked"] == ["hack.py"] and code_state()["dirty"] is True


def test_a_repository_around_us_is_not_ours(repository, tmp_path):
    unknown = {"commit": "unknown", "dirty": "unknown", "untracked": []}
    repository(tmp_path / "around", tmp_path / "around" / "venv" / "site-packages", commit=False)
    assert code_state() == unknown


def test_a_folder_of_ours_that_another_repository_begins_at(repository, tmp_path):
    repository(tmp_path, tmp_path, commit=False)
    assert code_state()["commit"] == "unknown"


def test_without_git_nothing_is_claimed(repository, tmp_path, monkeypatch):
    repository(tmp_path, tmp_path)
    monkeypatch.setenv("PATH", "")
    assert code_state()["commit"] == code_state()["dirty"] == "unknown"


def test_a_hooks_git_dir_does_not_point_elsewhere(repository, tmp_path, monkeypatch):
    root = repository(tmp_path / "ours", tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    run_git(tmp_path / "theirs", "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "theirs" / ".git"))
    found = code_state()["commit"]
    monkeypatch.delenv("GIT_DIR")
    assert found == run_git(root, "rev-parse", "HEAD")


def test_a_recorded_command_can_be_pasted(monkeypatch):
    words = ["train.py", 'data.files="a b.jsonl"', "quant.rules=[{match: 'x*'}]", "run.name=$x"]
    monkeypatch.setattr(sys, "argv", words)
    command = environment(torch.device("cpu"), 1, {})["command"]
    assert shlex.split(command) == words
    echoed = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, env=os.environ)
    assert echoed.stdout.splitlines() == words


def test_every_run_names_its_yaml_files(run, monkeypatch):
    seen = []
    monkeypatch.setattr("training.start.launch.environment", lambda *a: seen.extend(a[3]) or environment(*a))
    run("quant=bf16", "quant.rules=[{match: 'blocks.0.mlp.down', recipe: sr}]", "steps=1", "evaluate.every=null")
    assert {f"{path.parent.name}/{path.name}" for path in seen} >= {
        "model/llama_tiny.yaml",
        "quant/bf16.yaml",
        "quant/sr.yaml",
    }
