"""Numbers on which two converters to a small float format would differ, if they do."""

import torch
from torch import Tensor

from kernels.formats.minifloat import MiniFloat


def grid(fmt: MiniFloat) -> Tensor:
    """Every non-negative value of the format, ascending: subnormals, then binades up to the maximum."""
    steps = torch.arange(2**fmt.mantissa_bits)
    values = [steps * 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)]
    for exponent in range(fmt.min_exponent, 10):
        values.append((1 + steps / 2**fmt.mantissa_bits) * 2.0**exponent)
    values = torch.cat(values).to(torch.float32)
    return values[values <= fmt.max_value]


def probes(fmt: MiniFloat, count: int = 1_000_000) -> Tensor:
    """Grid values, ties, the floats beside both, subnormals, saturation, `count` random values; of both signs."""
    values = grid(fmt)
    points = torch.cat((values, (values[1:] + values[:-1]) / 2))
    beside = torch.cat((torch.nextafter(points, torch.tensor(0.0)), torch.nextafter(points, torch.tensor(1e9))))
    beyond = fmt.max_value * torch.tensor([1.01, 1.0357, 1.0358, 1.25, 2.0, 1e6, float("inf")])
    tiny = torch.tensor([1e-45, 1e-40, 2.0**-126, 1e-20])
    random = torch.exp2(torch.empty(count).uniform_(-14, 10, generator=torch.Generator().manual_seed(1)))
    positive = torch.cat((points, beside, beyond, tiny, random))
    return torch.cat((positive, -positive))
