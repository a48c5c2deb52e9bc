"""A recipe file of configs/quant as a plain mapping. No torch here: a command line reads one before torch is needed."""

from pathlib import Path
from typing import Any

import configs
from base import yamlfile
from quant.names import OPERANDS

FOLDER = configs.FOLDER / "quant"


def names() -> list[str]:
    """The recipes in configs/quant, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(path: Path, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """The mapping in a file of configs/quant. Raises `error` for anything else, and for

    a defaults list: a recipe is one file, which scripts that know nothing of Hydra read as it is;
    a name that isn't the file's: a run's hash and its plan tell recipes apart by it;
    a GEMM `none`, which keeps the sources of a file: this one has none to keep.
    """
    values = yamlfile.read(path, error)
    if not isinstance(values, dict):
        raise error(f"{path}: got {values!r}, need a mapping such as that of quartet2.yaml")
    if "defaults" in values:
        raise error(f"{path}: a recipe doesn't inherit; replace defaults={values['defaults']} by that file's own lines")
    if values.get("name") != path.stem:
        quoted = path.stem if yamlfile.is_text(path.stem) else f'"{path.stem}"'
        raise error(f"{path}: name={values.get('name')!r} must be the file's; write name: {quoted}")
    for gemm, (a, b) in OPERANDS.items():
        if values.get(gemm) == "none":
            raise error(
                f"{path}: {gemm}=none doesn't say what {b} is made from; write {gemm}: "
                f"{{{a}: {{grid: none, source: input}}, {b}: {{grid: none, source: input}}}}, or source: fprop to "
                "multiply what fprop used"
            )
    return values
