"""A run that goes on from another run's checkpoint: what must hold, what of it is identity, and how it is loaded.

Weights, moments, step and order of the data are the parent's. A fork in which nothing is changed goes on as its parent
did, bit for bit.
"""

from typing import Any

from base.fork import ForkError, Parent, parent_of
from base.words import some
from data.tokens import TokenSet
from training.checkpoint.manifest import checkpoints, problems, step_of
from training.checkpoint.state import TrainState, load
from training.checkpoint.storage import CheckpointError
from training.config import TrainConfig
from training.ranks.distributed import Dist
from training.start.derive import Numbers

# What makes the data's order, and the shape of what is loaded: a change would be another run, not a fork.
HOLDS = ("model.", "data.", "dtypes.", "seed", "batch.seq_len", "batch.sequences", "perturb")
SHOWN = 6  # changed keys
PHASES = "quant.phases."
WHOLE_LENGTH = ("cosine", "linear")  # schedules whose rate at a step follows from the run's whole length


def parent(config: TrainConfig) -> Parent | None:
    """The run that this one is a fork of, if it is one."""
    return parent_of(config.fork, config.paths.runs) if config.fork else None


def changes(parent: Parent, numerics: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (the parent's, the fork's)}, "-" for none."""
    old = parent.run["numerics"]
    keys = sorted(key for key in old.keys() | numerics.keys() if not key.startswith("fork."))
    return {
        key: (old.get(key, "-"), numerics.get(key, "-")) for key in keys if old.get(key, "-") != numerics.get(key, "-")
    }


def label(parent: Parent, own: str) -> str:
    """For tables: the way to the fork, then the fork's own recipe."""
    return " > ".join([*parent.lineage["way"], own])


def told(parent: Parent, numerics: dict[str, Any]) -> str:
    """For the start screen."""
    changed = list(changes(parent, numerics))
    what = f"other {some(changed, SHOWN)}" if changed else "nothing changed"
    return f"of {parent.folder} at step {parent.step}: {what}"


def check(parent: Parent, numerics: dict[str, Any], numbers: Numbers, tokens: TokenSet | None) -> None:
    """Raise ForkError, before any work, for a fork that can't go on from this parent."""
    who = f"fork={parent.folder}@{parent.step}"
    if tokens and tokens.fingerprint != parent.run["data_fingerprint"]:
        raise ForkError(f"{who}: the parent was trained on other text ({parent.run.get('data_path')}); give that one")
    for key, (old, new) in changes(parent, numerics).items():
        if key.startswith(HOLDS) and (tokens or not key.startswith("data.")):
            raise ForkError(f"{who}: {key}={new}, the parent has {old}; a fork keeps it: leave it out")
    steps = parent.run["steps"]
    if numbers.schedule.name in WHOLE_LENGTH and numbers.steps != steps:
        raise ForkError(
            f"{who}: steps={numbers.steps}, but the rate of schedule={numbers.schedule.name} follows the parent's "
            f"{steps} steps; leave steps out, or add schedule=wsd"
        )
    _check_phases(parent, numerics, who)
    if parent.step >= numbers.steps:
        raise ForkError(f"{who}: nothing is left to train of {numbers.steps} steps; give an earlier step or steps=")


def _check_phases(parent: Parent, numerics: dict[str, Any], who: str) -> None:
    """Raise ForkError for a phase that the parent didn't have and that is over where the fork begins."""
    for key, (_, new) in changes(parent, numerics).items():
        if not key.startswith(PHASES) or new == "-":
            continue
        number = key.removeprefix(PHASES).partition(".")[0]
        end = numerics[f"{PHASES}{number}.end"]
        if end <= parent.step:
            raise ForkError(
                f"{who}: quant.phases[{number}] ends at step {end}, before the fork begins; leave it out, or fork an "
                "earlier step"
            )


def check_there(parent: Parent) -> None:
    """Raise ForkError where the parent's checkpoint is gone. A fork that has one of its own doesn't need it."""
    there = checkpoints(parent.checkpoint.parent)
    if parent.checkpoint not in there:
        known = ", ".join(str(step_of(path)) for path in there) or "none"
        who = f"fork={parent.folder}@{parent.step}"
        raise ForkError(f"{who}: no checkpoint of that step is there; there are: {known}")


def begin(parent: Parent, state: TrainState, ranks: Dist) -> None:
    """Fill `state` from the parent's checkpoint. Hooks that it doesn't know begin at its step. Collective."""
    path = parent.checkpoint
    bad = [one for found in ranks.gather(problems(path, ranks.rank, ranks.world)) for one in found]
    if bad:
        raise CheckpointError(f"{path} can't be used: {'; '.join(bad[:3])}; give another step")
    unknown = load(path, state, ranks.group, parent=parent.run["hash"])
    for name in unknown:
        state.hooks[name].begin(state.step)
    state.extra = {}  # the time that it took is the parent's
    if ranks.is_main:
        print(f"forked from {path}: step {state.step}, {state.tokens:,} tokens", flush=True)
