"""4-bit codes: those of E2M1, and two of any kind in a byte; two bits for each block, four in a byte."""

import torch
import torch.nn.functional as F
from torch import Tensor


def encode(values: Tensor, sign: Tensor) -> Tensor:
    """uint8 E2M1 codes 0 .. 15. values: FP32 on the E2M1 grid; sign: bool, True for a set sign bit (also on a zero).

    The sign bit is kept on values that round to zero, as the hardware conversion does: code 8 is minus zero.
    """
    halves = (values.abs() * 2).to(torch.uint8)  # 0 1 2 3 4 6 8 12 -> codes 0 .. 7
    magnitude = halves.clamp(max=4) + (halves >= 6) + (halves >= 8) + (halves >= 12)
    return magnitude.to(torch.uint8) | (sign.to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """FP32 values of E2M1 codes (uint8 0 .. 15): 0 .5 1 1.5 2 3 4 6 and their negatives."""
    index = (codes & 7).to(torch.float32)
    magnitude = index * 0.5 + (index - 4).clamp_(min=0) * 0.5 + (index - 6).clamp_(min=0)
    return torch.where(codes >= 8, -magnitude, magnitude)


def pack(codes: Tensor) -> Tensor:
    """uint8 [R, C] codes -> uint8 [R, C/2], the even element in the low nibble. C must be even."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """uint8 [R, C/2] -> uint8 [R, C] codes."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).reshape(packed.shape[0], -1)


def pack_twos(numbers: Tensor) -> Tensor:
    """uint8 [R, n] numbers 0 .. 3 -> uint8 [R, ceil(n/4)], the first in the lowest bits."""
    fours = F.pad(numbers, (0, -numbers.shape[1] % 4)).unflatten(1, (-1, 4))
    return fours[..., 0] | (fours[..., 1] << 2) | (fours[..., 2] << 4) | (fours[..., 3] << 6)


def unpack_twos(packed: Tensor, count: int) -> Tensor:
    """uint8 [R, ceil(n/4)] -> uint8 [R, n], n = count."""
    parts = [(packed >> shift) & 3 for shift in (0, 2, 4, 6)]
    return torch.stack(parts, dim=-1).reshape(packed.shape[0], -1)[:, :count]
