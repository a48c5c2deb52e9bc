"""Text that the end-to-end tests train on."""

import json
import random
from pathlib import Path

import pytest


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
