"""Sinks beside metrics.jsonl: Weights & Biases and TensorBoard. One that breaks is dropped with one warning."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from training.config import LoggerSection
from training.records.metrics import MetricsFile

WANDB_TIMEOUT_S = 30  # for the connection


class Sink(Protocol):
    def log(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """Writes rows to metrics.jsonl first (an error there stops the run: nothing else is the truth), then to sinks."""

    def __init__(self, file: MetricsFile, sinks: dict[str, Callable[[], Sink]]):
        self.file = file
        self._sinks: dict[str, Sink] = {}
        for name, open_sink in sinks.items():
            self._guard(name, lambda name=name, open_sink=open_sink: self._sinks.update({name: open_sink()}))

    def write(self, *rows: dict[str, Any]) -> None:
        self.file.append(list(rows))
        for name in list(self._sinks):
            self._guard(name, lambda name=name: [self._sinks[name].log(row) for row in rows])

    def close(self) -> None:
        for name in list(self._sinks):
            self._guard(name, self._sinks[name].close)

    def _guard(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a tracker may raise anything; the run must go on
            self._sinks.pop(name, None)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(
                f"warning: {name} is off for the rest of this run ({reason}); metrics.jsonl has everything",
                file=sys.stderr,
            )


class TensorBoardSink:
    """Numbers of train and eval rows as scalars `kind/field` in run_dir/tensorboard."""

    def __init__(self, run_dir: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, row: dict[str, Any]) -> None:
        for key, value in numbers(row).items():
            self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A W&B run whose id is the run's name and hash, so that a resumed run continues it."""

    def __init__(self, run_dir: Path, section: Any, run: dict[str, Any], config: dict[str, Any]):
        import wandb

        if section.mode == "online" and not wandb.login(prompt=False, timeout=WANDB_TIMEOUT_S):
            raise RuntimeError("no W&B key found; type `wandb login`, or set logger.wandb.mode=offline")
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            mode=section.mode,
            dir=str(run_dir),
            id=f"{run['name']}-{run['hash']}"[:128],
            name=run["name"],
            resume="allow",
            config=config,
            settings=wandb.Settings(init_timeout=WANDB_TIMEOUT_S),
        )

    def log(self, row: dict[str, Any]) -> None:
        values = numbers(row)
        if values:
            self._run.log({**values, "step": row["step"]}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """{'train/loss': 3.2, ...}: what a tracker can plot of a row."""
    skip = ("step", "time")
    plain = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool) and k not in skip}
    return {f"{row['kind']}/{key}": value for key, value in plain.items()}


def build_sinks(
    section: LoggerSection, run_dir: Path, run: dict[str, Any], config: dict[str, Any]
) -> dict[str, Callable[[], Sink]]:
    sinks: dict[str, Callable[[], Sink]] = {}
    if section.tensorboard:
        sinks["tensorboard"] = lambda: TensorBoardSink(run_dir)
    if section.wandb.mode != "disabled":
        sinks["wandb"] = lambda: WandbSink(run_dir, section.wandb, run, config)
    return sinks
