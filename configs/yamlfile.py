"""YAML files read so that a mistake in them is one line."""

from pathlib import Path
from typing import Any

import yaml

from quant.recipe import OPERANDS


def read(path: Path, error: type[ValueError] = ValueError) -> Any:
    """The file's content. Raises `error`, which names file and line, for a mistake in YAML."""
    try:
        with open(path) as file:  # not its text: YAML's message then names the file
            return yaml.safe_load(file)
    except yaml.YAMLError as mistake:
        raise error(gist(mistake)) from mistake


def read_recipe(path: Path, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """The mapping in a file of configs/quant. Raises `error` for anything else, and for

    a defaults list: a recipe is one file, which scripts that know nothing of Hydra read as it stands;
    a name that isn't the file's: a run's hash and its plan tell recipes apart by it;
    a GEMM `none`, which keeps the sources of a file: this one has none to keep.
    """
    values = read(path, error)
    if not isinstance(values, dict):
        raise error(f"{path}: got {values!r}, need a mapping such as that of quartet2.yaml")
    if "defaults" in values:
        raise error(f"{path}: a recipe doesn't inherit; replace defaults={values['defaults']} by that file's own lines")
    if values.get("name") != path.stem:
        raise error(f"{path}: name={values.get('name')!r} must be the file's; write name: {path.stem}")
    for gemm, (a, b) in OPERANDS.items():
        if values.get(gemm) == "none":
            raise error(
                f"{path}: {gemm}=none doesn't say what {b} is made from; write {gemm}: "
                f"{{{a}: {{grid: none, source: input}}, {b}: {{grid: none, source: input}}}}, or source: fprop to "
                "multiply what fprop used"
            )
    return values


def gist(mistake: yaml.YAMLError) -> str:
    """YAML's message, which names file and line, on one line."""
    return " ".join(str(mistake).split())
