"""Which run folder holds a cell: the one whose stored numerics are the cell's, whatever it is called.

A folder's name says nothing: the grid's file, a recipe, a preset or the text may have changed since it was written.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import configs
from analysis import states
from analysis.runs import RunError, json_object
from analysis.states import State
from base.fingerprints import NotRememberedError
from base.words import some
from launcher import cells as experiments
from launcher.compose import Composed
from launcher.naming import Numerics, Text

RESULTS = configs.FOLDER.parent / "results"  # small copies of runs, by experiment
TEXT_KEYS = ("data.fingerprint", "data.tokenizer", "model.vocab_size")
KEY = re.compile(r"-([0-9a-f]{12})$")  # of a token folder's name
# Stored numerics that a configuration holds as they are: what differs in one of them is no candidate.
PLAIN = ("seed", "model.layers", "model.width", "batch.seq_len")
UNREAD = Text(0)
SHOWN = 3  # differing keys that a line lists


@dataclass(frozen=True)
class Found:
    """A cell's state and the folder that it is read from; None where the cell has none."""

    state: State
    folder: Path | None = None


@dataclass(frozen=True)
class Stored:
    """One run folder's description. `key`: of its text's token folder, where run.json says which that was."""

    folder: Path
    info: dict[str, Any]

    @property
    def numerics(self) -> dict[str, Any]:
        return self.info["numerics"]

    @property
    def key(self) -> str | None:
        found = KEY.search(Path(self.info.get("data_path") or "").name)
        return found[1] if found else None

    def is_of(self, experiment: str, cell: str) -> bool:
        return (self.info.get("experiment"), self.info.get("cell")) == (experiment, cell)


class Lookup:
    """The run folders beside each other in `runs`, and the kept results."""

    def __init__(self, runs: Path, numerics: Numerics) -> None:
        self.runs, self.numerics = runs, numerics
        self._texts: dict[str, Text | None] = {}
        # By identity of the configuration, kept alive here.
        self._wanted: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._text_keys: dict[int, tuple[Any, str]] = {}

    def state_of(self, experiment: str, cell: str, composed: Composed) -> Found:
        """A cell that is to run as `composed`. The folder of its own name counts first, then any with its numerics."""
        config = composed.config
        own = self.runs / config.run.name
        state = states.state_of(self.runs, own.name)
        stored = read(own)
        if state.status == states.DAMAGED or (stored is None and state.status == states.RUNNING):
            return Found(state, own)
        if stored is not None and (differing := self._differing(stored, config)) in ([], None):
            return Found(state if differing == [] else unknown(state, own), own)
        if elsewhere := self._elsewhere(experiment, cell, composed, own):
            return elsewhere
        if stored is not None:
            return Found(replace(state, status=states.OTHER, problem=other(own, stored, differing)), own)
        if state.status == states.MISSING:
            return Found(state)
        problem = f"{own} has no run.json to tell what ran there; type: {states.set_aside(own)}"
        return Found(replace(state, status=states.OTHER, problem=problem), own)

    def _elsewhere(self, experiment: str, cell: str, composed: Composed, own: Path) -> Found | None:
        """The best of the other folders that hold the cell's numerics, or may hold them: where reading a file
        would tell, or where run.json says that it is this cell."""
        found = []
        for stored in self._stored.get(plain_key(composed.config), ()):
            if stored.folder == own or (experiments.repeats(cell) and not stored.is_of(experiment, cell)):
                continue
            differing = self._differing(stored, composed.config)
            may_be = stored.is_of(experiment, cell) or self.text(composed.config) is UNREAD
            if differing == [] or (differing is None and may_be):
                state = states.state_of(stored.folder.parent, stored.folder.name)
                found.append(Found(state if differing == [] else unknown(state, stored.folder), stored.folder))
        order = (states.DONE, states.RUNNING, states.STOPPED, states.DIVERGED, states.DEAD)
        order += (states.DAMAGED, states.UNKNOWN)
        kept = [one for one in found if one.folder.parent == self.runs or one.state.status != states.STOPPED]
        return min(kept, key=lambda one: order.index(one.state.status), default=None)

    @cached_property
    def _stored(self) -> dict[tuple, list[Stored]]:
        """{plain_key: folders}, those of `runs` first."""
        found: dict[tuple, list[Stored]] = {}
        for file in [*sorted(self.runs.glob("*/run.json")), *sorted(RESULTS.glob("*/*/run.json"))]:
            stored = read(file.parent)
            if stored is not None:
                found.setdefault(tuple(stored.numerics.get(key) for key in PLAIN), []).append(stored)
        return found

    def _differing(self, stored: Stored, config: Any) -> list[str] | None:
        """What the stored numerics and the cell's don't share, as lines; None where all but the text is the same and
        the text can't be compared without reading it."""
        text = self.text(config)
        text = None if text is UNREAD else text
        if id(config) not in self._wanted:
            self._wanted[id(config)] = config, self.numerics.of(config, text or Text(config.data.vocab_size))
        wanted = self._wanted[id(config)][1]
        is_known = text is not None and text.fingerprint is not None
        keys = [key for key in sorted(wanted.keys() | stored.numerics.keys()) if is_known or key not in TEXT_KEYS]
        lines = []
        for key in keys:
            old, new = stored.numerics.get(key, "-"), wanted.get(key, "-")
            if old != new:
                lines.append(f"{key}: {short(old)} (stored) -> {short(new)} (now)")
        if lines or is_known:
            return lines
        if text is None or stored.key is None:
            return None
        return [] if text.key == stored.key else [f"text: {stored.key} (stored) -> {text.key} (now)"]

    def text(self, config: Any) -> Text | None:
        """What is known of the text; UNREAD where a file would have to be read for it, None where nothing is."""
        if id(config) not in self._text_keys:
            key = json.dumps([asdict(config.data), config.paths.data], sort_keys=True, default=str)
            self._text_keys[id(config)] = config, key
        key = self._text_keys[id(config)][1]
        if key not in self._texts:
            self._texts[key] = text_of(config)
        return self._texts[key]


def text_of(config: Any) -> Text | None:
    from data.prepare import token_folder  # here: a grid without any run needs no text

    try:
        if config.data.mix:
            return _text_of_mixture(config)
        folder = token_folder(config.data, config.paths.data)
    except NotRememberedError:
        return None if config.data.source == "hub" else UNREAD
    except (ValueError, OSError, RuntimeError):
        return None
    found = KEY.search(folder.name)
    key = found[1] if found else None
    try:
        manifest = json_object(folder / "manifest.json")
        tokenizer = manifest["tokenizer"]
        return Text(tokenizer["vocab_size"], manifest["fingerprint"], tokenizer["hash"], key)
    except (OSError, RunError, KeyError, TypeError):
        return Text(config.data.vocab_size, key=key)


def _text_of_mixture(config: Any) -> Text:
    from data.mixture import open_tokens

    tokens = open_tokens(config.data, "")
    return Text(tokens.vocab_size, tokens.fingerprint, tokens.tokenizer_hash)


def read(folder: Path) -> Stored | None:
    """None for a folder without a description that can be read."""
    try:
        info = json_object(folder / "run.json")
    except (OSError, RunError):
        return None
    return Stored(folder, info) if isinstance(info.get("numerics"), dict) else None


def plain_key(config: Any) -> tuple:
    return config.seed, config.model.layers, config.model.width, config.batch.seq_len


def unknown(state: State, folder: Path) -> State:
    problem = f"{folder} holds it if the text is the same; prepare the text (scripts/prepare_data.py) to know"
    return replace(state, status=states.UNKNOWN, problem=problem)


def other(folder: Path, stored: Stored, differing: list[str]) -> str:
    """What differs, and what to type."""
    away = folder.with_name(f"{folder.name}-{stored.info.get('hash', 'other')[:8]}")
    return (
        f"{folder} holds another run: {some(differing, SHOWN, '; ')}. To keep it under another name, type: "
        f"{states.move(folder, away)}; or take another folder: paths.runs={folder.parent}-2"
    )


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
