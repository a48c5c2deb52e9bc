"""Sinks beside metrics.jsonl: Weights & Biases and TensorBoard. One that breaks is dropped with one warning."""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from training.config import LoggerSection, WandbSection
from training.records.identity import short_count
from training.records.metrics import MetricsFile
from training.records.scalars import numbers

WANDB_TIMEOUT_S = 30  # for the connection
WANDB_ID_LENGTH, WANDB_TAG_LENGTH = 128, 64  # characters that its server takes
Past = Callable[[], list[dict[str, Any]]]


class Sink(Protocol):
    def log(self, rows: list[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


def check_asked_for(section: LoggerSection) -> None:
    """Raises RuntimeError, with what to type, for a tracker that was asked for and can't work on this machine: said
    before any work, not in the middle of it. Whether its server answers is another matter (Loggers)."""
    asked = {"tensorboard": section.tensorboard, "wandb": section.wandb.mode != "disabled"}
    for package, is_asked in asked.items():
        if is_asked and importlib.util.find_spec(package) is None:
            raise RuntimeError(
                f"logger={package} needs the {package} package: pip install -e '.[{package}]', or leave it out "
                "(metrics.jsonl is always written)"
            )
    if section.wandb.mode == "online":
        import wandb

        if not wandb.login(prompt=False):  # looks for a key only, asks nobody
            raise RuntimeError("no W&B key found: type `wandb login`, or set logger.wandb.mode=offline")


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
            self._guard(name, lambda name=name: self._sinks[name].log(list(rows)))

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
    """Numbers of train and eval rows as scalars `kind/field` in run_dir/tensorboard, on disk after each call.

    `past`: the rows that a resumed run has, up to `step`. Readers drop what an earlier start wrote beyond it; where no
    earlier start wrote anything, they are written now.
    """

    def __init__(self, run_dir: Path, step: int = 0, past: Past = list):
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        was_begun = any(folder.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if was_begun else None)
        if not was_begun:
            self.log(past())

    def log(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for key, value in numbers(row).items():
                self._writer.add_scalar(key, value, row["step"])
        self._writer.flush()  # a kill loses nothing that metrics.jsonl has

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A W&B run whose id is the run's name and hash, so that a resumed run continues it.

    Offline, each start writes a folder of its own, and syncing one replaces what an earlier one of the same id held. So
    a resume writes all of `past` into the new folder, which is then the whole run; the earlier ones go at its end.
    """

    def __init__(self, run_dir: Path, section: WandbSection, labels: dict[str, Any], past: Past = list):
        import wandb

        self._curves: dict[str, tuple[list[int], list[float]]] = {"train": ([], []), "eval": ([], [])}
        self._earlier = list((run_dir / "wandb").glob(f"offline-run-*-{labels['id']}"))
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            mode=section.mode,
            dir=str(run_dir),
            resume="allow",
            settings=wandb.Settings(init_timeout=WANDB_TIMEOUT_S),
            **labels,
        )
        if section.mode == "offline" or not self._run.resumed:
            self.log(past())

    def log(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if values := numbers(row):
                self._run.log({**values, "step": row["step"]}, step=row["step"])
            if row["kind"] in self._curves:
                for values, value in zip(self._curves[row["kind"]], (row["step"], row["loss"]), strict=True):
                    values.append(value)
            if row.get("event") == "finish":
                self._plot(row["step"])

    def _plot(self, step: int) -> None:
        """Both curves as one chart, for whoever opens the run when it is over."""
        import wandb

        steps, losses = zip(*self._curves.values(), strict=True)
        chart = wandb.plot.line_series(list(steps), list(losses), list(self._curves), "Loss, nats a token", "step")
        self._run.log({"curves": chart}, step=step)

    def close(self) -> None:
        self._run.finish()
        for folder in self._earlier:  # not before: what W&B's own process has not written yet dies with it
            shutil.rmtree(folder)


def wandb_labels(run: dict[str, Any], commit: str) -> dict[str, Any]:
    """What W&B shows and filters runs by, from run.json: recipes of one experiment, or of one model and length, are a
    group. Beside the numerics, the configuration has the keys recipe, model and commit."""
    group = run.get("experiment") or f"{run['model']}-{short_count(run['tokens'])}"
    shown = ("recipe", "recipe_label", "model", "seed", "tokens", "parameters", "experiment", "cell")
    return {
        "id": f"{run['name']}-{run['hash']}"[:WANDB_ID_LENGTH],
        "name": run["name"],
        "group": group,
        "job_type": "train",
        "tags": [tag[:WANDB_TAG_LENGTH] for tag in dict.fromkeys((run["model"], run["recipe"], group))],
        "config": {key: run[key] for key in shown if run.get(key) is not None} | {"commit": commit} | run["numerics"],
    }


def build_sinks(
    section: LoggerSection, run_dir: Path, run: dict[str, Any], commit: str, step: int, past: Past
) -> dict[str, Callable[[], Sink]]:
    """`run`: run.json; `step`, `past`: where a resumed run goes on, and the rows that it has until there."""
    sinks: dict[str, Callable[[], Sink]] = {}
    if section.tensorboard:
        sinks["tensorboard"] = lambda: TensorBoardSink(run_dir, step, past)
    if section.wandb.mode != "disabled":
        sinks["wandb"] = lambda: WandbSink(run_dir, section.wandb, wandb_labels(run, commit), past)
    return sinks
