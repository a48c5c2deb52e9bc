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


def read_recipe(path: Path, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """The mapping in a file of configs/quant. Raises `error` for anything else, and for a defaults list: a recipe is
    one file, which scripts that know nothing of Hydra read as it stands."""
    values = read(path, error)
    if not isinstance(values, dict):
        raise error(f"{path}: got {values!r}, need a mapping such as that of quartet2.yaml")
    if "defaults" in values:
        raise error(f"{path}: a recipe doesn't inherit; replace defaults={values['defaults']} by that file's own lines")
    return values


def gist(mistake: yaml.YAMLError) -> str:
    """YAML's message, which names file and line, on one line."""
    return " ".join(str(mistake).split())
