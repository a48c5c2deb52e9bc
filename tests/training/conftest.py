"""A run small enough to train within a test: one block of width 128 on a few kilobytes of made-up text."""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from base.runfolder import read_metrics
from data.prepare import prepare
from data.spec import DataSpec
from launcher.compose import Composer
from training.probes import PROBES
from training.probes.base import Probe
from training.start.launch import Request, launch

SMALL = [
    "model=llama_tiny",
    "model.layers=1",
    "model.width=128",
    "model.heads=2",
    "model.hidden=128",
    "data=text",
    "data.vocab_size=300",
    "data.val_fraction=0.2",
    "data.workers=1",
    "batch.seq_len=64",
    "batch.sequences=8",
    "batch.micro=4",
    "steps=10",
    "optim.lr=1e-2",
    "log.every=4",
    "evaluate.every=5",
    "checkpoint.every=5",
    "evaluate.slots=false",
]


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="session")
def composer() -> Composer:
    """Reads the files of configs/ once for all runs."""
    return Composer()


@pytest.fixture
def asides() -> list[str]:
    """Overrides that every run of this test gets."""
    return []


@pytest.fixture
def usual(tmp_path, text_file, token_folder) -> list[str]:
    """Overrides of every run that is no fork."""
    return [*SMALL, f"data.files={text_file}", f"paths.data={token_folder}", f"paths.runs={tmp_path / 'runs'}"]


@pytest.fixture
def run(tmp_path, usual, asides, composer):
    """run(*overrides) trains in this process and returns (exit code, run folder). `bare`: a fork, which has all but
    its name from its parent."""

    def start(*overrides: str, name: str | None = "test", bare: bool = False) -> tuple[int, Path]:
        named = [] if name is None else [f"run.name={name}"]
        composed = composer.compose([*([] if bare else usual), *named, *overrides, *asides], typed=False)
        code = launch(Request(composed.config, composed.yaml, composed.choices, "test"))
        folders = sorted((tmp_path / "runs").iterdir()) if (tmp_path / "runs").exists() else []
        return code, tmp_path / "runs" / name if name else folders[-1] if folders else None

    return start


@pytest.fixture
def mixed_folders(tmp_path, text_file) -> list[str]:
    """Two token folders of one tokenizer, of different text."""
    folders = []
    for i, rows in enumerate((slice(0, 40), slice(30, 60))):
        path = tmp_path / f"{i}.jsonl"
        path.write_text("\n".join(text_file.read_text().splitlines()[rows]))
        words = {"tokenizer": f"{folders[0]}/tokenizer.json"} if folders else {}
        spec = DataSpec(files=str(path), vocab_size=280, val_fraction=0.2, workers=1, name=f"t{i}", **words)
        folders.append(str(prepare(spec, tmp_path / "folders")))
    return folders


@pytest.fixture
def mix(mixed_folders) -> list[str]:
    """Overrides of a run on both."""
    return ["data.files=null", f"data.mix=[{','.join(mixed_folders)}]", "data.weights=[0.75,0.25]"]


@pytest.fixture
def watch(monkeypatch, asides):
    """watch(see) is a context in which runs have a probe that calls see(step) after every step."""

    @contextmanager
    def watching(see: Callable[[int], None]) -> Iterator[None]:
        class Watcher(Probe):
            def due(self, step: int) -> bool:
                see(step)
                return False

        with monkeypatch.context() as patch:
            patch.setitem(PROBES, "watcher", Watcher)
            asides.append("probes.watcher={}")
            try:
                yield
            finally:
                asides.remove("probes.watcher={}")

    return watching


@pytest.fixture
def stop_after(watch):
    """stop_after(step) is a context in which runs stop after that step, by the signal that Ctrl-C sends."""

    def stopping_after(step: int) -> AbstractContextManager[None]:
        def see(at: int) -> None:
            if at == step:
                signal.raise_signal(signal.SIGINT)

        return watch(see)

    return stopping_after


@pytest.fixture
def rows():
    """rows(folder, kind): what metrics.jsonl has of that kind, in order."""

    def read(folder: Path, kind: str) -> list[dict]:
        return [row for row in read_metrics(folder) if row["kind"] == kind]

    return read
