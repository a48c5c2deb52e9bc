"""The 574 published runs (Quartet II's released sweep): final losses over (N, D, recipe), one seed each.

N counts non-embedding parameters, D tokens. Columns of the file: size, N, D, scheme, variant, final_loss.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DEFAULT_PATH = Path(__file__).resolve().parents[1] / "results" / "published" / "quartet2_runs.csv"

CLAIM = 0.2  # the paper's headline: at least this much off the gap of every earlier recipe
# (scheme, variant) of the file -> recipe name in configs/experiment. Rows without one keep "scheme:variant", / for |.
NAMES = {
    ("bf16", "-"): "bf16",
    ("quartet2", "had128+46"): "quartet2",
    ("quartet2", "had128"): "quartet2_no46",
    ("nvidia", "plain"): "nvidia",
    ("nvidia", "46"): "nvidia_46",
    ("tetrajetv2", "-"): "tetrajet2",
    ("quartet2", "had32"): "quartet2_no46_rht32",
    ("quartet2", "had128+delayed_amax"): "quartet2_no46_delayed_amax",
    ("quartet2", "had32+delayed_amax"): "quartet2_no46_rht32_delayed_amax",
    ("forward_main", "1x16+46|had1|so1"): "forward_1x16_46",
    ("forward_main", "1x16|had1|so1"): "forward_1x16",
    ("forward_main", "1x16|had1|so0.92"): "forward_1x16_override92",
    ("forward_main", "1x16|had16|so1"): "forward_1x16_rht16",
    ("forward_main", "16x16+46|had1|so1"): "forward_16x16_46",
    ("forward_main", "16x16|had1|so1"): "forward_16x16",
    ("forward_main", "16x16|had16|so1"): "forward_16x16_rht16",
    ("backward_main", "Q(E)Q(Wt)t_Q(Et)Q(Xt)t|eden|e4m3|g16|had128|so0.93"): "backward_eden",
    ("backward_main", "Q(E)Q(Wt)t_Q(Et)Q(Xt)t|sr|e4m3|g16|had128|so1"): "backward_sr",
    ("backward_main", "Q(E)Q(Wt)t_EtX|eden|e4m3|g16|had128|so0.93"): "dgrad_eden",
    ("backward_main", "Q(E)Q(Wt)t_EtX|sr|e4m3|g16|had128|so1"): "dgrad_sr",
    ("backward_main", "EW_Q(Et)Q(Xt)t|eden|e4m3|g16|had128|so0.93"): "wgrad_eden",
    ("backward_main", "EW_Q(Et)Q(Xt)t|sr|e4m3|g16|had128|so1"): "wgrad_sr",
    ("bnrq", "Q(E)W_EtX|sr|e4m3|g16|had1|so1"): "dgrad_e_sr",
}
# The corpus grids' names of what the published runs call otherwise.
ALIASES = {
    "quartet2_forward": "forward_1x16_46",
    "quartet2_backward": "backward_eden",
    "nvidia_forward": "forward_16x16",
}
MAIN = ("quartet2", "quartet2_no46", "tetrajet2", "nvidia_46", "nvidia")
# Twice in the file; copies agree to 1.1e-5, which is what an exact rerun there gives.
DUPLICATE_TOLERANCE = 2e-5

Points = dict[tuple[int, int], float]  # {(N, D): final loss in nats/token}


def load(path: Path | str = DEFAULT_PATH) -> dict[str, Points]:
    """{recipe: {(N, D): loss}} from the CSV. ValueError names the file, for a cell that occurs twice with other losses,
    columns that lack, and a line that is no point."""
    recipes: dict[str, Points] = {}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        try:
            missing = {"N", "D", "scheme", "variant", "final_loss"} - set(reader.fieldnames or ())
            lines = [] if missing else [(reader.line_num, line) for line in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: can't be read as CSV ({error})") from None
    if missing:
        raise ValueError(f"{path}: lacks the columns {sorted(missing)}")
    for number, line in lines:
        try:
            cell, loss = (int(line["N"]), int(line["D"])), float(line["final_loss"])
            if min(cell) < 1 or not math.isfinite(loss):
                raise ValueError(f"got {line['N']}, {line['D']} and {line['final_loss']}")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: N and D are whole numbers, final_loss a finite one ({error})"
            ) from None
        key = (line["scheme"], line["variant"])
        points = recipes.setdefault(NAMES.get(key, ":".join(key).replace("|", "/")), {})
        if abs(points.get(cell, loss) - loss) > DUPLICATE_TOLERANCE:
            raise ValueError(f"{path}: {key} at {cell} occurs with {points[cell]} and {loss}")
        points.setdefault(cell, loss)
    return recipes


def gaps(points: Points, base: Points) -> Points:
    """{(N, D): loss - baseline loss} over the cells both have, in nats/token."""
    return {cell: points[cell] - base[cell] for cell in sorted(points.keys() & base.keys())}


def at(points: Points, n: float, d: float) -> float | None:
    """The value at the cell within 1 % of (n, d), or None."""
    for (size, length), value in points.items():
        if abs(size / n - 1) < 0.01 and abs(length / d - 1) < 0.01:
            return value
    return None


@dataclass(frozen=True)
class Reduction:
    """By how much `ours` reduces the gap of `other`, 1 - gap/gap: per cell, and the cells that miss the claim."""

    other: str
    cells: dict[tuple[int, int], float]

    @property
    def misses(self) -> int:
        return sum(r < CLAIM for r in self.cells.values())

    def summary(self) -> tuple[float, float, float]:
        """Smallest, mean and largest reduction."""
        values = np.array(list(self.cells.values()))
        return float(values.min()), float(values.mean()), float(values.max())


def reduction(recipes: dict[str, Points], ours: str, other: str) -> Reduction:
    """By how much `ours` reduces the gap to bf16 of `other`, where both have a point."""
    a, b = gaps(recipes[ours], recipes["bf16"]), gaps(recipes[other], recipes["bf16"])
    return Reduction(other, {cell: 1 - a[cell] / b[cell] for cell in a.keys() & b.keys()})
