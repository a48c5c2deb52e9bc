"""From command-line overrides to a typed TrainConfig, or to one clear error.

Hydra composes; this module asks it politely first. Overrides are parsed by Hydra's own grammar and checked against
the schema and the group folders before composition, because Hydra's messages neither name the nearest right key nor
fit on a line. Hydra's job machinery (working directories, outputs/, logging) is not used.
"""

import copy
import difflib
import itertools
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import configs
from base.files import expanded
from base.fork import parent_of
from base.words import suggestion
from base.yamlfile import gist
from launcher import cells as experiments
from launcher import fork, naming, unread
from launcher.schema import FREE_FORM, known_keys, register, text_keys
from quant import recipefile
from quant.names import GEMMS, unquantized
from training.config import RunSection, TrainConfig

ROOT = configs.FOLDER
CELL = "cell"  # of an experiment grid: written out before composition, so not a key of the schema
LAUNCHER = "launcher"  # taken off by launcher/cli.py
# What other trainers call some keys (the last part of them), for suggestions only.
OTHER_NAMES = {
    **dict.fromkeys(("learning_rate", "max_lr"), "lr"),
    **dict.fromkeys(("batch_size", "size"), "sequences"),
    **dict.fromkeys(("micro_batch_size", "gradient_accumulation_steps"), "micro"),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), "tokens"),
    **{"max_steps": "steps", "sequence_length": "seq_len", "max_grad_norm": "clip", "log_interval": "log.every"},
    **dict.fromkeys(("eval_interval", "val_interval"), "evaluate.every"),
    **dict.fromkeys(("save_every", "save_interval"), "checkpoint.every"),
    **dict.fromkeys(("output_dir", "out_dir"), "paths.runs"),
    **dict.fromkeys(("recipe", "precision"), "quant"),
}
# What other trainers have a key for and this one hasn't.
GPUS = "torchrun --nproc-per-node=4 train.py ... runs on four GPUs, and CUDA_VISIBLE_DEVICES chooses which"
GRID = "it is for python scripts/run_grid.py experiment=GRID, which runs many cells"
NO_KEY = {
    **dict.fromkeys(("stop_losers", "in_one", "trunks", "per_gpu", "only", "list"), GRID),
    "wandb": "write logger=wandb",
    "resume": "write resume=runs/NAME; or give the same command again",
    **dict.fromkeys(("device", "devices", "gpus", "num_gpus", "nproc", "world_size"), GPUS),
    "nodes": "write launcher=slurm slurm.nodes=",
    "partition": "write launcher=slurm slurm.partition=",
    "dropout": "no model has any",
}
NONE_MARK = "_none_"  # how `quant.dgrad=none` travels through Hydra, which would replace the mapping by the string


class ConfigError(ValueError):
    """A mistake on the command line or in a YAML file. The message is complete: print it without a traceback."""


@dataclass(frozen=True)
class Composed:
    """`config`: typed; `tree`: as composed, without the recipe; `choices`: {group: option} as chosen, and a cell's
    experiment and name."""

    config: TrainConfig
    tree: DictConfig
    choices: dict[str, str]

    @cached_property
    def yaml(self) -> str:
        """The composed text for config.yaml."""
        return OmegaConf.to_yaml(OmegaConf.merge(self.tree, {"quant": self.config.quant}))


def groups() -> dict[str, list[str]]:
    """{group: options}, from the folders of configs/."""
    folders = [folder for folder in sorted(ROOT.iterdir()) if folder.is_dir() and any(folder.glob("*.yaml"))]
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def compose(overrides: list[str], typed: bool = True) -> Composed:
    """Compose configs/train.yaml with `overrides`. Raises ConfigError, and nothing else, for a user's mistake.

    `typed`: by a person, who is told of a setting that would have no effect; tests lay one list over another.

    `experiment=<grid> cell=<name>` is written out first (launcher/cells.py); both names are then among the choices.
    """
    return Composer().compose(overrides, typed)


class Composer:
    """Composes many lists of overrides; what they have in common is read and parsed once.

    Files of configs/ are taken as they were when first read. Hydra composes the groups that are chosen; values follow
    one by one, in the order and by the rules of its grammar.
    """

    def __init__(self) -> None:
        self._parsed: dict[str, Override] = {}
        self._bases: dict[tuple[str, ...], tuple[bytes, dict[str, str]]] = {}
        self._recipes: dict[tuple[str, ...], tuple[dict[str, Any], dict[str, Any]]] = {}
        self._resolved: dict[tuple, dict[str, Any]] = {}
        self._groups = groups()
        self.numerics = naming.Numerics()
        register()

    def compose(self, overrides: list[str], typed: bool = True) -> Composed:
        """As the function `compose`."""
        try:
            return self.composed(experiments.resolve(overrides), typed)
        except experiments.CellError as error:
            raise ConfigError(str(error)) from error

    def composed(self, resolved: experiments.Resolved, typed: bool = True) -> Composed:
        """Of one run; a cell's is named after it where its overrides name none. ConfigError."""
        parsed = [self._parse(text) for text in resolved.overrides]
        for override in parsed:
            if override.is_sweep_override():
                raise ConfigError(f"{override.input_line}: several values; add -m to run them all")
        try:
            lines = tuple(choice_line(override) for override in parsed if self._is_choice(override))
            base, choices = self._base(lines)
            tree = pickle.loads(base)
            values = [override for override in parsed if not self._is_choice(override)]
            forked = [override.value() for override in values if override.key_or_group == "fork"]
            if forked and resolved.cell is None:  # a cell says everything itself, before its parent is there
                asked = {override.key_or_group: None for override in parsed if self._is_choice(override)}
                choices = {group: option for group, option in choices.items() if group in asked}
                tree, lines = self._fork(str(forked[-1]), lines, list(asked), values, tree)
            for override in values:
                if not is_of_recipe(override):
                    apply(override, tree)
            config = OmegaConf.to_object(tree)
            config.quant = self._recipe(lines, [override for override in values if is_of_recipe(override)], tree)
            # Beside others, a cell's own settings may go unread.
            given = parsed[len(parsed) - len(resolved.extra) :] if resolved.extra else parsed
            unread.check({key for override in given if typed for key in typed_keys(override)}, config)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(one_line(error)) from error
        except yaml.YAMLError as error:
            raise ConfigError(gist(error)) from error
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if resolved.cell is None:
            return Composed(config, tree, choices)
        choices = choices | {"experiment": resolved.experiment, "cell": resolved.cell}
        if config.run.name is None:
            config.run = RunSection(self._cell_name(resolved, config))
            tree.run.name = config.run.name
        return Composed(config, tree, choices)

    def _cell_name(self, resolved: experiments.Resolved, config: TrainConfig) -> str:
        if not resolved.extra:
            return experiments.folder_name(resolved.experiment, resolved.cell)
        try:
            plain = self.composed(resolved.plain).config
        except ConfigError:  # a grid that leaves something to the command, its text say
            plain = None
        try:
            return naming.cell_name(resolved, config, plain, self.numerics)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _fork(
        self, text: str, lines: tuple[str, ...], asked: list[str], values: list[Override], fresh: DictConfig
    ) -> tuple[DictConfig, tuple[str, ...]]:
        """(the parent's tree with the groups that are asked for, a key of its own for its recipe)."""
        runs = [override.value() for override in values if override.key_or_group == "paths.runs"]
        parent = parent_of(text, runs[-1] if runs else fresh.paths.runs)
        tree, recipe = fork.inherited(parent)
        own, file = self._recipes[lines]
        key = (f"fork={parent.folder}@{parent.step}", *lines)
        self._recipes[key] = fork.take_groups(asked, tree, recipe, fresh, own), file if "quant" in asked else {}
        fork.make_room([override.key_or_group for override in values if override.value() is not None], tree)
        return tree, key

    def _is_choice(self, override: Override) -> bool:
        return override.key_or_group in self._groups

    def _parse(self, text: str) -> Override:
        if text not in self._parsed:
            (override,) = parse([text])
            self._parsed[text] = check(override, self._groups)
        return self._parsed[text]

    def _base(self, lines: tuple[str, ...]) -> tuple[bytes, dict[str, str]]:
        """(tree, choices) of these group choices before any value is set, the tree pickled: so it is copied faster.
        Its recipe is left in `_recipes`."""
        if lines not in self._bases and (chosen := lone_recipe(lines)):
            # Of the many recipes of a grid each is its file, and what surrounds them is composed once.
            base, choices = self._base(tuple(line for line in lines if line != chosen))
            name = chosen.partition("=")[2].strip("\"'")
            file = recipe_file(chosen) or ROOT / "quant" / f"{name}.yaml"
            self._recipes[lines] = (
                OmegaConf.to_container(OmegaConf.load(file)),
                recipefile.read(file, ConfigError),
            )
            self._bases[lines] = base, choices | {"quant": str(recipe_file(chosen) or name)}
        if lines not in self._bases:
            own = next((path for path in map(recipe_file, lines) if path), None)
            with initialize_config_dir(str(ROOT), version_base="1.3"):
                ours = [line for line in lines if not recipe_file(line)]
                tree = hydra_compose("train", overrides=ours, return_hydra_config=True)
            chosen = tree.hydra.runtime.choices.items()
            choices = {group: option for group, option in chosen if not group.startswith("hydra") and option}
            choices |= {"quant": str(own)} if own else {}
            OmegaConf.set_struct(tree, False)
            del tree["hydra"]
            file = ROOT / "quant" / f"{choices['quant']}.yaml" if "quant" in choices else None
            values = recipefile.read(own or file, ConfigError) if own or file else {}
            chosen = OmegaConf.to_container(tree.quant)
            if own:  # in the place of the recipe; beside it are the phases
                chosen = values | {key: chosen[key] for key in ("phases",) if key in chosen}
            self._recipes[lines] = (chosen, values)
            tree.quant = {}  # large, and hardly ever another one: a plain mapping is copied faster
            self._bases[lines] = pickle.dumps(tree), choices
        return self._bases[lines]

    def _recipe(self, lines: tuple[str, ...], overrides: list[Override], tree: DictConfig) -> dict[str, Any]:
        """The `quant` group of these choices with `overrides` of its values, as a mapping of its own."""
        key = (lines, tuple(override.input_line for override in overrides))
        if key not in self._resolved or "${" in str(key):
            values, file = self._recipes[lines]
            tree.quant = values  # its interpolations may name any key
            for override in overrides:
                apply(override, tree)
            self._resolved[key] = without_none_gemms(OmegaConf.to_container(tree.quant, resolve=True), file)
            tree.quant = {}
        return copy.deepcopy(self._resolved[key])


def lone_recipe(lines: tuple[str, ...]) -> str | None:
    """The choice of a recipe, if of these lines no other writes into `quant`."""
    found = [line for line in lines if line.lstrip("+~").startswith(fork.OF_RECIPE)]
    return found[0] if len(found) == 1 and found[0].startswith("quant=") else None


def is_of_recipe(override: Override) -> bool:
    return override.key_or_group.startswith("quant.")


def apply(override: Override, tree: DictConfig) -> None:
    """Set, add or delete one value of `tree` in place, as Hydra does. Raises ConfigError, OmegaConf's errors."""
    key = override.key_or_group
    if override.is_delete():
        if OmegaConf.select(tree, key) is None:
            raise ConfigError(f"{override.input_line}: there is no {key} to delete")
        section, _, last = key.rpartition(".")
        del (OmegaConf.select(tree, section) if section else tree)[last]
    elif key in (f"quant.{gemm}" for gemm in GEMMS) and override.value() == "none":
        OmegaConf.update(tree, f"{key}.{NONE_MARK}", True, force_add=True)
    else:
        OmegaConf.update(tree, key, typed_value(override), merge=True, force_add=True)


def typed_keys(override: Override) -> Iterator[str]:
    """The dotted keys to which an override gives a value: those within a mapping, too."""

    def within(key: str, value: Any) -> Iterator[str]:
        if value is not None:
            yield key
        for part, inner in value.items() if isinstance(value, dict) else ():
            yield from within(f"{key}.{part}", inner)

    return within(override.key_or_group, override.value())


def typed_value(override: Override) -> Any:
    """The value that an override gives its key: of a text field the characters that were typed, whatever they look
    like (1.10, 1e3, 2024_11_05, true), within lists and mappings, too; else as Hydra's grammar reads them."""
    value = override.value()
    return as_typed(value, raw_value(override.input_line)) if override.key_or_group in text_keys() else value


def as_typed(value: Any, raw: str) -> Any:
    """`value` with the characters of `raw`, which it was read from, where it became a number or a truth value."""
    if isinstance(value, bool | int | float):
        return raw
    if not isinstance(value, list | dict) or len(parts := split(raw[1:-1])) != len(value):
        return value
    if isinstance(value, list):
        return [as_typed(one, part) for one, part in zip(value, parts, strict=True)]
    pairs = [map(str.strip, part.split(":", 1)) for part in parts]
    return {
        as_typed(key, name): as_typed(one, part) for (key, one), (name, part) in zip(value.items(), pairs, strict=True)
    }


def split(text: str) -> list[str]:
    """The parts between commas outside quotes and brackets, stripped."""
    parts, depth, quote, start = [], 0, "", 0
    for at, character in enumerate(text):
        if quote:
            quote = "" if character == quote and text[at - 1] != "\\" else quote
        elif character in "'\"":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def raw_value(line: str) -> str:
    """What follows the first `=` of an override."""
    return line.partition("=")[2].strip()


def stored(path: Path) -> TrainConfig:
    """The configuration that a run wrote down (its config.yaml). Raises ConfigError for one that is missing, damaged or
    of a version with other keys."""
    try:
        tree = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path))
        return OmegaConf.to_object(tree)
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read ({error.strerror}); is it in a run folder, such as runs/<name>?"
        ) from error
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error


def sweep(overrides: list[str]) -> list[list[str]]:
    """The cartesian product of `a=1,2 b=x,y` as lists of plain overrides, the first one varying slowest."""
    alternatives, known = [], groups()
    for override in [item if item.key_or_group == CELL else check(item, known) for item in parse(overrides)]:
        if override.is_sweep_override():
            key = override.get_key_element()
            alternatives.append([f"{key}={value}" for value in listed(override)])
        else:
            alternatives.append([override.input_line])
    return [list(job) for job in itertools.product(*alternatives)]


def parse(overrides: list[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except HydraException as error:
            hint = "write key=value" if "=" not in text else "quote it: 'key=\"value\"'"
            raise ConfigError(f"can't read {text!r} as an override; {hint} ({str(error).splitlines()[0]})") from error
    return parsed


def check(override: Override, known_groups: dict[str, list[str]]) -> Override:
    """Raise ConfigError for an unknown key or group choice, naming the nearest right one."""
    key = override.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise ConfigError(
            f"{override.input_line}: Hydra's own settings have no effect here; folders are paths.runs and run.name"
        )
    if key in known_groups and not override.is_delete():
        check_choices(override, known_groups[key])
    elif key not in known_keys() and not key.startswith(tuple(f"{name}." for name in FREE_FORM)):
        raise ConfigError(
            f"unknown key {key!r}{nearest_key(key, [*known_keys(), *known_groups, CELL, LAUNCHER])}; "
            "python train.py --help lists the groups"
        )
    return override


def check_choices(override: Override, options: list[str]) -> None:
    for value in listed(override) if override.is_sweep_override() else [typed_choice(override)]:
        if isinstance(value, list):
            example = next((one for one in value if one in options), options[0])
            raise ConfigError(
                f"{override.input_line}: a list; give one choice, as in {override.key_or_group}={example}. There are: "
                f"{', '.join(options)}"
            )
        word = "null" if value is None else str(value)
        if override.key_or_group == "quant" and is_file(word):
            if not Path(expanded(word, "quant")).is_file():
                raise ConfigError(f"quant={word}: no such file; a recipe's file, or one of: {', '.join(options)}")
        elif word not in options:
            near = suggestion(word, options)
            raise ConfigError(
                f"{override.key_or_group}={word}: no such choice{near or '.'} There are: {', '.join(options)}"
            )


def choice_line(override: Override) -> str:
    """The override of a group as Hydra takes it: an option that looks like a number in quotes."""
    value = typed_choice(override)
    is_kept = override.is_delete() or value == override.value()
    return override.input_line if is_kept else f'{override.get_key_element()}="{value}"'


def is_file(word: str) -> bool:
    """Whether a choice is a file of one's own, not the name of one of ours."""
    return word.endswith((".yaml", ".yml"))


def recipe_file(line: str) -> Path | None:
    """The file that a line quant=FILE names; None for another line."""
    key, _, value = line.partition("=")
    word = value.strip("'\"")
    return Path(expanded(word, "quant")).resolve() if key == "quant" and is_file(word) else None


def typed_choice(override: Override) -> Any:
    """A group's option with the characters that were typed: a file may be called 1.10."""
    value = override.value()
    return raw_value(override.input_line) if isinstance(value, bool | int | float) else value


def listed(override: Override) -> list[str]:
    """The values of a sweep, as they were typed. ConfigError for one that only a search could enumerate, such as
    interval(0,1)."""
    try:
        values = list(override.sweep_string_iterator())
    except HydraException:
        raise ConfigError(f"{override.input_line}: list the values, as in {override.key_or_group}=a,b,c") from None
    raw = raw_value(override.input_line)
    typed = split(raw)
    return typed if len(typed) == len(values) and not re.match(r"\w+\(", raw) else values  # range(0,3)


def nearest_key(key: str, known: list[str]) -> str:
    """A suggestion by the whole dotted key, or by its last part (`name` -> run.name), the most alike first."""
    last = key.rsplit(".", 1)[-1]
    if last in NO_KEY:
        return f": {NO_KEY[last]}"
    wanted = OTHER_NAMES.get(last, last)
    if wanted in known:
        return f"; did you mean {wanted}?"
    near = ending_in(wanted, key, known) or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        ends = {name.rsplit(".", 1)[-1] for name in known}
        close = difflib.get_close_matches(wanted, sorted(ends), n=1, cutoff=0.6)
        near = [name for end in close for name in ending_in(end, key, known)]
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def ending_in(end: str, key: str, known: list[str]) -> list[str]:
    """The known keys with this last part, the most like `key` first, a preset's own field last among equals."""
    names = [name for name in dict.fromkeys(known) if name.rsplit(".", 1)[-1] == end]
    return sorted(
        names, key=lambda name: (-difflib.SequenceMatcher(None, key, name).ratio(), name.startswith("model."))
    )


def without_none_gemms(quant: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Write GEMMs given as `none` out, in place; each operand's source is kept. `base`: the recipe file that `quant`
    started from."""
    for gemm in GEMMS:
        given = quant.get(gemm)
        if given == "none" and gemm in base:  # from another YAML file
            given = {**base[gemm], NONE_MARK: True}
        if isinstance(given, dict) and given.pop(NONE_MARK, False):
            quant[gemm] = unquantized(gemm, given)
    return quant


def one_line(error: Exception) -> str:
    """The gist of Hydra's and OmegaConf's errors: the innermost cause, with its key, on one line."""
    cause: BaseException = error
    while cause.__cause__ is not None and isinstance(cause.__cause__, HydraException | OmegaConfBaseException):
        cause = cause.__cause__
    message = str(cause)
    key = re.search(r"full_key: (\S+)", message)
    first = message.splitlines()[0].rstrip(".")
    if "is not a ListConfig, list or tuple" in first:
        first = "needs a list, such as [0.9,0.95]"
    if wrong := re.match(r"Value (.*) is not a valid bool", first):
        first = f"{wrong[1]} is neither true nor false; write one of them"
    if key and re.search(r"is not a subclass of \w+Section|Cannot merge DictConfig with ListConfig", first):
        inside = [name for name in known_keys() if name.startswith(f"{key.group(1)}.")]
        first = f"a section, not a value; set one of its keys: {', '.join(inside)}"
    return f"{key.group(1)}: {first}" if key else first
