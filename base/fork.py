"""fork=RUN@STEP: which run goes on from which of its checkpoints, and what is known of that run. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.runfolder import CHECKPOINTS, CONFIG, RUN, RunError, read_json

FORM = "write fork=RUN@STEP, such as fork=runs/NAME@2500 or fork=NAME@2500"


class ForkError(ValueError):
    """A fork that can't be: the message is one line that says what was got and what to type."""


@dataclass(frozen=True)
class Parent:
    """The run that is forked, `run` its run.json, after `step` completed steps."""

    folder: Path
    step: int
    run: dict[str, Any]

    @property
    def config(self) -> Path:
        return self.folder / CONFIG

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINTS / f"step_{self.step:08d}"

    @property
    def identity(self) -> dict[str, Any]:
        """What the numerics of a fork have beside those of its own configuration."""
        return {"fork.parent": self.run["hash"], "fork.step": self.step}

    @property
    def lineage(self) -> dict[str, Any]:
        """For run.json: whose child it is, from which step on. `trunk`: the hash of the run at the tree's root, one
        sample of what chance does to all that grow from it; `rounding_seed`: the trunk's. `way`: the recipes so far,
        equal for trunks that differ by their seed only."""
        above = self.run.get("parent", {})
        own = f"{self.run['recipe_label']}@{self.step}"
        return {
            "name": self.run["name"],
            "folder": str(self.folder),
            "hash": self.run["hash"],
            "step": self.step,
            "trunk": above.get("trunk", self.run["hash"]),
            "rounding_seed": above.get("rounding_seed", self.run["numerics"].get("rounding_seed")),
            "way": [*above.get("way", []), own],
        }


def step_of(fork: str) -> int:
    """The step at which the fork begins. ForkError where none is named."""
    where, _, step = fork.rpartition("@")
    if not where or not step.isdigit():
        raise ForkError(f"fork={fork}: {FORM}")
    return int(step)


def name_of(fork: str) -> str:
    """The name of the run that is forked."""
    return Path(fork.rpartition("@")[0]).name


def parent_of(fork: str, runs: str | Path) -> Parent:
    """The parent that `fork` names: a folder, or the name of one in `runs`. ForkError where there is none."""
    step, where = step_of(fork), fork.rpartition("@")[0]
    folder = Path(where) if "/" in where else Path(runs) / where
    try:
        if not (folder / RUN).exists() or not (folder / CONFIG).exists():
            raise ForkError(f"fork={fork}: {folder} is no run's folder; {FORM}")
        return Parent(folder, step, read_json(folder / RUN))
    except RunError as error:
        raise ForkError(f"fork={fork}: {error}") from None
