"""What a training run costs: hours from measured throughput, disk, and a labelled prediction for B200. No torch.

Throughput lives in results/throughput.json, or in a table of one's own: {"device", "rows": [{model, recipe,
tokens_per_second, flops_per_token, source}]}. `scripts/cost.py measure=...` writes it from finished runs or from
scripts/bench/bench_step.py's JSON.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.runs import Run, json_object
from base import runfolder
from base.flops import flops_per_token
from base.runfolder import RunError

TABLE = Path(__file__).resolve().parents[1] / "results" / "throughput.json"
ROW_NAMES, ROW_NUMBERS = ("model", "recipe"), ("flops_per_token", "tokens_per_second")
# Dense BF16 peak as NVIDIA states it. Prediction for B200: the MFU measured on an H100 in BF16, whatever the recipe:
# native NVFP4 GEMMs pay from about 3B parameters on (docs/published.md#6-speed), which none of these grids reaches.
B200_PEAK = 2250e12


@dataclass(frozen=True)
class Cell:
    """One cell of a grid and what follows from its configuration. `base_recipe`: the file its recipe started from.
    `disk_gib`: of the checkpoints kept; metrics and evaluations add a few MB."""

    name: str
    model: str
    recipe: str
    base_recipe: str
    steps: int
    tokens: int
    flops_per_token: int
    memory_gib: float
    disk_gib: float
    begins: int = 0  # the step of its parent at which a fork begins

    @property
    def flops(self) -> float:
        return float(self.flops_per_token) * self.tokens


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one GPU and where the figure is from ("measured", or how it was carried over)."""

    tokens_per_second: float
    source: str


def load(path: Path = TABLE) -> dict:
    """The measured table; an empty one when nothing was measured yet. RunError names a file that is none."""
    if not path.exists():
        return {"device": None, "rows": []}
    table = json_object(path)
    rows = table.get("rows")
    if not isinstance(table.get("device"), str) or not isinstance(rows, list) or not all(map(is_row, rows)):
        raise RunError(f"{path}: needs device and rows of {', '.join(ROW_NAMES + ROW_NUMBERS)}, numbers above 0")
    return table


def is_row(row: Any, numbers: tuple[str, ...] = ROW_NUMBERS) -> bool:
    """Has it the names of a model and a recipe, and `numbers` above 0?"""
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ROW_NAMES):
        return False
    return all(isinstance(row.get(key), int | float) and 0 < row[key] < math.inf for key in numbers)


def speed_of(cell: Cell, rows: list[dict]) -> Speed | None:
    """Measured for this model and recipe; else the recipe it varies; else another model's at equal MFU; else a guess,
    said to be one: the slowest quantized recipe of the table; else None."""
    sources = [(cell.recipe, "measured"), (cell.base_recipe, f"as {cell.base_recipe}")]
    quantized = [row for row in rows if row["recipe"] != "bf16"]
    if quantized and cell.recipe != "bf16":
        slowest = min(quantized, key=lambda row: row["tokens_per_second"] * row["flops_per_token"])["recipe"]
        sources.append((slowest, f"never measured: as {slowest}"))
    for recipe, how in sources:
        same = [row for row in rows if row["recipe"] == recipe]
        for row in same:
            if row["model"] == cell.model:
                return Speed(row["tokens_per_second"], how)
        if same:
            near = min(same, key=lambda row: abs(np.log(row["flops_per_token"] / cell.flops_per_token)))
            scaled = near["tokens_per_second"] * near["flops_per_token"] / cell.flops_per_token
            return Speed(scaled, f"MFU of {near['model']}" + ("" if how == "measured" else f" {how}"))
    return None


def gpu_hours(cell: Cell, rows: list[dict]) -> tuple[float | None, str]:
    """(GPU-hours on the measured device, source of the figure)."""
    speed = speed_of(cell, rows)
    return (None, "not measured") if speed is None else (cell.tokens / speed.tokens_per_second / 3600, speed.source)


def b200_hours(cell: Cell, rows: list[dict], peak: float | None) -> float | None:
    """Predicted GPU-hours on a B200: this model's BF16 hours on the measured device times the ratio of the BF16 peaks.

    `peak` [FLOP/s]: the measured device's; None without one.
    """
    if peak is None:
        return None
    hours, _ = gpu_hours(replace(cell, recipe="bf16", base_recipe="bf16"), rows)
    return None if hours is None else hours * peak / B200_PEAK


def measured_rows(runs: list[Run]) -> tuple[str, list[dict]]:
    """(device, rows) from finished single-GPU runs, the fastest of each model and recipe.

    ValueError when they ran on different devices or on several GPUs: one table is about one device; and where none had
    its GPU to itself.
    """
    runs = [run for run in runs if not run.company]
    if not runs:
        raise ValueError("no run had its GPU to itself, as far as others_gib in metrics.jsonl tells; use bench_step.py")
    devices = {run.read_json(runfolder.ENV).get("device", "unknown") for run in runs}
    if len(devices) != 1 or any(run.read_json(runfolder.ENV).get("device_count", 1) != 1 for run in runs):
        raise ValueError(f"throughput needs single-GPU runs of one kind of device, got {', '.join(sorted(devices))}")
    best: dict[tuple[str, str], dict] = {}
    for run in runs:
        key = (run.info["model"], run.info["recipe"])
        if key not in best or best[key]["tokens_per_second"] < run.tokens_per_second:
            numbers = {"tokens_per_second": round(run.tokens_per_second), "flops_per_token": run_flops(run)}
            source = f"{run.name}, median of {len(run.train['step'])} steps"
            best[key] = {"model": key[0], "recipe": key[1], **numbers, "source": source}
    return devices.pop(), [best[key] for key in sorted(best)]


def run_flops(run: Run) -> int:
    """Of one token, from the run's numerics."""
    layers, width = (run.info["numerics"][f"model.{key}"] for key in ("layers", "width"))
    sizes = (run.info["parameters_non_embedding"], run.info["vocab_size"], layers, width)
    return flops_per_token(*sizes, run.info["seq_len"])
