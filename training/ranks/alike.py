"""All ranks must be told the same and run the same code: collectives pair up by their order alone, so a rank with
another interval of checkpoints leaves the others waiting, and replicas of another seed are summed without a word."""

import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from base.files import code_hash
from base.tree import flatten
from base.words import some
from training.config import TrainConfig
from training.ranks.distributed import Dist

ROOT = Path(__file__).resolve().parents[2]
CODE = ("base", "configs", "data", "kernels", "launcher", "models", "quant", "training")
# Nodes may keep files in other places: of the data the contents count, by the run's hash.
PLACES = ("paths.", "data.")
SHOWN = 3


def check_start(ranks: Dist, config: TrainConfig) -> None:
    """ValueError, the same on all ranks, where one was told otherwise or runs other code. Collective."""
    if ranks.group is not None:
        check_alike(ranks, **told(config), code=code(), torch=torch.__version__)


def check_alike(ranks: Dist, **values: Any) -> None:
    """ValueError, the same on all ranks, where one of them has another value than rank 0. Collective."""
    if ranks.group is None:
        return
    first, *others = ranks.gather({"host": socket.gethostname(), "values": flatten(values)})
    for rank, other in enumerate(others, 1):
        names = sorted(first["values"].keys() | other["values"].keys())
        differing = [
            f"{name}={other['values'].get(name)} against {first['values'].get(name)}"
            for name in names
            if first["values"].get(name) != other["values"].get(name)
        ]
        if differing:
            raise ValueError(
                f"rank {rank} on {other['host']} differs from rank 0 on {first['host']}: "
                f"{some(differing, SHOWN, '; ')}. Start the same command, at the same commit, on every node"
            )


def told(config: TrainConfig) -> dict[str, Any]:
    """What a rank was told, as check_alike compares it."""
    flat = flatten(asdict(config))
    return {name: str(value) for name, value in flat.items() if not name.startswith(PLACES)}


def code() -> str:
    """A hash of our own files."""
    return code_hash([ROOT / folder for folder in CODE], ".py", ".yaml")[:12]
