"""Registers the typed schema (training/config.py) with Hydra; configs/train.yaml starts from it."""

from dataclasses import fields, is_dataclass
from functools import cache
from typing import get_type_hints

from hydra.core.config_store import ConfigStore

from training.config import TrainConfig

# Mappings whose fields quant.recipe, and each hook and probe, check.
FREE_FORM = ("quant", "hooks", "probes")


def register() -> None:
    """Make `- schema` in a defaults list mean TrainConfig. Calling it again changes nothing."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)


@cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key of the schema, sections included: 'optim', 'optim.lr', ..."""
    return tuple(walk(TrainConfig, ""))


def walk(section: type, prefix: str) -> list[str]:
    keys = []
    hints = get_type_hints(section)
    for item in fields(section):
        keys.append(prefix + item.name)
        if is_dataclass(hints[item.name]):
            keys += walk(hints[item.name], f"{prefix}{item.name}.")
    return keys
