"""The installed package: the wheel in an environment of its own, its commands in an empty folder."""

import importlib.metadata
import subprocess
import sys
import sysconfig

import pytest

from base.commands import ROOT

pytestmark = pytest.mark.slow  # builds a wheel and starts torch: a minute
RUN = ["model=llama_tiny", "model.layers=1", "data.vocab_size=300", "batch.seq_len=64", "batch.sequences=4", "steps=2"]
RUN += ["evaluate.tokens=256", "evaluate.slots=false"]


@pytest.fixture(scope="module")
def nibble(tmp_path_factory):
    """nibble(word, ...) runs the installed command in an empty folder; torch and the like are this environment's."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    own = ["--no-build-isolation"] if _has_setuptools() else []
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    for name in subprocess.run(
        ["git", "ls-files", "-z", "-m", "-o", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\0")[:-1]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", "-q", "--no-deps", *own, "-w", folder, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", wheel], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "theirs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "empty").mkdir()

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [folder / "venv" / "bin" / "nibble", *words]
        return subprocess.run(command, cwd=folder / "empty", capture_output=True, text=True, timeout=300)

    run.folder, run.site = folder / "empty", site
    return run


def _has_setuptools() -> bool:
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


def test_every_command_tells_its_use(nibble):
    listed = nibble("--help")
    assert listed.returncode == 0 and "scripts/" not in listed.stdout, listed.stderr
    for name in ("train", "compare", "cost", "audit", "export", "score", "prepare", "grid"):
        shown = nibble(name, "--help")
        assert shown.returncode == 0 and f"nibble {name}" in shown.stdout, (name, shown.stderr)
        assert "python scripts/" not in shown.stdout and "python train.py" not in shown.stdout


def test_a_plan_a_run_and_a_comparison_in_an_empty_folder(nibble):
    planned = nibble("train", *RUN, "quant=quartet2", "dry_run=true")
    assert planned.returncode == 0 and "quartet2" in planned.stdout, planned.stderr
    for recipe in ("bf16", "quartet2"):
        done = nibble("train", *RUN, f"quant={recipe}")
        assert done.returncode == 0, done.stderr
    assert nibble("compare", "runs/*").returncode == 0
    assert {path.name for path in nibble.folder.iterdir()} == {"runs", "token_shards"}
    assert '"nibble train ' in next(nibble.folder.glob("runs/*/run.json")).read_text()


def test_what_is_read_only_is_there_and_nothing_else_of_results(nibble):
    kept = {path.name for path in (nibble.site / "results").rglob("*") if path.is_file()} - {"__init__.cpython"}
    assert {"noise_floor.json", "throughput.json", "quartet2_runs.csv"} <= kept and "metrics.jsonl" not in kept
    assert "GPU-hours" in nibble("cost", "experiment=c4_grid", "only=30M/0.75B/bf16").stdout
