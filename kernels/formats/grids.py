"""Grids: the sets of levels that the elements of a block may take, and the families that compete for each block.

A grid has at most 16 ascending levels, so that a 4-bit code names one. A family is an ordered tuple of grids, its
members; each block takes the member with the lowest squared error, the earlier on a tie. `top` is the level that the
scales are laid out for: the largest of an ordinary member.

    e2m1        the sign, two exponent bits and one mantissa bit of NVFP4 and MXFP4
    int4        the integers -7 .. 7
    if4         e2m1 or the integers (arXiv 2603.28765; here each has a scale of its own)
    sfp4        e2m1 as it is, shifted up and shifted down by 1/2 (after arXiv 2605.12327; the shift is ours)
    po2_*       a table and its mirror image, po4_* four tables (after arXiv 2605.12327; the levels are ours: fitted on
                N(0,1), or on a mix of N(0,1), Student-t, Laplace and gated activations, to 4 significant bits)
    hif4        sign and three magnitude bits of HiFloat4 (arXiv 2602.11287)
    gridflip    e2m1 as it is and shifted down by 1/4 (CloverLM's weights): 9 significant bits, for the audit only
"""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from kernels.formats.minifloat import E2M1, RANDOM_RANGE, round_nearest, round_stochastic
from kernels.formats.nibbles import decode as decode_e2m1
from kernels.formats.nibbles import encode as encode_e2m1

E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LEVELS = (15, 16)  # of a table: fewer would waste codes, more have none
MEMBERS = 4  # two bits name a block's member


@dataclass(frozen=True)
class Grid:
    """Ascending levels. Subclasses round FP32 tensors to them and name each level by a 4-bit code."""

    levels: tuple[float, ...]

    @property
    def up(self) -> float:
        """The largest level."""
        return self.levels[-1]

    @property
    def down(self) -> float:
        """The magnitude of the lowest level."""
        return -self.levels[0]

    @property
    def has_zero(self) -> bool:
        return 0.0 in self.levels

    def nearest(self, x: Tensor) -> Tensor:
        """x (FP32) to the nearest level, beyond the ends to the end."""
        raise NotImplementedError

    def stochastic(self, x: Tensor, random24: Tensor) -> Tensor:
        """x (FP32) to a level beside it, by a number 0 .. 2^24-1: unbiased between the ends."""
        raise NotImplementedError

    def encode(self, q: Tensor, x: Tensor) -> Tensor:
        """uint8 codes 0 .. 15 of levels q; x, what was rounded, gives a zero its sign where a code has one."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """FP32 levels of uint8 codes."""
        raise NotImplementedError


@dataclass(frozen=True)
class Float4(Grid):
    """E2M1, every level moved by `shift`: nearest, ties to the even code; the code is that of level - shift."""

    levels: tuple[float, ...] = field(init=False)
    shift: float = 0.0

    def __post_init__(self):
        levels = sorted({sign * level + self.shift for level in E2M1_LEVELS for sign in (-1.0, 1.0)})
        object.__setattr__(self, "levels", tuple(levels))

    def nearest(self, x: Tensor) -> Tensor:
        return round_nearest(x - self.shift, E2M1) + self.shift if self.shift else round_nearest(x, E2M1)

    def stochastic(self, x: Tensor, random24: Tensor) -> Tensor:
        if not self.shift:
            return round_stochastic(x, E2M1, random24)
        return round_stochastic(x - self.shift, E2M1, random24) + self.shift

    def encode(self, q: Tensor, x: Tensor) -> Tensor:
        """The sign bit is kept on what rounds to zero, as the hardware conversion does: code 8 is minus zero."""
        q, x = (q - self.shift, x - self.shift) if self.shift else (q, x)
        return encode_e2m1(q, x.signbit())

    def decode(self, codes: Tensor) -> Tensor:
        level = decode_e2m1(codes)
        return level + self.shift if self.shift else level


@dataclass(frozen=True)
class Integers(Grid):
    """-7 .. 7: nearest, ties to even; the code is level + 8."""

    levels: tuple[float, ...] = tuple(float(k) for k in range(-7, 8))

    def nearest(self, x: Tensor) -> Tensor:
        return x.clamp(self.levels[0], self.levels[-1]).round() + 0.0  # + 0: no minus zero

    def stochastic(self, x: Tensor, random24: Tensor) -> Tensor:
        magnitude = x.abs().clamp_(max=self.up)
        low = magnitude.floor()
        return torch.copysign(low + (random24 < (magnitude - low) * RANDOM_RANGE), x)

    def encode(self, q: Tensor, x: Tensor) -> Tensor:
        return (q + 8).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32) - 8


@dataclass(frozen=True)
class Quarters(Grid):
    """HiFloat4's S1P2, 0 .. 1.75 by 1/4 and their negatives: nearest, ties away from zero; a sign bit and 4 |level|."""

    levels: tuple[float, ...] = tuple(k / 4 for k in range(-7, 8))

    def nearest(self, x: Tensor) -> Tensor:
        return torch.copysign((x.abs() * 4 + 0.5).floor().clamp_(max=7) / 4, x)

    def encode(self, q: Tensor, x: Tensor) -> Tensor:
        return (q.abs() * 4).to(torch.uint8) | (x.signbit().to(torch.uint8) << 3)

    def decode(self, codes: Tensor) -> Tensor:
        magnitude = (codes & 7).to(torch.float32) / 4
        return torch.where(codes >= 8, -magnitude, magnitude)


@dataclass(frozen=True)
class Table(Grid):
    """Any levels: nearest, a tie to the smaller magnitude, so that a mirrored table rounds mirrored; the code counts
    levels from the lowest.

    Levels enter as scalars, one comparison each: a tensor of them would be copied to the device at every call, which a
    CUDA graph can't hold, and Inductor fuses comparisons."""

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Midpoints of neighbours."""
        return tuple((low + high) / 2 for low, high in pairwise(self.levels))

    def nearest(self, x: Tensor) -> Tensor:
        q = torch.full_like(x, self.levels[0])
        for threshold, level in zip(self.thresholds, self.levels[1:], strict=True):
            q = torch.where(x >= threshold if threshold < 0 else x > threshold, level, q)
        return q

    def stochastic(self, x: Tensor, random24: Tensor) -> Tensor:
        x = x.clamp(self.levels[0], self.levels[-1])
        below, above = torch.full_like(x, self.levels[0]), torch.full_like(x, self.levels[1])
        for low, high in pairwise(self.levels[1:]):
            below, above = torch.where(x >= low, low, below), torch.where(x >= low, high, above)
        return torch.where(random24 < (x - below) / (above - below) * RANDOM_RANGE, above, below)

    def encode(self, q: Tensor, x: Tensor) -> Tensor:
        codes = torch.zeros_like(q, dtype=torch.uint8)
        for level in self.levels[:-1]:
            codes += q > level
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        q = torch.full_like(codes, self.levels[0], dtype=torch.float32)
        for code, level in enumerate(self.levels[1:], start=1):
            q = torch.where(codes == code, level, q)
        return q


@dataclass(frozen=True)
class Family:
    """Grids that compete for each block. sees_sides: a shifted member's scale fits the largest and the lowest element
    each to its own end; without it the larger magnitude to the larger end (gridflip, as published)."""

    name: str
    members: tuple[Grid, ...]
    top: float
    sees_sides: bool = True

    @property
    def zero_member(self) -> int:
        """The member of a block that is all zero, or whose scale vanished: the first that has a zero and no shift."""
        zeros = [i for i, grid in enumerate(self.members) if grid.has_zero]
        return next(i for i in zeros if self.members[i] == FLOAT4 or not isinstance(self.members[i], Float4))

    @property
    def is_shifted(self) -> bool:
        return any(grid.shift for grid in self.members if isinstance(grid, Float4))

    @property
    def floats(self) -> tuple[int, ...]:
        """Members that are E2M1, shifted or not: those that Four-over-Six can fit to 4."""
        return tuple(i for i, grid in enumerate(self.members) if isinstance(grid, Float4))


def mirrored(levels: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(-level + 0.0 for level in reversed(levels))


def _tables(name: str, *rows: str, mirror: bool = False) -> Family:
    tables = [tuple(map(float, row.split())) for row in rows]
    return tables_of(name, tables + [mirrored(tables[0])] * mirror)


def tables_of(name: str, tables: list[tuple[float, ...]]) -> Family:
    """A family of tables; its top is the largest level of all."""
    return Family(name, tuple(map(Table, tables)), max(max(t[-1], -t[0]) for t in tables))


FLOAT4, INTEGERS = Float4(), Integers()
E2M1_FAMILY = Family("e2m1", (FLOAT4,), 6.0)
FAMILIES = {
    family.name: family
    for family in (
        E2M1_FAMILY,
        Family("int4", (INTEGERS,), 7.0),
        Family("if4", (FLOAT4, INTEGERS), 6.0),
        Family("sfp4", (FLOAT4, Float4(0.5), Float4(-0.5)), 6.0),
        _tables("po2_gauss", "-120 -88 -72 -56 -40 -26 -13 0 10 20 32 48 64 80 104 120", mirror=True),
        _tables("po2_mix", "-120 -88 -64 -44 -30 -18 -8 0 6 14 24 36 52 72 96 120", mirror=True),
        _tables(
            "po4_gauss",
            "-120 -96 -72 -56 -40 -28 -15 -3 8 18 30 44 56 72 96 120",
            "-120 -88 -72 -56 -44 -32 -20 -8 3 14 26 40 52 64 88 120",
            "-120 -104 -80 -64 -48 -32 -18 -6 6 20 36 48 64 80 104 120",
            "-120 -80 -64 -48 -36 -24 -12 0 11 22 32 44 60 80 96 120",
        ),
        _tables(
            "po4_mix",
            "-120 -88 -60 -44 -30 -18 -10 -2 4 12 22 32 44 64 88 120",
            "-120 -96 -72 -52 -36 -24 -13 -5 2 9 18 28 40 56 80 120",
            "-120 -104 -80 -64 -48 -32 -20 -7 5 18 32 48 64 80 104 120",
            "-120 -72 -56 -40 -26 -16 -7 0 7 15 24 36 52 72 96 120",
        ),
        Family("hif4", (Quarters(),), 1.75),
        Family("gridflip", (FLOAT4, Float4(-0.25)), 6.0, sees_sides=False),
    )
}


def family_of(grid: str | tuple[tuple[float, ...], ...]) -> Family:
    """The family of a name, or of tables given as numbers. ValueError for a name that isn't one, and for tables that
    can't be used."""
    if isinstance(grid, str):
        if grid not in FAMILIES:
            raise ValueError(f"grid={grid!r} is unknown; use one of {', '.join(FAMILIES)}, or give its levels")
        return FAMILIES[grid]
    check_tables(grid)
    return tables_of("tables", list(grid))


def check_tables(tables: tuple[tuple[float, ...], ...]) -> None:
    if not 1 <= len(tables) <= MEMBERS:
        raise ValueError(f"grid: {len(tables)} tables; give 1 to {MEMBERS}, each a list of {LEVELS[-1]} numbers")
    for table in tables:
        rising = all(low < high for low, high in pairwise(table))
        if len(table) not in LEVELS or not rising or not table[0] < 0 < table[-1]:
            raise ValueError(
                f"grid: a table needs {' or '.join(map(str, LEVELS))} rising numbers, some below and some above 0; "
                f"got {len(table)}: {', '.join(f'{level:g}' for level in table)}"
            )
    if not any(0.0 in table for table in tables):
        raise ValueError("grid: no table has a 0, so an empty block could not be stored; put a 0 into one of them")


def significant_bits(levels: tuple[float, ...], significands: range) -> int:
    """The most significant bits that a product level * significand has, over all pairs."""
    most = 0
    for level in {abs(level) for level in levels}:
        numerator, _ = level.as_integer_ratio()
        for significand in significands:
            product = numerator * significand
            most = max(most, product.bit_length() - ((product & -product).bit_length() - 1) if product else 0)
    return most
