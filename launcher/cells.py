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


class CellError(ValueError):
    """A wrong grid file, grid or cell name; the message is complete."""


@dataclass(frozen=True)
class Resolved:
    """Command-line overrides with `experiment=<grid> cell=<name>` written out; names are None without a grid. `extra`:
    those of the overrides that the grid's file doesn't give the cell."""

    overrides: list[str]
    experiment: str | None = None
    cell: str | None = None
    extra: tuple[str, ...] = ()

    @property
    def plain(self) -> "Resolved":
        """The cell as the grid's file has it."""
        return Resolved(self.overrides[: len(self.overrides) - len(self.extra)], self.experiment, self.cell)


def names() -> list[str]:
    """The grids among the experiments, sorted; a file that can't be read is none, until it is asked for."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if _is_grid(path))


def load(name: str) -> dict[str, Any]:
    """The grid `name`. CellError, naming the nearest one, when there is none, or for a malformed file."""
    content = _content(name)
    if not isinstance(content, dict) or "cells" not in content:
        near = suggestion(name, names(), f"grids: {', '.join(names())}")
        raise CellError(f"experiment={name} is not a grid{near}")
    if set(content) != set(KEYS):
        raise CellError(f"{name}.yaml: needs exactly the keys {', '.join(KEYS)}; got {', '.join(map(str, content))}")
    _check_shape(content, f"{name}.yaml")
    return content


def _check_shape(content: dict[str, Any], file: str) -> None:
    """CellError unless base, axes and cells are what this module's docstring says."""
    base, axes, cells = (content[key] for key in KEYS)
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
        listed = (block[axis] if isinstance(block[axis], list) else [block[axis]] for axis in axes)
        for values in itertools.product(*(map(str, values) for values in listed)):
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
        if (first := folders.setdefault(folder_name("", cell), cell)) != cell:
            raise CellError(f"cells {first} and {cell} would be one run folder; change a value's name")


def setting(override: str) -> tuple[str, str]:
    """(key, value) of an override; ++key=value sets the same key."""
    key, _, value = override.lstrip("+").partition("=")
    return key, value


def refuse_twice(words: list[str]) -> None:
    """CellError for a key that is given two values: which one was meant?"""
    found: dict[str, str] = {}
    for word in words:
        key, value = setting(word)
        if (first := found.setdefault(key, value)) != value:
            raise CellError(f"{key}={first} and {key}={value}: one would be without effect; give one of them")


def layered(*layers: list[str]) -> list[str]:
    """One command line of several lists of overrides: of a key in two of them the later value stays."""
    found: dict[str, str] = {}
    for word in itertools.chain(*layers):
        found.pop(setting(word)[0], None)
        found[setting(word)[0]] = word
    return list(found.values())


def resolve(overrides: list[str]) -> Resolved:
    """Write `experiment=<grid> cell=<name>` out; other overrides follow and win. Without a grid nothing changes.

    CellError for a grid without a cell, a cell without a grid, an unknown cell.
    """
    given = dict(item.split("=", 1) for item in overrides if item.startswith(("experiment=", "cell=")))
    experiment, cell = given.get("experiment"), given.get("cell")
    rest = [item for item in overrides if not item.startswith(("experiment=", "cell="))]
    content = _content(experiment) if experiment else None
    if not isinstance(content, dict) or "cells" not in content:
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
    return Resolved([*cells[cell], *rest], experiment, cell, tuple(rest))


def folder_name(experiment: str, cell: str) -> str:
    """The folder under runs/ of a cell as the file has it: c4_grid-30M-0.75B-quartet2."""
    return f"{experiment}-{cell.replace('/', '-')}"


def repeats(cell: str) -> bool:
    """Whether the cell is another run of numerics that exist: `rerun` is in its name. Only its own run counts."""
    return "rerun" in cell


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


def _content(name: str) -> Any:
    """What configs/experiment/<name>.yaml holds; None where there is no such file. CellError for a mistake in YAML."""
    path = FOLDER / f"{name}.yaml"
    return yamlfile.read(path, CellError) if re.fullmatch(r"[\w.+-]+", name) and path.is_file() else None


def _is_grid(path: Path) -> bool:
    try:
        content = yamlfile.read(path, CellError)
    except CellError:
        return False
    return isinstance(content, dict) and "cells" in content
