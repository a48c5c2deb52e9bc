"""Registers the typed schema (training/config.py) with Hydra; configs/train.yaml starts from it."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore

from training.config import TrainConfig

# Mappings whose fields quant.recipe, each hook and probe, and training.config check.
FREE_FORM = ("quant", "hooks", "probes", "init")

# Declared as Any, since one field can't be null or a list in a schema.
OF_NUMBERS = {"data.weights"}


def register() -> None:
    """Make `- schema` in a defaults list mean TrainConfig. Calling it again changes nothing."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)


@cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key of the schema, sections included: 'optim', 'optim.lr', ..."""
    return tuple(walk(TrainConfig, ""))


@cache
def text_keys() -> frozenset[str]:
    """Dotted keys of the fields that hold text, text or null, or lists or mappings of text, and the recipe's name: what
    is typed there is kept."""
    return frozenset([*text_walk(TrainConfig, ""), "quant.name"]) - OF_NUMBERS


def text_walk(section: type, prefix: str) -> Iterator[str]:
    hints = get_type_hints(section)
    for item in fields(section):
        kind = hints[item.name]
        if is_dataclass(kind):
            yield from text_walk(kind, f"{prefix}{item.name}.")
        elif holds_text(kind):
            yield prefix + item.name


def holds_text(kind: Any) -> bool:
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType, list) else ()
    return kind in (str, Any) or any(map(holds_text, parts))


def walk(section: type, prefix: str) -> list[str]:
    keys = []
    hints = get_type_hints(section)
    for item in fields(section):
        keys.append(prefix + item.name)
        if is_dataclass(hints[item.name]):
            keys += walk(hints[item.name], f"{prefix}{item.name}.")
    return keys
