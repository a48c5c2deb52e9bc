"""Which rank this process is, from the variables by which launchers say so. No torch here.

The names are torchrun's. They are read together: half of them, as a scheduler's shell or an old
export leaves them, mean neither one process nor one of several, and a guess would wait for ranks
that nobody started.
"""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
NAMES = (*NUMBERS, "MASTER_ADDR", "MASTER_PORT")
# Of one among several; LOCAL_WORLD_SIZE may be left out where there is one node.
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MOST_PORT = 65535


class RanksError(ValueError):
    """Variables that don't fit each other; the message is complete."""


@dataclass(frozen=True)
class Place:
    """This process among `world` ranks; `address`: host and port where they meet, None for one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1  # ranks on this node
    address: tuple[str, int] | None = None


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Read the variables; an empty one counts as absent. One process where they say that, or nothing.

    Raises RanksError for half of them, for what isn't a number, and for numbers that don't fit each
    other.
    """
    words = {name: environment[name].strip() for name in NAMES if environment.get(name, "").strip()}
    for name in NUMBERS:
        if not _is_number(words.get(name, "0")):
            raise _wrong(environment, f"{name} is no whole number")
    found = {name: int(words[name]) for name in NUMBERS if name in words}
    world, rank = found.get("WORLD_SIZE", 1), found.get("RANK", 0)
    local_rank = found.get("LOCAL_RANK", 0)
    local_world = found.get("LOCAL_WORLD_SIZE", world)
    said = f"WORLD_SIZE={world}" if "WORLD_SIZE" in words else "no WORLD_SIZE"
    if world < 1 or local_world < 1:
        raise _wrong(environment, "sizes are 1 or more")
    if missing := [name for name in NEEDED if name not in words and world > 1]:
        raise _wrong(environment, f"without {', '.join(missing)}")
    for name, value, size in (
        ("RANK", rank, world),
        ("LOCAL_RANK", local_rank, local_world),
        ("LOCAL_WORLD_SIZE", local_world, world + 1),
    ):
        if value >= size:
            raise _wrong(environment, f"{name}={value} doesn't fit {said}")
    if world == 1:
        return Place()
    port = words["MASTER_PORT"]
    if not _is_number(port) or not 1 <= int(port) <= MOST_PORT:
        raise _wrong(environment, f"MASTER_PORT is a number from 1 to {MOST_PORT}")
    return Place(rank, world, local_rank, local_world, (words["MASTER_ADDR"], int(port)))


def refuse_several(command: str) -> None:
    """RanksError where this process is one of several, for what starts processes itself."""
    if place().world > 1:
        raise _wrong(os.environ, f"{command} starts its runs itself and can't run under torchrun")


def remedy() -> str:
    """What to type, for one process and for several."""
    alone = f"one process: unset {' '.join(NAMES)}"
    return f"{alone}; several: torchrun --nproc-per-node=4 train.py ..."


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()


def _wrong(environment: Mapping[str, str], why: str) -> RanksError:
    got = [f"{name}={shlex.quote(environment[name])}" for name in NAMES if name in environment]
    return RanksError(f"{' '.join(got)}: {why}. For {remedy()}")
