"""A run of about a second on a CPU, and its overrides. Token data is prepared once a session."""

from pathlib import Path

import pytest
import torch

from launcher.cells import layered

TINY = [
    "model=llama_tiny",
    "model.layers=1",
    "model.width=128",
    "model.heads=2",
    "model.hidden=128",
    "quant=sr",
    "data=text",
    "data.vocab_size=280",
    "data.val_fraction=0.2",
    "data.workers=1",
    "batch.seq_len=128",
    "batch.sequences=2",
    "batch.micro=1",
    "log.every=1",
    "evaluate.every=null",
    "evaluate.final_tokens=256",
    "evaluate.slots=false",
]


@pytest.fixture(scope="session")
def tokens(tmp_path_factory, text_file) -> Path:
    """The prepared token folder. Made in a process of its own: this one must not start threads before it forks."""
    from forked import Ranks

    root = tmp_path_factory.mktemp("prepared")
    places = [
        f"data.files={text_file}",
        f"paths.data={root}",
        f"paths.runs={root / 'runs'}",
        "run.name=first",
        "steps=1",
    ]
    assert Ranks([*TINY, *places], root / "log").wait() == [0], (root / "log").read_text()
    return root


OPTIONS = ["steps=12", "checkpoint.every=3", "checkpoint.keep_last=3"]


@pytest.fixture(scope="session")
def straight(text_file, tokens, tmp_path_factory) -> Path:
    """The run folder of an undisturbed run of 12 steps on one process."""
    from forked import Ranks

    root = tmp_path_factory.mktemp("straight")
    places = [f"data.files={text_file}", f"paths.data={tokens}", f"paths.runs={root}", "run.name=straight"]
    assert Ranks([*TINY, *places, *OPTIONS], root / "log").wait() == [0], (root / "log").read_text()
    return root / "straight"


@pytest.fixture
def overrides(text_file, tokens, tmp_path):
    """overrides(name, *more): the tiny run of 12 steps in tmp_path/runs/name."""
    torch.set_num_threads(1)

    def build(name: str, *more: str, runs: Path = tmp_path / "runs") -> list[str]:
        places = [f"data.files={text_file}", f"paths.data={tokens}", f"paths.runs={runs}", f"run.name={name}"]
        return layered(TINY, OPTIONS, places, more)

    return build
