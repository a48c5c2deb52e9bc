"""What the fault tests compare: losses and samples of every step, and all tensors of a checkpoint."""

import json
from pathlib import Path

from training.checkpoint.state import read_all

FIELDS = ("step", "loss", "grad_norm", "samples")


def train_rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if row["kind"] == "train":
            found.append({name: row[name] for name in FIELDS})
    return found


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in train_rows(folder)]


def differing_tensors(left: Path, right: Path) -> list[str]:
    a, b = read_all(left), read_all(right)
    return sorted(a.keys() ^ b.keys()) + [name for name in sorted(a.keys() & b.keys()) if not a[name].equal(b[name])]
