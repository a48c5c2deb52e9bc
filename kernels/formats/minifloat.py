"""Number formats and their rounding, in FP32 arithmetic that every device and torch.compile repeat bit for bit.

A value is rounded to a multiple of its binade's step by adding and subtracting 1.5 * 2^23 steps: FP32's own
round-to-nearest-even then does the work, ties included. No table search, no float8 cast: a cast can turn Inf into 448,
and Inductor drops the pair x.to(narrow).to(float32) inside one fused kernel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E5M2_MAX = 57344.0
EXPONENT_MASK = 0x7F800000
FP32_BIAS, FP32_MANTISSA = 127, 23
FP32_TINY = 2.0**-126
RANDOM_RANGE = float(2**24)


@dataclass(frozen=True)
class MiniFloat:
    """A sign, an exponent from min_exponent up (subnormals below) and mantissa_bits; values end at max_value."""

    mantissa_bits: int
    min_exponent: int
    max_value: float


E2M1 = MiniFloat(1, 0, E2M1_MAX)
E4M3 = MiniFloat(3, -6, E4M3_MAX)
E5M2 = MiniFloat(2, -14, E5M2_MAX)
# Formats of scales, without a sign: arXiv 2509.17791, and HiFloat4's (arXiv 2602.11287), whose 2^15 * 1.75 is a NaN.
UE5M3 = MiniFloat(3, -14, 61440.0)
E6M2 = MiniFloat(2, -48, 49152.0)
BY_NAME = {"e2m1": E2M1, "e4m3": E4M3, "e5m2": E5M2}
FP8_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _binade(x: Tensor, fmt: MiniFloat) -> Tensor:
    """The power of two at or below |x| (FP32), at least the format's smallest normal. |x| must be at most max_value."""
    smallest = (fmt.min_exponent + FP32_BIAS) << FP32_MANTISSA
    return (x.view(torch.int32) & EXPONENT_MASK).clamp_(min=smallest).view(torch.float32)


def round_nearest(x: Tensor, fmt: MiniFloat) -> Tensor:
    """x (FP32) to the nearest value of the format, ties to even, saturating. Zeros come out positive; NaN stays NaN."""
    x = x.clamp(-fmt.max_value, fmt.max_value)
    shift = _binade(x, fmt) * (1.5 * 2.0 ** (FP32_MANTISSA - fmt.mantissa_bits))
    return x.add_(shift).sub_(shift)  # in place on the clamped copy: fresh pages cost more than the sums


def round_stochastic(x: Tensor, fmt: MiniFloat, random24: Tensor) -> Tensor:
    """x (FP32) to one of its two neighbours in the format: away from zero iff random24 < frac * 2^24. Saturates first.

    random24: FP32 integers 0 .. 2^24-1, shaped like x. All steps but the clamp are exact.
    """
    magnitude = x.abs().clamp_(max=fmt.max_value)
    step = _binade(magnitude, fmt) * 2.0**-fmt.mantissa_bits
    steps = magnitude / step
    low = steps.floor()
    up = random24 < (steps - low) * RANDOM_RANGE
    return torch.copysign((low + up) * step, x)


def round_bf16(x: Tensor) -> Tensor:
    """x (FP32) rounded to BF16 (RNE), kept in FP32. Integer arithmetic: Inductor can't drop it, unlike a cast pair."""
    bits = x.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)


def to_bf16_values(x: Tensor) -> Tensor:
    """`round_bf16` by the fastest way that holds: a pair of casts in eager mode, integer arithmetic when compiling."""
    return round_bf16(x) if torch.compiler.is_compiling() else x.to(torch.bfloat16).to(torch.float32)


def next_power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two at or above x; x positive, normal FP32."""
    return ((x.view(torch.int32) + (2**FP32_MANTISSA - 1)) & EXPONENT_MASK).view(torch.float32)
