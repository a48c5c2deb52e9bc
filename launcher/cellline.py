"""Command lines of the grid scripts: key=value words, some of them the script's own, the rest overrides of train.py."""

import difflib
import glob
import json
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from analysis.states import UNKNOWN, State
from launcher import cells as experiments
from launcher.compose import Composed, Composer, ConfigError
from launcher.lookup import Found, Lookup


@dataclass(frozen=True)
class CellLine:
    """`cells`: the chosen ones as they are to run; `extra`: overrides for all; `own`: the script's keys; `composer`:
    which knows what the cells have in common; `adopted`: run folders under other names in which a cell goes on."""

    experiment: str
    cells: dict[str, Composed]
    extra: list[str]
    own: dict[str, str]
    composer: Composer
    adopted: dict[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        """Folder of the runs."""
        return Path(next(iter(self.cells.values())).config.paths.runs)

    def look(self) -> dict[str, Found]:
        """{cell: its state and folder}; those begun under another name are adopted."""
        lookup = Lookup(self.runs, self.composer.numerics)
        if not self.experiment:
            return {cell: Found(State(UNKNOWN)) for cell in self.cells}
        looked = {cell: lookup.state_of(self.experiment, cell, composed) for cell, composed in self.cells.items()}
        for cell, found in looked.items():
            if found.folder is not None and found.folder.parent == self.runs and not found.state.problem:
                self.adopted[cell] = found.folder.name
        return looked

    def is_true(self, key: str) -> bool:
        """An own key that is true or false; CellError for anything else, since a guess might start runs."""
        if self.own[key].lower() not in ("true", "false"):
            raise experiments.CellError(f"{key}={self.own[key]}: write {key}=true or {key}=false")
        return self.own[key].lower() == "true"

    def run_name(self, cell: str) -> str:
        return self.adopted.get(cell, self.cells[cell].config.run.name)


def read(words: list[str], own: dict[str, str], single: bool = False) -> CellLine:
    """`own`: {key: default}; `experiment` and `only` (a glob over cell names, commas between several) always exist;
    `cell` is one name. With `single`, words without an experiment are one run of that command, whose state is not
    looked for.

    CellError for a missing experiment, an unknown one, a pattern that matches no cell, run.name, overrides that make
    two cells one, a key given twice, or a misspelt own key; ConfigError where a cell doesn't compose.
    """
    own = {"only": "*", **own}
    experiments.refuse_twice(words)
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
    if experiment is None and single:
        composer = Composer()
        composed = composer.compose(extra)
        config = composed.config
        name = f"{config.model.name}/{composed.choices['quant']}/s{config.seed}"
        return CellLine("", {name: composed}, extra, own, composer)
    if experiment is None:
        raise experiments.CellError(f"experiment=<grid> is missing; grids: {', '.join(experiments.names())}")
    chosen = _chosen(experiments.expand(experiments.load(experiment)), own["only"], cell)
    composer = Composer()
    cells = {name: _composed(composer, experiment, name, overrides, extra) for name, overrides in chosen.items()}
    _check_told_apart(cells, chosen, extra)
    return CellLine(experiment, cells, extra, own, composer)


def _composed(composer: Composer, experiment: str, cell: str, overrides: list[str], extra: list[str]) -> Composed:
    try:
        return composer.composed(experiments.Resolved([*overrides, *extra], experiment, cell, tuple(extra)))
    except ConfigError as error:
        raise ConfigError(f"cell {cell}: {error}") from error


def _chosen(cells: dict[str, list[str]], only: str, cell: str | None) -> dict[str, list[str]]:
    if cell is not None and only != "*":
        raise experiments.CellError(f"only={only} cell={cell}: give one of only= and cell=")
    key, patterns = ("only", only.split(",")) if cell is None else ("cell", [glob.escape(cell)])
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in cells):
            asked = f"{key}={pattern if cell is None else cell}"
            raise experiments.CellError(f"{asked} matches none of the {len(cells)} cells, such as {next(iter(cells))}")
    return {name: o for name, o in cells.items() if any(fnmatch(name, pattern) for pattern in patterns)}


def _check_told_apart(cells: dict[str, Composed], chosen: dict[str, list[str]], extra: list[str]) -> None:
    """seed=5 over cells of several seeds would train one run once for each of them."""
    found: dict[str, str] = {}
    for cell, composed in cells.items():
        values = asdict(composed.config) | {"run": None}
        first = found.setdefault(json.dumps(values, sort_keys=True, default=str), cell)
        if _settings(chosen[first]) != _settings(chosen[cell]):
            raise experiments.CellError(
                f"{' '.join(extra)}: cells {first} and {cell} would be the same run; leave out what an axis sets, or "
                "choose cells with only="
            )


def _settings(overrides: list[str]) -> tuple:
    """What a list of overrides comes to: the last word on each key wins."""
    return tuple(sorted(dict(map(experiments.setting, overrides)).items()))
