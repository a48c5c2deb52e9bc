"""Text that the end-to-end tests train on, and stand-ins for programs."""

import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Done

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """60 documents over a small vocabulary, so that there is something to learn within ten steps."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "su") for b in ("na", "re", "ti", "vo")]
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    with open(path, "w") as file:
        for i in range(60):
            text = " ".join(rng.choice(words) for _ in range(200))
            file.write(json.dumps({"id": str(i), "source": "made up", "text": text}) + "\n")
    return path


@pytest.fixture
def on_path(tmp_path, monkeypatch) -> Callable[..., None]:
    """on_path(squeue="echo 17"): shell scripts that are found before the programs of these names."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def put(**bodies: str) -> None:
        for name, body in bodies.items():
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)

    return put


@pytest.fixture
def main_of(monkeypatch, capsys) -> Callable[[str], Callable[..., Done]]:
    """main_of("score.py")(word, ...) calls that script in this process: a process of its own costs a second or more of
    imports. What it raises but an exit, a person would see as a traceback: so does the test."""

    def read(name: str) -> Callable[..., Done]:
        spec = importlib.util.spec_from_file_location(f"{name.removesuffix('.py')}_script", SCRIPTS / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        def call(*words: object) -> Done:
            capsys.readouterr()
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [name, *map(str, words)])
                try:
                    code = module.main()
                except SystemExit as end:  # argparse
                    code = end.code
            return Done(code, *capsys.readouterr())

        return call

    return read
