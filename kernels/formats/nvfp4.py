"""NVFP4: E2M1 codes, E4M3 block scales, one FP32 global scale. value = code * block_scale * global_scale.

`code * block_scale` has at most 6 significant bits (and magnitude at most 2688), so it is exact in BF16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.spec import NVFP4_BLOCK


@dataclass(frozen=True)
class NVFP4Tensor:
    """A packed matrix [R, C]. Not a torch.Tensor: torch operations on it fail loudly.

    codes: uint8 [R, C/2], the even element in the low nibble; sign, two exponent bits, one mantissa bit.
    block_scales: float8_e4m3fn, [R, C/16] for 1x16 blocks or [R/16, C/16] for 16x16 blocks. global_scale: float32 [].
    """

    codes: Tensor
    block_scales: Tensor
    global_scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 2

    @property
    def is_square(self) -> bool:
        return self.block_scales.shape[0] != self.codes.shape[0]

    def values(self) -> Tensor:
        """float32 [R, C], exact in BF16: codes * block_scales, without the global scale."""
        scales = self.block_scales.to(torch.float32).repeat_interleave(NVFP4_BLOCK, dim=1)
        if self.is_square:
            scales = scales.repeat_interleave(NVFP4_BLOCK, dim=0)
        return decode(unpack(self.codes)) * scales

    def transposed(self) -> "NVFP4Tensor":
        """The packed transpose [C, R], with the same codes and scales. ValueError for other than 16x16 blocks."""
        if not self.is_square:
            raise ValueError(
                "only 16x16 blocks can be transposed; 1x16 blocks must be quantized again along the other axis"
            )
        codes = pack(unpack(self.codes).t().contiguous())
        return NVFP4Tensor(codes, self.block_scales.t().contiguous(), self.global_scale)

    def dequantize(self) -> Tensor:
        """float32 [R, C] with all scales: (codes * block_scales) * global_scale, one FP32 rounding."""
        return self.values() * self.global_scale


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
