"""What an operand is like and what its quantizer makes of it: figures of quant/decompose.py, and the shape of the
tensor before its rotation."""

import math

import torch
from torch import Tensor

from quant.decompose import NAMES, Parts, parts_of, terms
from quant.errors import number
from quant.held import Held, Wish

CHANNELS = 0.01  # share of the columns whose energy is `top_channels`
BINS = 18  # of block scales: within a factor of 2 of the largest, of 4, ...; the last is blocks without a scale
FIGURES = (*NAMES, "kurtosis", "top_channels")


class Look:
    """A layer's watch (quant/linear.py): {slot: `figures`} of the operands of one call."""

    def __init__(self) -> None:
        self.slots: dict[str, Tensor] = {}

    def count(self, slot: str, held: Held, wish: Wish) -> None:
        if wish.spec.grid != "none" and slot not in self.slots:
            self.slots[slot] = figures(held.values(), wish)


def figures(x: Tensor, wish: Wish) -> Tensor:
    """FP64, FIGURES and then the histogram of blocks' scales, of x in its natural layout as `wish` quantizes it.
    kurtosis is 3 for a normal distribution. On the device, and nothing waits for it."""
    y = x.double()
    energy = y.square().sum(0)
    top = energy.topk(math.ceil(CHANNELS * energy.numel())).values.sum() / energy.sum()
    centred = y - y.mean()
    kurtosis = centred.pow(4).mean() / centred.square().mean().square()
    parts = parts_of(x, wish)
    found = terms(parts) | {"kurtosis": kurtosis, "top_channels": top}
    return torch.cat((torch.stack([found[name] for name in FIGURES]), scale_histogram(parts)))


def named(found: Tensor) -> dict[str, float | list[float] | None]:
    """What `figures` gives, on the host, as a row has it."""
    values = found.tolist()
    read = dict(zip(FIGURES, map(number, values), strict=False))
    scales = [float(f"{share:.6g}") for share in values[len(FIGURES) :]]
    return read | ({"scales": scales} if scales else {})


def scale_histogram(parts: Parts) -> Tensor:
    """FP64 [BINS]: shares of the blocks by their scale; [0] of a format without blocks."""
    blocks = parts.blocks
    if blocks is None:
        return parts.x.new_empty(0)
    largest = torch.where(blocks.alive, blocks.scales, 0.0).max()
    halvings = (largest / blocks.scales).log2().floor().nan_to_num()
    bins = torch.where(blocks.alive, halvings.clamp(0, BINS - 2), BINS - 1).flatten()
    counts = (bins == torch.arange(BINS, device=bins.device)[:, None]).sum(1)
    return counts.double() / bins.numel()
