"""YAML files read so that a mistake in them is one line."""

from pathlib import Path
from typing import Any

import yaml


def read(path: Path, error: type[ValueError] = ValueError) -> Any:
    """The file's content. Raises `error`, which names file and line, for a mistake in YAML."""
    try:
        with open(path) as file:  # not its text: YAML's message then names the file
            return yaml.safe_load(file)
    except yaml.YAMLError as mistake:
        raise error(gist(mistake)) from mistake


def gist(mistake: yaml.YAMLError) -> str:
    """YAML's message, which names file and line, on one line."""
    return " ".join(str(mistake).split())


def is_text(word: str) -> bool:
    """Whether YAML reads a word as text, not as a number, a date or a boolean."""
    return yaml.safe_load(word) == word
