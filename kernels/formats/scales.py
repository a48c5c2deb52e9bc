"""Scales of blocks: how a block's scale is wanted, rounded, and stored. One class for each way; `Scaling` says what.

`groups` are FP32 [rows, groups, n], n elements under one scale; scales are FP32 [rows, groups, 1], for 16x16 tiles
repeated over the 16 rows of a tile. A scale of 0 means that the block vanished ("dead").
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.formats.minifloat import E4M3, E6M2, FP32_BIAS, FP32_MANTISSA, UE5M3, round_bf16, round_nearest

TILE = 16  # rows of a square block
SEVENTH = 0.142578125  # 1/7 in BF16
QUEST_REACH = 2.92247856  # root mean squares that fit a block's levels: the least error of E2M1 on N(0,1)
ROOT_OF_TWO = 0x3504F4  # the least FP32 mantissa beyond sqrt(2): from there a logarithm rounds up
MANTISSA_MASK = (1 << FP32_MANTISSA) - 1


@dataclass(frozen=True)
class Extent:
    """What a block spans: its largest magnitude and, where a grid isn't symmetric, how far it reaches up and down."""

    largest: Tensor
    up: Tensor | None = None
    down: Tensor | None = None

    def over(self, up: float, down: float, T: Tensor) -> Tensor:
        """The scale, in units of T, under which the block fits levels from -down to up."""
        if up == down:
            return self.largest / (up * T)
        return torch.maximum(self.up / (up * T), self.down / (down * T))


@dataclass(frozen=True)
class Scaling:
    """group: elements along the contraction under one scale. multiple: what must divide the contraction. rows: of a
    block. bits: of all scales, a value. has_tensor_scale: an FP32 number for the tensor lies over the blocks' scales.
    significands: the integers that a scale's significand can be. corrected: MS-EDEN's growing scale can be stored.
    is_narrow: the largest scale is one that an operand's codes, taken without their outer scale, can ask for."""

    group: int = 16
    multiple: int = 16
    rows: int = 1
    bits: float = 0.5
    has_tensor_scale: bool = False
    corrected: bool = False
    significands: range = range(1, 2)
    is_narrow: bool = False

    def extent(self, groups: Tensor, sides: bool) -> Extent:
        """sides: the grid isn't symmetric, so both reaches are wanted."""
        parts = [groups.abs().amax(dim=-1, keepdim=True)]
        if sides:
            parts += [groups.amax(dim=-1, keepdim=True).clamp(min=0), (-groups.amin(dim=-1, keepdim=True)).clamp(min=0)]
        return Extent(*map(self.over_block, parts))

    def over_block(self, per_row: Tensor) -> Tensor:
        """The maximum of [rows, groups, n] over the rows of each block, repeated over them."""
        return per_row if self.rows == 1 else over_tile(per_row, lambda tiles: tiles.amax(dim=1, keepdim=True))

    def wanted(self, extent: Extent, up: float, down: float, T: Tensor) -> Tensor:
        """What `round` rounds."""
        return extent.over(up, down, T)

    def round(self, wanted: Tensor) -> Tensor:
        raise NotImplementedError

    def elements(self, groups: Tensor, scales: Tensor) -> Tensor:
        """The elements in units of their scales; an infinite scale gives zeros and keeps signs."""
        return groups / scales

    def stored(self, contraction: int) -> tuple[int, ...]:
        """The shape, for one row of blocks, of what `encode` gives."""
        return (contraction // self.group,)

    def encode(self, scales: Tensor) -> Tensor:
        """The stored form of scales [rows, groups]."""
        raise NotImplementedError

    def decode(self, stored: Tensor) -> Tensor:
        """FP32 [rows, groups]; the inverse of `encode`, rows of tiles repeated."""
        raise NotImplementedError


def over_tile(per_row: Tensor, reduce) -> Tensor:
    """Reduce [rows, groups, n] over each 16 rows and repeat the result over them."""
    tiles = per_row.view(per_row.shape[0] // TILE, TILE, -1)
    return reduce(tiles).expand(tiles.shape).reshape(per_row.shape)


def fold(x: Tensor, dim: int) -> Tensor:
    """Sum over `dim`, a power of two kept as size 1, by adding its upper half to its lower half until one is left.

    An order that every back end repeats: errors of candidates are often equal, and then last bits would decide.
    """
    while x.shape[dim] > 1:
        low, high = x.chunk(2, dim=dim)
        x = low + high
    return x


def stored_rows(scales: Tensor, rows: int) -> Tensor:
    return scales[::rows].contiguous() if rows > 1 else scales


@dataclass(frozen=True)
class E4M3Blocks(Scaling):
    """NVFP4's: E4M3 for 16 elements, or for 16x16, under one FP32 scale of the tensor."""

    has_tensor_scale: bool = True
    corrected: bool = True
    significands: range = range(8, 16)

    def round(self, wanted: Tensor) -> Tensor:
        return round_nearest(wanted, E4M3)

    def encode(self, scales: Tensor) -> Tensor:
        return stored_rows(scales.to(torch.float8_e4m3fn), self.rows)

    def decode(self, stored: Tensor) -> Tensor:
        scales = stored.to(torch.float32)
        return scales.repeat_interleave(self.rows, dim=0) if self.rows > 1 else scales


@dataclass(frozen=True)
class UE5M3Blocks(Scaling):
    """Unsigned E5M3 for 16 elements (arXiv 2509.17791): a byte holds 5 exponent and 3 mantissa bits, so that the scale
    of the tensor may be left out."""

    significands: range = range(8, 16)

    def round(self, wanted: Tensor) -> Tensor:
        return round_nearest(wanted, UE5M3)

    def encode(self, scales: Tensor) -> Tensor:
        """A byte's exponent field is 1 for the smallest normal numbers; below it counts multiples of 2^-17."""
        normal = to_bytes(scales, 3, 1 - UE5M3.min_exponent)
        return torch.where(scales < 2.0**UE5M3.min_exponent, scales * 2.0**17, normal).to(torch.uint8)

    def decode(self, stored: Tensor) -> Tensor:
        codes = stored.to(torch.int32)
        return torch.where(codes < 8, codes * 2.0**-17, from_bytes(codes, 3, 1 - UE5M3.min_exponent))


@dataclass(frozen=True)
class PowersOfTwo(Scaling):
    """MXFP4's: E8M0 for 32 elements and nothing above. With amax = m * 2^E, 1 <= m < 2, the exponent is E - 2, and
    more by 1 where
        floor   never (OCP MX)
        even    m >= 1.75
        ceil    m > 1.5: the least with amax <= 6 * 2^e, so nothing clips
        rms     none of these: the power of two nearest to 2.92247856/6 of the root mean square, by their logarithms. It
                clips beyond some three standard deviations on purpose (QuEST, arXiv 2502.05003; Quartet, 2505.14669)
    macro_bits: elements of 128 are first divided by their largest magnitude's significand over 6, rounded up to that
    many fractional bits (arXiv 2603.08713); then a block's scale is that number times a power of two.
    """

    group: int = 32
    multiple: int = 32
    bits: float = 8 / 32
    rule: str = "floor"
    macro_bits: int | None = None

    def extent(self, groups: Tensor, sides: bool) -> Extent:
        if self.rule != "rms":
            return super().extent(groups, sides)
        energy = fold(groups.square(), -1)  # an empty or too small block has none, as its amax would be 0
        return Extent(QUEST_REACH * torch.sqrt(energy / torch.full_like(energy, float(self.group))))

    def wanted(self, extent: Extent, up: float, down: float, T: Tensor) -> Tensor:
        return extent.largest

    def round(self, wanted: Tensor) -> Tensor:
        if self.rule == "rms":
            return self._powers(wanted / torch.full_like(wanted, 6.0))
        if self.macro_bits is None:
            return self._powers(wanted)
        macro = self._macro(wanted)
        return self._powers(wanted / macro) * macro

    def _powers(self, largest: Tensor) -> Tensor:
        bits = largest.contiguous().view(torch.int32)
        mantissa = bits & MANTISSA_MASK
        limits = {"floor": 1 << FP32_MANTISSA, "even": 0x600000, "ceil": 0x400001, "rms": ROOT_OF_TWO}
        more = mantissa >= limits[self.rule]
        less = FP32_BIAS if self.rule == "rms" else FP32_BIAS + 2  # an amax lies at 4 to 8 scales, a wanted scale at 1
        exponent = ((bits >> FP32_MANTISSA) - less + more.to(torch.int32)).clamp(-126, 127)
        powers = ((exponent + FP32_BIAS) << FP32_MANTISSA).view(torch.float32)
        return torch.where(largest > 0, powers, 0.0)

    def _macro(self, wanted: Tensor) -> Tensor:
        """[rows, groups, 1]: the factor in [1, 2) of each four blocks."""
        fours = wanted.view(wanted.shape[0], -1, 4)
        largest = fours.amax(dim=-1, keepdim=True)
        step = 1 << (FP32_MANTISSA - self.macro_bits)
        # A tensor as divisor: on CUDA torch multiplies by the reciprocal where the divisor is a Python number.
        mantissa = (largest / torch.full_like(largest, 6.0)).view(torch.int32) & MANTISSA_MASK
        mantissa = (mantissa + (step - 1)) & -step
        factor = ((mantissa & MANTISSA_MASK) | (FP32_BIAS << FP32_MANTISSA)).view(torch.float32)
        factor = torch.where(largest >= 2.0**-120, factor, 1.0)  # below, the quotient has no leading bit to rely on
        return factor.expand(fours.shape).reshape(wanted.shape)

    def stored(self, contraction: int) -> tuple[int, ...]:
        return super().stored(contraction) if self.macro_bits is None else (contraction // 128, 5)

    def encode(self, scales: Tensor) -> Tensor:
        """Exponents + 127, [rows, C/32]; with macro blocks four of them and the factor's fraction for each 128."""
        bits = scales.contiguous().view(torch.int32)
        exponents = (bits >> FP32_MANTISSA).to(torch.uint8)
        if self.macro_bits is None:
            return exponents
        fraction = (bits & MANTISSA_MASK) >> (FP32_MANTISSA - self.macro_bits)
        factor = fraction.view(bits.shape[0], -1, 4).amax(dim=-1, keepdim=True)  # an empty block has scale 1
        return torch.cat((exponents.view(*factor.shape[:2], 4), factor.to(torch.uint8)), dim=-1)

    def decode(self, stored: Tensor) -> Tensor:
        if self.macro_bits is None:
            return (stored.to(torch.int32) << FP32_MANTISSA).view(torch.float32)
        stored = stored.to(torch.int32)
        exponents = stored[..., :4] << FP32_MANTISSA
        scales = (exponents | (stored[..., 4:] << (FP32_MANTISSA - self.macro_bits))).view(torch.float32)
        return scales.reshape(stored.shape[0], -1)


@dataclass(frozen=True)
class HiFloat4(Scaling):
    """E6M2 for 64 elements, one bit more for each 8 and one for each 4 (arXiv 2602.11287): scale = s 2^(e8 + e4)."""

    group: int = 4
    multiple: int = 64
    significands: range = range(4, 8)
    is_narrow: bool = True

    def wanted(self, extent: Extent, up: float, down: float, T: Tensor) -> Tensor:
        return extent.largest

    def round(self, wanted: Tensor) -> Tensor:
        fours = wanted.view(wanted.shape[0], -1, 16)
        eights = fours.unflatten(-1, (8, 2)).amax(dim=-1)
        s = round_bf16(eights.amax(dim=-1, keepdim=True) * SEVENTH)
        s = round_nearest(s.clamp(2.0**E6M2.min_exponent, E6M2.max_value), E6M2)
        reciprocal = bf16_reciprocal(s)
        by8 = torch.where(eights * reciprocal >= 4, 2.0, 1.0).repeat_interleave(2, dim=-1)
        by4 = torch.where(fours * reciprocal / by8 >= 2, 2.0, 1.0)
        return (s * by8 * by4).view(wanted.shape)

    def elements(self, groups: Tensor, scales: Tensor) -> Tensor:
        return groups * bf16_reciprocal(scales)

    def stored(self, contraction: int) -> tuple[int, ...]:
        return contraction // self.multiple, 4

    def encode(self, scales: Tensor) -> Tensor:
        """uint8 [rows, C/64, 4]: E6M2; a bit for each 8, the first lowest; bits for each 4, low byte and high byte.

        s is a quarter of the largest scale: its block carries both bits, unless s is the format's smallest."""
        fours = scales.reshape(scales.shape[0], -1, 16)
        s = (fours.amax(dim=-1, keepdim=True) / 4).clamp(min=2.0**E6M2.min_exponent)
        ratio = fours / s
        by8 = ratio.unflatten(-1, (8, 2)).amax(dim=-1) == 4
        by4 = ratio > 1 + by8.repeat_interleave(2, dim=-1).to(torch.float32)
        bits = torch.cat((by8, by4), dim=-1).unflatten(-1, (3, 8)).to(torch.int32)
        return torch.cat((to_bytes(s, 2, -E6M2.min_exponent), (bits << bit_numbers(s)).sum(dim=-1)), -1).to(torch.uint8)

    def decode(self, stored: Tensor) -> Tensor:
        s = from_bytes(stored[..., :1].to(torch.int32), 2, -E6M2.min_exponent)
        bits = (stored[..., 1:, None].to(torch.int32) >> bit_numbers(stored)) & 1
        exponents = bits[..., 0, :].repeat_interleave(2, dim=-1) + bits[..., 1:, :].flatten(-2)
        return (s * torch.exp2(exponents.to(torch.float32))).reshape(stored.shape[0], -1)


def bit_numbers(like: Tensor) -> Tensor:
    return torch.arange(8, device=like.device, dtype=torch.int32)


def bf16_reciprocal(x: Tensor) -> Tensor:
    return round_bf16(1.0 / x)


def to_bytes(scales: Tensor, mantissa_bits: int, bias: int) -> Tensor:
    """int32 codes of positive FP32 numbers that have mantissa_bits: exponent + bias above, mantissa below."""
    shift = FP32_MANTISSA - mantissa_bits
    return (scales.contiguous().view(torch.int32) >> shift) - ((FP32_BIAS - bias) << mantissa_bits)


def from_bytes(codes: Tensor, mantissa_bits: int, bias: int) -> Tensor:
    """The inverse of `to_bytes`."""
    shift = FP32_MANTISSA - mantissa_bits
    return ((codes + ((FP32_BIAS - bias) << mantissa_bits)) << shift).view(torch.float32)
