"""Command lines of the grid scripts: key=value words, some of them the script's own, the rest overrides of train.py."""

import difflib
import glob
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from launcher import cells as experiments


@dataclass(frozen=True)
class CellLine:
    """`cells`: chosen cells and their overrides; `extra`: overrides for all; `own`: the script's keys."""

    experiment: str
    cells: dict[str, list[str]]
    extra: list[str]
    own: dict[str, str]

    @property
    def runs(self) -> Path:
        """Folder of the runs, from paths.runs=..., or runs/."""
        return Path(dict(map(experiments.setting, self.extra)).get("paths.runs", "runs"))

    def is_true(self, key: str) -> bool:
        """An own key that is true or false; CellError for anything else, since a guess might start runs."""
        if self.own[key].lower() not in ("true", "false"):
            raise experiments.CellError(f"{key}={self.own[key]}: write {key}=true or {key}=false")
        return self.own[key].lower() == "true"

    def run_name(self, cell: str) -> str:
        return experiments.run_name(self.experiment, cell, self.extra)


def read(words: list[str], own: dict[str, str]) -> CellLine:
    """`own`: {key: default}; `experiment` and `only` (a glob over cell names, commas between several) always exist;
    `cell` is one name.

    CellError for a missing experiment, an unknown one, a pattern that matches no cell, run.name, overrides that make
    two cells one, or a misspelt own key.
    """
    own = {"only": "*", **own}
    extra, experiment, cell = [], None, None
    for word in words:
        key, equals, value = word.partition("=")
        near = difflib.get_close_matches(key, own, n=1, cutoff=0.8)
        if not equals:
            raise experiments.CellError(f"can't read {word!r}; write key=value")
        if key == "experiment":
            experiment = value
        elif key == "cell":
            cell = value
        elif key in own:
            own[key] = value
        elif experiments.setting(word)[0] == "run.name":
            raise experiments.CellError(f"{word}: all cells would be one run; each is named after itself")
        elif near and "." not in key:
            raise experiments.CellError(f"unknown key {key!r}; did you mean {near[0]}?")
        else:
            extra.append(word)
    if experiment is None:
        raise experiments.CellError(f"experiment=<grid> is missing; grids: {', '.join(experiments.names())}")
    cells = _chosen(experiments.expand(experiments.load(experiment)), own["only"], cell)
    _check_told_apart(cells, extra)
    return CellLine(experiment, cells, extra, own)


def _chosen(cells: dict[str, list[str]], only: str, cell: str | None) -> dict[str, list[str]]:
    if cell is not None and only != "*":
        raise experiments.CellError(f"only={only} cell={cell}: give one of only= and cell=")
    key, patterns = ("only", only.split(",")) if cell is None else ("cell", [glob.escape(cell)])
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in cells):
            asked = f"{key}={pattern if cell is None else cell}"
            raise experiments.CellError(f"{asked} matches none of the {len(cells)} cells, such as {next(iter(cells))}")
    return {name: o for name, o in cells.items() if any(fnmatch(name, pattern) for pattern in patterns)}


def _check_told_apart(cells: dict[str, list[str]], extra: list[str]) -> None:
    """seed=5 over cells of several seeds would train one run once for each of them."""
    found: dict[tuple, str] = {}
    for cell, overrides in cells.items():
        first = found.setdefault(_settings([*overrides, *extra]), cell)
        if _settings(cells[first]) != _settings(overrides):
            raise experiments.CellError(
                f"{' '.join(extra)}: cells {first} and {cell} would be the same run; leave out what an axis sets, or "
                "choose cells with only="
            )


def _settings(overrides: list[str]) -> tuple:
    """What a list of overrides comes to: the last word on each key wins."""
    return tuple(sorted(dict(map(experiments.setting, overrides)).items()))
