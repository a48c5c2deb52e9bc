"""Experiment grids: one YAML names every cell of an experiment, and a cell is nothing but a list of overrides.

    python train.py experiment=c4_grid cell=30M/0.75B/quartet2

A grid is a file of configs/experiment with the keys
    base    overrides that every cell starts from
    axes    ordered; {axis: {value: [overrides]}}, or {axis: "override with {tokens} or {integer}"} where the number is
            read from the value itself: tokens of 0.75B is 750000000, integer of s3 is 3
    cells   blocks; the product of a block's values (a value or a list per axis) gives cells, named by joining the axes
No torch and no Hydra here: cost.py and run_grid.py read grids too.
"""

import difflib
import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configs
from base import yamlfile
from base.words import suggestion

FOLDER = configs.FOLDER / "experiment"
KEYS = ("base", "axes", "cells")
UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}
# Overrides that don't change what is computed (training/records/identity.py): they leave a cell's run name as it is.
HARMLESS = (
    "paths.",
    "run.",
    "log.",
    "logger",
    "evaluate.",
    "probes.",
    "checkpoint.",
    "data.files=",
    "data.val_files=",
    "data.path=",
    "data.workers=",
    "data.verify=",
    "parallel=",
    "backend=",
    "compile=",
    "cuda_graphs=",
    "watchdog_s=",
    "deterministic=",
    "dry_run=",
    "recompute=",
    "nonfinite=",
)


class CellError(ValueError):
    """A wrong grid file, grid or cell name; the message is complete."""


@dataclass(frozen=True)
class Resolved:
    """Command-line overrides with `experiment=<grid> cell=<name>` written out; names are None without a grid."""

    overrides: list[str]
    experiment: str | None = None
    cell: str | None = None


def names() -> list[str]:
    """The grids among the experiments, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if _is_grid(path))


def load(name: str) -> dict[str, Any]:
    """The grid `name`. CellError, naming the nearest one, when there is none, or for a malformed file."""
    if name not in names():
        near = suggestion(name, names(), f"grids: {', '.join(names())}")
        raise CellError(f"experiment={name} is not a grid{near}")
    experiment = yamlfile.read(FOLDER / f"{name}.yaml", CellError)
    if set(experiment) != set(KEYS):
        raise CellError(f"{name}.yaml: needs exactly the keys {', '.join(KEYS)}; got {', '.join(map(str, experiment))}")
    _check_shape(experiment, f"{name}.yaml")
    return experiment


def _check_shape(experiment: dict[str, Any], file: str) -> None:
    """CellError unless base, axes and cells are what this module's docstring says."""
    base, axes, cells = (experiment[key] for key in KEYS)
    if not _are(str, base):
        raise CellError(f"{file}: base: needs a list of overrides, such as [model=llama_30m, steps=100]")
    if not axes or not isinstance(axes, dict):
        raise CellError(f"{file}: axes: needs axes by name, such as recipe: {{bf16: [quant=bf16]}}")
    for axis, rule in axes.items():
        if not isinstance(rule, str):
            _check_values(rule, f"{file}: axis {axis}")
    if not cells or not _are(dict, cells):
        raise CellError(f"{file}: cells: needs a list of blocks, such as - {{recipe: bf16, seed: s0}}")


def _check_values(rule: Any, where: str) -> None:
    if not isinstance(rule, dict):
        raise CellError(f"{where}: needs values by name, or one override as text")
    for value, overrides in rule.items():
        if not isinstance(value, str):
            raise CellError(f"{where}: YAML reads {value!r} as no text; put the value's name in quotes")
        if not _are(str, overrides):
            raise CellError(f"{where}, {value}: needs a list of overrides, such as [quant=bf16]")


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def expand(experiment: dict[str, Any]) -> dict[str, list[str]]:
    """{cell name: overrides}, in the order of the file. CellError for a value that its axis doesn't know, for keys of
    another shape, and for cells that cost.py and run_grid.py would look for in the wrong folder."""
    axes: dict[str, Any] = experiment["axes"]
    cells: dict[str, list[str]] = {}
    for block in experiment["cells"]:
        if set(block) != set(axes):
            raise CellError(f"cells: a block needs each of {', '.join(axes)}; got {', '.join(block)}")
        for values in itertools.product(*(_as_list(block[axis]) for axis in axes)):
            parts = [_overrides(axis, rule, value) for (axis, rule), value in zip(axes.items(), values, strict=True)]
            cells["/".join(values)] = [*experiment["base"], *itertools.chain(*parts)]
    _check_places(cells)
    return cells


def _check_places(cells: dict[str, list[str]]) -> None:
    """A cell's run is looked for by its name, in the folder that the command names: the file can't move it."""
    folders: dict[str, str] = {}
    for cell, overrides in cells.items():
        for item in overrides:
            if setting(item)[0] in ("run.name", "paths.runs"):
                raise CellError(f"cell {cell} sets {item}: a cell names its run, and paths.runs=... is for the command")
        if (first := folders.setdefault(run_name("", cell), cell)) != cell:
            raise CellError(f"cells {first} and {cell} would be one run folder; change a value's name")


def setting(override: str) -> tuple[str, str]:
    """(key, value) of an override; ++key=value sets the same key."""
    key, _, value = override.lstrip("+").partition("=")
    return key, value


def resolve(overrides: list[str]) -> Resolved:
    """Write `experiment=<grid> cell=<name>` out; other overrides follow and win. Without a grid nothing changes.

    The run is named after the cell, so that cost.py and run_grid.py find it; overrides that change the numerics add
    eight digits of their hash to the name. CellError for a grid without a cell, a cell without a grid, an unknown cell.
    """
    given = dict(item.split("=", 1) for item in overrides if item.startswith(("experiment=", "cell=")))
    experiment, cell = given.get("experiment"), given.get("cell")
    rest = [item for item in overrides if not item.startswith(("experiment=", "cell="))]
    if experiment not in names():
        if cell is not None:
            near = suggestion(experiment or "", names(), f"grids: {', '.join(names())}")
            raise CellError(f"cell={cell} needs experiment=<grid>{near}")
        return Resolved(overrides)
    cells = expand(load(experiment))
    if cell not in cells:
        near = difflib.get_close_matches(cell or "", cells, n=3, cutoff=0.5) or list(cells)[:3]
        asked = f"has no cell {cell}" if cell else "is a grid and needs a cell"
        raise CellError(
            f"experiment={experiment} {asked}; for example cell={' or cell='.join(near)} ({len(cells)} cells)"
        )
    named = [f"run.name={run_name(experiment, cell, rest)}"]
    return Resolved([*named, *cells[cell], *rest], experiment, cell)


def run_name(experiment: str, cell: str, extra: list[str] = ()) -> str:
    """The folder under runs/: c4_grid-30M-0.75B-quartet2, plus -<hash8> when `extra` overrides change the numerics."""
    changing = sorted(word for item in extra if not (word := item.lstrip("+")).startswith(HARMLESS))
    digest = hashlib.sha256("\n".join(changing).encode()).hexdigest()[:8]
    return f"{experiment}-{cell.replace('/', '-')}" + (f"-{digest}" if changing else "")


def _overrides(axis: str, rule: Any, value: str) -> list[str]:
    if isinstance(rule, str):
        try:
            return [rule.format_map(_Number(value))]
        except ValueError as error:
            raise CellError(f"axis {axis}: {error}") from None
    if value not in rule:
        raise CellError(f"axis {axis} has no value {value!r}{suggestion(value, rule)}")
    return list(rule[value])


class _Number(dict):
    """Reads {tokens} or {integer} from a cell's value when the template asks for it."""

    def __init__(self, value: str):
        super().__init__()
        self.value = value

    def __missing__(self, key: str) -> int:
        match = re.fullmatch(r"([\d.]+)([KMB])" if key == "tokens" else r"\D*(\d+)", self.value)
        if match is None or key not in ("tokens", "integer"):
            raise ValueError(f"can't read {{{key}}} from {self.value!r}; write 0.75B for tokens, s3 for an integer")
        return round(float(match[1]) * UNITS[match[2]]) if key == "tokens" else int(match[1])


def _as_list(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _is_grid(path: Path) -> bool:
    content = yamlfile.read(path, CellError)
    return isinstance(content, dict) and "cells" in content
