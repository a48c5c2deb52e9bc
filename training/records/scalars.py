"""What a tracker can plot of a row: its numbers, and means over layers of what a row has of each layer."""

from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

SKIPPED = ("step", "time")
# Counter of a quantizer -> what it is a share of (quant/stats.py).
SHARES = {"clipped": "elements", "zeroed": "elements", "underflow_blocks": "blocks"}
OPERAND = ("mse", "clipped", "underflowed")  # figures of an operand in errors' and X-ray's rows
OSCILLATION = ("flipped", "flips_per_step", "near")


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """{'train/loss': 3.2, 'slots/fprop.x/clipped': 0.02, ...}."""
    plain = {
        k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool) and k not in SKIPPED
    }
    return {f"{row['kind']}/{key}": value for key, value in (*plain.items(), *of_layers(row))}


def of_layers(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, mean over layers; of counters the share of all layers' elements)."""
    if row["kind"] == "oscillation":
        yield from means("", OSCILLATION, row["layers"].values())
    elif row["kind"] == "slots":
        for slot, found in by_slot(row["slots"].values()):
            for name, of in SHARES.items():
                if whole := sum(one.get(of, 0) for one in found):
                    yield f"{slot}/{name}", sum(one[name] for one in found if of in one) / whole
    elif row["kind"] in ("errors", "xray"):
        layers = row.get("errors") or {name: layer["slots"] for name, layer in row["layers"].items()}
        for slot, found in by_slot(layers.values()):
            yield from means(f"{slot}/", OPERAND, found)


def by_slot(layers: Iterable[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    layers = list(layers)
    for slot in dict.fromkeys(slot for layer in layers for slot in layer):
        yield slot, [layer[slot] for layer in layers if slot in layer]


def means(prefix: str, names: Iterable[str], found: Iterable[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Of what isn't null."""
    found = list(found)
    for name in names:
        if there := [one[name] for one in found if one.get(name) is not None]:
            yield prefix + name, fmean(there)
