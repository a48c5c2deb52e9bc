"""From command-line overrides to a typed TrainConfig, or to one clear error.

Hydra composes; this module asks it politely first. Overrides are parsed by Hydra's own grammar and checked against
the schema and the group folders before composition, because Hydra's messages neither name the nearest right key nor
fit on a line. Hydra's job machinery (working directories, outputs/, logging) is not used.
"""

import difflib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import configs
from base.words import suggestion
from base.yamlfile import gist
from launcher import cells as experiments
from launcher.schema import FREE_FORM, known_keys, register
from quant import recipefile
from quant.names import OPERANDS
from training.config import TrainConfig

ROOT = configs.FOLDER
CELL = "cell"  # of an experiment grid: written out before composition, so not a key of the schema
LAUNCHER = "launcher"  # taken off by launcher/cli.py
# What other trainers call some keys (the last part of them), for suggestions only.
OTHER_NAMES = {
    "learning_rate": "lr",
    "max_lr": "lr",
    "batch_size": "sequences",
    "size": "sequences",
    "micro_batch_size": "micro",
    "gradient_accumulation_steps": "micro",
    "max_steps": "steps",
    "epochs": "tokens",
    "num_epochs": "tokens",
    "num_train_epochs": "tokens",
    "sequence_length": "seq_len",
    "max_grad_norm": "clip",
    "eval_interval": "evaluate.every",
    "val_interval": "evaluate.every",
    "save_every": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "log_interval": "log.every",
    "output_dir": "paths.runs",
    "out_dir": "paths.runs",
    "recipe": "quant",
    "precision": "quant",
}
# What other trainers have a key for and this one hasn't.
GPUS = "torchrun --nproc-per-node=4 train.py ... runs on four GPUs, and CUDA_VISIBLE_DEVICES chooses which"
NO_KEY = {
    "wandb": "write logger=wandb",
    "resume": "the same command resumes its run",
    "device": GPUS,
    "devices": GPUS,
    "gpus": GPUS,
    "num_gpus": GPUS,
    "nproc": GPUS,
    "world_size": GPUS,
    "nodes": "write launcher=slurm slurm.nodes=",
    "partition": "write launcher=slurm slurm.partition=",
    "dropout": "no model has any",
}
NONE_MARK = "_none_"  # how `quant.dgrad=none` travels through Hydra, which would replace the mapping by the string


class ConfigError(ValueError):
    """A mistake on the command line or in a YAML file. The message is complete: print it without a traceback."""


@dataclass(frozen=True)
class Composed:
    """`config`: typed; `yaml`: the composed text for config.yaml; `choices`: {group: option} as chosen."""

    config: TrainConfig
    yaml: str
    choices: dict[str, str]


def groups() -> dict[str, list[str]]:
    """{group: options}, from the folders of configs/."""
    folders = [folder for folder in sorted(ROOT.iterdir()) if folder.is_dir() and any(folder.glob("*.yaml"))]
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def compose(overrides: list[str]) -> Composed:
    """Compose configs/train.yaml with `overrides`. Raises ConfigError, and nothing else, for a user's mistake.

    `experiment=<grid> cell=<name>` is written out first (launcher/cells.py); both names are then among the choices.
    """
    try:
        resolved = experiments.resolve(overrides)
    except experiments.CellError as error:
        raise ConfigError(str(error)) from error
    parsed = [check(override) for override in parse(resolved.overrides)]
    for override in parsed:
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: several values; add -m to run them one after another")
    lines = [text for override in parsed for text in rewrite(override)]
    register()
    try:
        with initialize_config_dir(str(ROOT), version_base="1.3"):
            full = hydra_compose("train", overrides=lines, return_hydra_config=True)
        choices = own_choices(full.hydra.runtime.choices)
        if resolved.cell:
            choices |= {"experiment": resolved.experiment, "cell": resolved.cell}
        tree = full.copy()
        OmegaConf.set_struct(tree, False)
        del tree["hydra"]
        base = recipefile.read(ROOT / "quant" / f"{choices['quant']}.yaml", ConfigError) if "quant" in choices else {}
        tree.quant = without_none_gemms(OmegaConf.to_container(tree.quant), base)
        return Composed(OmegaConf.to_object(tree), OmegaConf.to_yaml(tree), choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    except yaml.YAMLError as error:
        raise ConfigError(gist(error)) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


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
    alternatives = []
    for override in [item if item.key_or_group == CELL else check(item) for item in parse(overrides)]:
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


def check(override: Override) -> Override:
    """Raise ConfigError for an unknown key or group choice, naming the nearest right one."""
    key = override.key_or_group
    known_groups = groups()
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
    for value in listed(override) if override.is_sweep_override() else [override.value()]:
        if isinstance(value, list):
            example = next((one for one in value if one in options), options[0])
            raise ConfigError(
                f"{override.input_line}: a list; give one choice, as in {override.key_or_group}={example}. There are: "
                f"{', '.join(options)}"
            )
        word = "null" if value is None else str(value)
        if word not in options:
            near = suggestion(word, options)
            raise ConfigError(
                f"{override.key_or_group}={word}: no such choice{near or '.'} There are: {', '.join(options)}"
            )


def listed(override: Override) -> list[str]:
    """The values of a sweep. ConfigError for one that only a search could enumerate, such as interval(0,1)."""
    try:
        return list(override.sweep_string_iterator())
    except HydraException:
        raise ConfigError(f"{override.input_line}: list the values, as in {override.key_or_group}=a,b,c") from None


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


def rewrite(override: Override) -> list[str]:
    """Free-form sections take any key (their packages check it): `quant.a=b` becomes `++quant.a=b`."""
    section, *rest = override.key_or_group.split(".")
    if section not in FREE_FORM or not rest or override.is_delete():
        return [override.input_line]
    if section == "quant" and len(rest) == 1 and rest[0] in OPERANDS and str(override.value()) == "none":
        return [f"++quant.{rest[0]}.{NONE_MARK}=true"]
    return [f"++{override.input_line.lstrip('+')}"]


def without_none_gemms(quant: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Write a GEMM given as `none` out: both grids none, each operand's source kept (docs/concepts.md#three-gemms-six-slots). `base`: the
    recipe file that `quant` started from."""
    for gemm, slots in OPERANDS.items():
        given = quant.get(gemm)
        if given == "none" and gemm in base:  # from another YAML file
            given = {**base[gemm], NONE_MARK: True}
        if isinstance(given, dict) and given.pop(NONE_MARK, False):
            sources = {slot: (given.get(slot) or {}).get("source", "input") for slot in slots}
            quant[gemm] = {slot: {"grid": "none", "source": source} for slot, source in sources.items()}
    return quant


def own_choices(choices: Any) -> dict[str, str]:
    return {group: option for group, option in choices.items() if not group.startswith("hydra") and option}


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
    if key and re.search(r"is not a subclass of \w+Section|Cannot merge DictConfig with ListConfig", first):
        inside = [name for name in known_keys() if name.startswith(f"{key.group(1)}.")]
        first = f"a section, not a value; set one of its keys: {', '.join(inside)}"
    return f"{key.group(1)}: {first}" if key else first
