"""A trained run that a script takes up: runs/NAME or runs/NAME@STEP."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.runfolder import CONFIG, RUN, read_json
from launcher.compose import stored
from training.checkpoint.manifest import step_of
from training.config import TrainConfig
from training.inference import find_checkpoint, split_step


@dataclass(frozen=True)
class Kept:
    """`config` has data.path where the tokens lie now; `run` is its run.json; `checkpoint` is that of `step`."""

    folder: Path
    checkpoint: Path
    step: int
    config: TrainConfig
    run: dict[str, Any]


def kept(text: str, data: Path | None) -> Kept:
    """The newest checkpoint of `text`, or that of its step. data: the token folder, if it was moved.

    Raises what find_checkpoint does, and ValueError for one folder in place of a mixture's.
    """
    folder, step = split_step(text)
    checkpoint = find_checkpoint(folder, step)
    config, run = stored(folder / CONFIG), read_json(folder / RUN)
    if data and config.data.mix:
        raise ValueError(f"{run['name']} was trained on a mixture: put its folders back where data.mix names them")
    config.data.path = data and str(data)
    return Kept(folder, checkpoint, step_of(checkpoint), config, run)
