"""What an operand is like and what its quantizer makes of it: figures of quant/decompose.py, and the shape of the
tensor before its rotation."""

import math

import torch
from torch import Tensor

from kernels.quantize import reference_impl as reference
from kernels.quantize.blocks import quantize_blocks
from quant.decompose import decompose
from quant.errors import numbers
from quant.held import Held, Wish

CHANNELS = 0.01  # share of the columns whose energy is `top_channels`
BINS = 18  # of block scales: within a factor of 2 of the largest, of 4, ...; the last is blocks without a scale


class Look:
    """A layer's watch (quant/linear.py): {slot: figures} of the operands of one call."""

    def __init__(self) -> None:
        self.slots: dict[str, dict[str, float | list[float] | None]] = {}

    def count(self, slot: str, held: Held, wish: Wish) -> None:
        if wish.spec.grid != "none" and slot not in self.slots:
            self.slots[slot] = figures(held.values(), wish)


def figures(x: Tensor, wish: Wish) -> dict[str, float | list[float] | None]:
    """Of x in its natural layout, as `wish` quantizes it. kurtosis is 3 for a normal distribution."""
    y = x.double()
    energy = y.square().sum(0)
    top = energy.topk(math.ceil(CHANNELS * energy.numel())).values.sum() / energy.sum()
    centred = y - y.mean()
    kurtosis = centred.pow(4).mean() / centred.square().mean().square()
    found = numbers(decompose(x, wish) | {"kurtosis": kurtosis, "top_channels": top})
    return found | ({"scales": scale_histogram(x, wish)} if wish.spec.is_blocked else {})


def scale_histogram(x: Tensor, wish: Wish) -> list[float]:
    """Shares of the blocks by their scale, BINS of them."""
    y = reference.stored(x, wish.axis, wish.signs)
    scale = reference.tensor_scale(wish.largest(reference.amax, x), wish.spec)
    blocks = quantize_blocks(y, wish.spec, scale, wish.draw, None if wish.signs is None else wish.signs.shape[-1])
    largest = torch.where(blocks.alive, blocks.scales, 0.0).max()
    halvings = (largest / blocks.scales).log2().floor().nan_to_num()
    bins = torch.where(blocks.alive, halvings.clamp(0, BINS - 2), BINS - 1).flatten().long()
    counts = torch.bincount(bins, minlength=BINS)
    return [float(f"{count / bins.numel():.6g}") for count in counts.tolist()]
