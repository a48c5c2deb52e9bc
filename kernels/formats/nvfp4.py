"""Packed operands: 4-bit codes, a scale for each block, one FP32 scale. value = level * block scale * global scale.

NVFP4 itself is E2M1 codes under E4M3 scales: `code * block_scale` has at most 6 significant bits (and magnitude at most
2688), so it is exact in BF16. Other families and scales (grids.py, scales.py) lie in the same container.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.formats.nibbles import pack, pack_twos, unpack, unpack_twos
from kernels.formats.scales import TILE
from kernels.spec import NVFP4_SCALES, NVFP4_SQUARE_SCALES, QuantSpec

NVFP4, NVFP4_SQUARE = (QuantSpec("e2m1", scales) for scales in (NVFP4_SCALES, NVFP4_SQUARE_SCALES))


@dataclass(frozen=True)
class NVFP4Tensor:
    """A packed matrix [R, C]. Not a torch.Tensor: torch operations on it fail loudly.

    codes: uint8 [R, C/2], the even element in the low nibble (grids.py says what a code is; of E2M1 sign, two exponent
    bits, one mantissa bit). block_scales: float8_e4m3fn, [R, C/16] for 1x16 blocks or [R/16, C/16] for 16x16 blocks, or
    what other scales store. global_scale: float32 []. members: uint8 [R, ceil(C/64)] (or R/16), two bits for each
    block, of a family of three or four; in one of two the sign bit of a block's scale says the second. spec: what the
    codes and scales are those of; None is NVFP4, with the blocks that the shapes tell.
    """

    codes: Tensor
    block_scales: Tensor
    global_scale: Tensor
    members: Tensor | None = None
    spec: QuantSpec | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 2

    @property
    def is_square(self) -> bool:
        return self.block_scales.shape[0] != self.codes.shape[0]

    @property
    def tensor_core(self) -> bool:
        """Whether NVFP4 tensor cores can read it: E2M1 codes under E4M3 scales."""
        return self.spec is None

    @property
    def kind(self) -> QuantSpec:
        return self.spec or (NVFP4_SQUARE if self.is_square else NVFP4)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds, for autograd to keep; `holding` is the inverse."""
        parts = self.codes, self.block_scales, self.global_scale
        return parts if self.members is None else (*parts, self.members)

    @classmethod
    def holding(cls, tensors: Sequence[Tensor], spec: QuantSpec | None) -> "NVFP4Tensor":
        return cls(*tensors[:3], tensors[3] if len(tensors) > 3 else None, spec)

    def block_members(self) -> Tensor | None:
        """uint8 [R, C/16] (or [R/16, C/16]): the member of each block; None in a family of one."""
        if len(self.kind.family.members) == 1:
            return None
        if self.members is not None:
            return unpack_twos(self.members, self.block_scales.shape[1])
        return self.block_scales.view(torch.uint8) >> 7

    def levels(self) -> Tensor:
        """float32 [R, C]: the codes' levels, without any scale."""
        codes, members, grids = unpack(self.codes), self.block_members(), self.kind.family.members
        levels = grids[0].decode(codes)
        if members is None:
            return levels
        members = members.repeat_interleave(TILE, dim=1)
        members = members.repeat_interleave(TILE, dim=0) if self.is_square else members
        for number, grid in enumerate(grids[1:], start=1):
            levels = torch.where(members == number, grid.decode(codes), levels)
        return levels

    def values(self) -> Tensor:
        """float32 [R, C], exact in BF16: levels * block_scales, without the global scale."""
        scaling = self.kind.scaling
        scales = scaling.decode(self.block_scales).abs()
        return self.levels() * scales.repeat_interleave(scaling.group, dim=1)

    def transposed(self) -> "NVFP4Tensor":
        """The packed transpose [C, R], with the same codes and scales. ValueError for other than 16x16 blocks."""
        if not self.is_square:
            raise ValueError(
                "only 16x16 blocks can be transposed; 1x16 blocks must be quantized again along the other axis"
            )
        members = None if self.members is None else pack_twos(self.block_members().t())
        codes = pack(unpack(self.codes).t().contiguous())
        return replace(self, codes=codes, block_scales=self.block_scales.t().contiguous(), members=members)

    def dequantize(self) -> Tensor:
        """float32 [R, C] with all scales: (levels * block_scales) * global_scale, one FP32 rounding."""
        return self.values() * self.global_scale


def pack_levels(
    levels: Tensor, elements: Tensor, scales: Tensor, members: Tensor | None, global_scale: Tensor, spec: QuantSpec
) -> NVFP4Tensor:
    """levels, elements (their signs count): FP32 [R, C]. scales: FP32 [R, groups]; members: uint8 [R, groups] or None,
    both repeated over the rows of square blocks."""
    grids = spec.family.members
    codes = grids[0].encode(levels, elements)
    if members is not None:
        wide = members.repeat_interleave(TILE, dim=1)
        for number, grid in enumerate(grids[1:], start=1):
            codes = torch.where(wide == number, grid.encode(levels, elements), codes)
        members = members[:: spec.rows].contiguous()
    stored = spec.scaling.encode(scales)
    if len(grids) == 2:
        stored = (stored.view(torch.uint8) | (members << 7)).view(stored.dtype)
    named = pack_twos(members) if len(grids) > 2 else None
    parts = pack(codes), stored, global_scale
    return NVFP4Tensor(*parts, named, None if spec.tensor_core else spec)
