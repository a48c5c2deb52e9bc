"""Grids and scales of the block formats in Triton: the twin of kernels/formats.

A `Form` says all that a kernel must know of a format when it is compiled. Its numbers stand in it, not
names: Triton's cache of compiled kernels then sees a change of a table.
"""

import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.formats.grids import Float4, Grid, Integers, Quarters, Table
from kernels.formats.scales import (
    QUEST_REACH,
    ROOT_OF_TWO,
    SEVENTH,
    E4M3Blocks,
    HiFloat4,
    PowersOfTwo,
    UE5M3Blocks,
)
from kernels.formats.selects import Candidate
from kernels.spec import QuantSpec
from kernels.triton_common import (
    RANDOM_RANGE,
    binade,
    e2m1_code,
    e4m3_value,
    fma_up,
    round_e2m1,
    round_e4m3,
    stochastic_e2m1,
)

KINDS = {Float4: "float", Integers: "integers", Quarters: "quarters"}
SCALES = {E4M3Blocks: "e4m3", UE5M3Blocks: "ue5m3", PowersOfTwo: "e8m0", HiFloat4: "hif4"}
MAGIC = tl.constexpr(1.5 * 2.0**23)  # adding and subtracting it rounds to an integer, ties to even
MANTISSA = tl.constexpr(0x7FFFFF)
CODE_BITS = tl.constexpr(15)  # of a level's FP32, which is exact in BF16, its code can lie below
UE5M3_SHIFT = tl.constexpr(1.5 * 2.0**20)
BF16_SEVENTH = tl.constexpr(SEVENTH)
REACH = tl.constexpr(QUEST_REACH)
UPPER_HALF = tl.constexpr(ROOT_OF_TWO)


@dataclass(frozen=True)
class Levels:
    """One member: float, integers, quarters or table; how far a float is shifted, a table's levels, their FP32 as
    int32, and the thresholds between them."""

    kind: str
    shift: float = 0.0
    levels: tuple[float, ...] = ()
    bits: tuple[int, ...] = ()
    thresholds: tuple[float, ...] = ()

    @classmethod
    def of(cls, grid: Grid) -> "Levels":
        if not isinstance(grid, Table):
            return cls(KINDS[type(grid)], getattr(grid, "shift", 0.0))
        bits = tuple(struct.unpack("<i", struct.pack("<f", level))[0] for level in grid.levels)
        return cls("table", 0.0, grid.levels, bits, grid.thresholds)


@dataclass(frozen=True)
class Form:
    """scales: e4m3, ue5m3, e8m0 or hif4, of `group` elements. members: of the family. candidates: in the order in which
    they win ties, their ends as the levels that the extent is scaled to. zero_member: whose 0, `empty` as `nearest`
    gives it, an empty block has. rule, macro_bits, prescale: MXFP4's.
    looked_up: tables of integers under one scale, so that an entry of `lookup` tells the nearest level of each."""

    scales: str
    group: int
    members: tuple[Levels, ...]
    candidates: tuple[Candidate, ...]
    zero_member: int
    empty: float
    empty_code: int
    rule: str
    macro_bits: int | None
    prescale: float
    looked_up: bool

    @classmethod
    def of(cls, spec: QuantSpec) -> "Form":
        family, unit = spec.family, spec.target_max
        fitted = tuple(
            Candidate(c.member, unit * (c.up / family.top), unit * (c.down / family.top), c.stretch, c.step)
            for c in spec.candidates
        )
        members = tuple(map(Levels.of, family.members))
        zero = members[family.zero_member]
        code = zero.levels.index(0.0) if zero.kind == "table" else 0
        empty = struct.unpack("<f", struct.pack("<i", code))[0]
        mxfp4 = spec.scale_rule, spec.macro_bits, spec.prescale
        scaling = spec.scaling
        whole = all(member.kind == "table" and fits_a_byte(member.levels) for member in members)
        looked_up = whole and len({(c.up, c.down) for c in fitted}) == 1 and spec.rounding != "sr"
        scale = SCALES[type(scaling)], scaling.group
        return cls(*scale, members, fitted, family.zero_member, empty, code, *mxfp4, looked_up)


def fits_a_byte(levels: tuple[float, ...]) -> bool:
    return all(level == int(level) and abs(level) < 128 for level in levels)


def lookup(grids: tuple[Grid, ...]) -> torch.Tensor:
    """[2, 512] int16 (int32 for three or four grids): of element u the nearest level + 128 of each
    grid, a byte each, and its codes, four bits each. Thresholds are multiples of 1/2 and a tie goes to
    the smaller magnitude, so the entry is ceil(2 |u|), at most 255, plus 256 for a negative u."""
    steps = torch.arange(256, dtype=torch.float32) / 2
    inside = (steps - 0.25).clamp(min=0.0)
    x = torch.cat((inside, -inside))
    levels = sum((grid.nearest(x).to(torch.int32) + 128) << (8 * i) for i, grid in enumerate(grids))
    codes = sum(grid.encode(grid.nearest(x), x).to(torch.int32) << (4 * i) for i, grid in enumerate(grids))
    both = torch.stack((levels, codes))
    return both if len(grids) > 2 else both.to(torch.int16)


@triton.constexpr_function
def of(form, name):
    """A field of a Form."""
    return getattr(form, name)


@triton.constexpr_function
def prescale_of(form):
    """Also of no Form."""
    return 1.0 if form is None else form.prescale


@triton.constexpr_function
def members_of(form):
    return len(form.members)


@triton.constexpr_function
def candidates_of(form):
    return len(form.candidates)


@triton.constexpr_function
def candidate_of(form, number, name):
    """A field of a candidate, or the shift of its member."""
    candidate = form.candidates[number]
    return form.members[candidate.member].shift if name == "shift" else getattr(candidate, name)


@triton.constexpr_function
def has_steps(form):
    return any([c.step != 0 for c in form.candidates])


@triton.constexpr_function
def is_looped(form):
    """Whether candidates run in a loop: many, and all round to E2M1."""
    return len(form.candidates) > 3 and all([member.kind == "float" for member in form.members])


@triton.constexpr_function
def has_sides(form):
    """Whether a candidate's ends differ, so that a block's two reaches are wanted."""
    return any([c.up != c.down for c in form.candidates])


@triton.constexpr_function
def has_shifts(form):
    return any([member.shift != 0.0 for member in form.members])


@triton.constexpr_function
def has_tables(form):
    return form.members[0].kind == "table"


@triton.constexpr_function
def kind_of(form, member):
    return form.members[member].kind


@triton.constexpr_function
def shift_of(form, member):
    return form.members[member].shift


@triton.constexpr_function
def size_of(form, member):
    return len(form.members[member].levels)


@triton.constexpr_function
def level_of(form, member, code):
    return form.members[member].levels[code]


@triton.constexpr_function
def bits_of(form, member, code, tagged):
    """A level as the int32 of its FP32; tagged: with its code in the lowest bits."""
    bits = form.members[member].bits[code]
    return bits | code if tagged else bits


@triton.constexpr_function
def threshold_of(form, member, number):
    return form.members[member].thresholds[number]


# --- grids ----------------------------------------------------------------------------------------


@triton.jit
def _beyond(x, THRESHOLD: tl.constexpr):
    """A tie goes to the smaller magnitude."""
    return x >= THRESHOLD if THRESHOLD < 0 else x > THRESHOLD


@triton.jit
def _nearest_in_table(x, FORM: tl.constexpr, MEMBER: tl.constexpr, TAGGED: tl.constexpr):
    bits = tl.full(x.shape, bits_of(FORM, MEMBER, 0, TAGGED), tl.int32)
    for i in tl.static_range(1, size_of(FORM, MEMBER)):
        beyond = _beyond(x, threshold_of(FORM, MEMBER, i - 1))
        bits = tl.where(beyond, bits_of(FORM, MEMBER, i, TAGGED), bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _signed(magnitude, x):
    """copysign of a positive magnitude."""
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def nearest(x, FORM: tl.constexpr, MEMBER: tl.constexpr, TAGGED: tl.constexpr):
    """Grid.nearest of a member; TAGGED: levels of a table carry their codes (`untagged`)."""
    if kind_of(FORM, MEMBER) == "float":
        if shift_of(FORM, MEMBER) == 0.0:
            return round_e2m1(x)
        else:
            return round_e2m1(x - shift_of(FORM, MEMBER)) + shift_of(FORM, MEMBER)
    elif kind_of(FORM, MEMBER) == "integers":
        return tl.minimum(tl.maximum(x, -7.0), 7.0) + MAGIC - MAGIC
    elif kind_of(FORM, MEMBER) == "quarters":
        return _signed(tl.minimum(tl.floor(tl.abs(x) * 4.0 + 0.5), 7.0) * 0.25, x)
    else:
        return _nearest_in_table(x, FORM, MEMBER, TAGGED)


@triton.jit
def untagged(q, FORM: tl.constexpr, TAGGED: tl.constexpr):
    """Levels without their codes."""
    if TAGGED and has_tables(FORM):
        return (q.to(tl.int32, bitcast=True) & -16).to(tl.float32, bitcast=True)
    else:
        return q


@triton.jit
def _stochastic_integers(x, random24, INTERPRET: tl.constexpr):
    """|x| - random24 * 2^-24 rounded up (stochastic_e2m1 says why that is the rule)."""
    magnitude = tl.minimum(tl.abs(x), 7.0)
    if INTERPRET:
        low = tl.floor(magnitude)
        rounded = tl.where(random24 < (magnitude - low) * RANDOM_RANGE, low + 1.0, low)
    else:
        unit = tl.full(x.shape, 1.0, tl.float32)
        rounded = fma_up(unit, MAGIC, fma_up(random24, unit * -(2.0**-24), magnitude)) - MAGIC
    return _signed(tl.abs(rounded), x)


@triton.jit
def _stochastic_in_table(x, random24, FORM: tl.constexpr, MEMBER: tl.constexpr, TAGGED: tl.constexpr):
    SIZE: tl.constexpr = size_of(FORM, MEMBER)
    x = tl.minimum(tl.maximum(x, level_of(FORM, MEMBER, 0)), level_of(FORM, MEMBER, SIZE - 1))
    below = tl.full(x.shape, bits_of(FORM, MEMBER, 0, TAGGED), tl.int32)
    above = tl.full(x.shape, bits_of(FORM, MEMBER, 1, TAGGED), tl.int32)
    for i in tl.static_range(1, SIZE - 1):
        beyond = x >= level_of(FORM, MEMBER, i)
        below = tl.where(beyond, bits_of(FORM, MEMBER, i, TAGGED), below)
        above = tl.where(beyond, bits_of(FORM, MEMBER, i + 1, TAGGED), above)
    low = untagged(below.to(tl.float32, bitcast=True), FORM, TAGGED)
    high = untagged(above.to(tl.float32, bitcast=True), FORM, TAGGED)
    up = random24 < tl.div_rn(x - low, high - low) * RANDOM_RANGE
    return tl.where(up, above, below).to(tl.float32, bitcast=True)


@triton.jit
def stochastic(
    x, random24, FORM: tl.constexpr, MEMBER: tl.constexpr, TAGGED: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid.stochastic of a member."""
    if kind_of(FORM, MEMBER) == "float":
        SHIFT: tl.constexpr = shift_of(FORM, MEMBER)
        if SHIFT == 0.0:
            return stochastic_e2m1(x, random24, INTERPRET)
        else:
            return stochastic_e2m1(x - SHIFT, random24, INTERPRET) + SHIFT
    elif kind_of(FORM, MEMBER) == "integers":
        return _stochastic_integers(x, random24, INTERPRET)
    else:
        return _stochastic_in_table(x, random24, FORM, MEMBER, TAGGED)


@triton.jit
def code_of(q, x, FORM: tl.constexpr, MEMBER: tl.constexpr):
    """Grid.encode of a member, int32: q as `nearest` or `stochastic` gave it, tagged."""
    if kind_of(FORM, MEMBER) == "float":
        return e2m1_code(q - shift_of(FORM, MEMBER), x - shift_of(FORM, MEMBER))
    elif kind_of(FORM, MEMBER) == "integers":
        return q.to(tl.int32) + 8
    elif kind_of(FORM, MEMBER) == "quarters":
        return (tl.abs(q) * 4.0).to(tl.int32) | ((x.to(tl.int32, bitcast=True) >> 28) & 8)
    else:
        return q.to(tl.int32, bitcast=True) & CODE_BITS


@triton.jit
def look_up(u, table_ptr, ROW: tl.constexpr, FORM: tl.constexpr, INTERPRET: tl.constexpr):
    """int32 entries for elements u from a row of `lookup`.

    Loaded by PTX: Triton would first lay u out as it lays out loads of neighbours, through shared memory."""
    magnitude = tl.minimum(tl.abs(u), 127.0)
    if INTERPRET:
        steps = tl.ceil(magnitude * 2.0).to(tl.int32)
        at = ROW * 512 + (steps | ((u.to(tl.int32, bitcast=True) >> 23) & 256))
        return tl.load(table_ptr + at).to(tl.int32)
    else:  # rounding up to FP32's integers leaves them in the lowest bits
        two, large = tl.full(u.shape, 2.0, tl.float32), tl.full(u.shape, 2.0**23, tl.float32)
        steps = fma_up(magnitude, two, large).to(tl.int32, bitcast=True) & 255
        at = ROW * 512 + (steps | ((u.to(tl.int32, bitcast=True) >> 23) & 256))
        WIDE: tl.constexpr = members_of(FORM) > 2
        address = table_ptr.to(tl.int64) + at.to(tl.int64) * (4 if WIDE else 2)
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];" if WIDE else "ld.global.nc.u16 $0, [$1];",
            "=r,l", [address], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def level_in(entry, MEMBER: tl.constexpr):
    """The level of one member: its byte becomes the lowest bits of 2^23 or, one byte higher, of 2^15."""
    if MEMBER > 1:
        entry = entry >> 16
    if MEMBER % 2 == 0:
        return ((entry & 255) | 0x4B000000).to(tl.float32, bitcast=True) - (2.0**23 + 128.0)
    else:
        return ((entry & 0xFF00) | 0x47000000).to(tl.float32, bitcast=True) - (2.0**15 + 128.0)


# --- scales ---------------------------------------------------------------------------------------


@triton.jit
def rounded_scale(x, FORM: tl.constexpr):
    """Scaling.round of E4M3 and UE5M3."""
    if of(FORM, "scales") == "e4m3":
        return round_e4m3(x)
    else:
        x = tl.minimum(x, 61440.0)
        power = tl.maximum(binade(x), 2.0**-14)
        return tl.fma(power, -UE5M3_SHIFT, tl.fma(power, UE5M3_SHIFT, x))


@triton.jit
def scale_byte(scale, member, FORM: tl.constexpr):
    """The byte of an E4M3 or UE5M3 scale: 2^-120 or 2^-112 puts its subnormals on FP32's. Of two members the sign bit
    says the second."""
    ALIGN: tl.constexpr = 2.0**-120 if of(FORM, "scales") == "e4m3" else 2.0**-112
    code = (scale * ALIGN).to(tl.int32, bitcast=True) >> 20
    if members_of(FORM) == 2:
        code = code | (member << 7)
    return code.to(tl.uint8)


@triton.jit
def neighbour(scale, step):
    """blocks.e4m3_neighbour."""
    code = ((scale * 2.0**-120).to(tl.int32, bitcast=True) >> 20) + step
    return e4m3_value(tl.minimum(tl.maximum(code, 1), 126))


@triton.jit
def power_exponent(largest, FORM: tl.constexpr):
    """Biased exponent of PowersOfTwo._powers, 1 .. 254; of rule rms `largest` is what is wanted, over 6."""
    if of(FORM, "rule") == "rms":
        bits = tl.div_rn(largest, 6.0).to(tl.int32, bitcast=True)
        more = ((bits & MANTISSA) >= UPPER_HALF).to(tl.int32)
        return tl.minimum(tl.maximum((bits >> 23) + more, 1), 254)
    bits = largest.to(tl.int32, bitcast=True)
    if of(FORM, "rule") == "floor":
        more = bits * 0
    elif of(FORM, "rule") == "even":
        more = ((bits & MANTISSA) >= 0x600000).to(tl.int32)
    else:
        more = ((bits & MANTISSA) > 0x400000).to(tl.int32)
    return tl.maximum((bits >> 23) - 2 + more, 1)


@triton.jit
def macro_factor(largest, FORM: tl.constexpr):
    """PowersOfTwo._macro of the largest magnitudes of 128 elements."""
    STEP: tl.constexpr = 1 << (23 - of(FORM, "macro_bits"))
    bits = tl.div_rn(largest, 6.0).to(tl.int32, bitcast=True) & MANTISSA
    bits = (bits + (STEP - 1)) & -STEP
    factor = ((bits & MANTISSA) | 0x3F800000).to(tl.float32, bitcast=True)
    return tl.where(largest >= 2.0**-120, factor, 1.0)


@triton.jit
def _round_bf16(x):
    """minifloat.round_bf16 of finite numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def hif4_scale(largest):
    """s of HiFloat4 and its BF16 reciprocal, of the largest magnitudes of 64 elements."""
    s = tl.minimum(tl.maximum(_round_bf16(largest * BF16_SEVENTH), 2.0**-48), 49152.0)
    power = binade(s)
    s = tl.fma(power, -(1.5 * 2.0**21), tl.fma(power, 1.5 * 2.0**21, s))
    return s, _round_bf16(tl.div_rn(1.0, s))


@triton.jit
def store_form(
    codes_ptr, scales_ptr, members_ptr, codes, scale, member, line0, group0, lines, out_words, out_groups,
    FORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Codes, scales and members of a tile of TILE lines x 8 groups of 16, as NVFP4Tensor stores them.

    codes [G, n], scale and member [G] in the order of the elements; out_words, out_groups of a line."""
    line = (line0 + tl.arange(0, TILE)).to(tl.int64)[:, None]
    word = group0 * 2 + tl.arange(0, 16)[None, :]
    inside = line < lines
    shifts = (tl.arange(0, 8) * 4)[None, :]
    words = tl.reshape(tl.sum(tl.reshape(codes, [TILE * 16, 8]) << shifts, 1), [TILE, 16])
    tl.store(codes_ptr + line * out_words + word, words, mask=inside & (word < out_words))
    if of(FORM, "scales") == "e8m0":
        _store_powers(scales_ptr, scale, line, group0 // 2, inside, out_groups // 2, FORM, TILE)
    elif of(FORM, "scales") == "hif4":
        block = group0 // 4 + tl.arange(0, 2)[None, :]
        at = scales_ptr.to(tl.pointer_type(tl.int32)) + line * (out_groups // 4) + block
        tl.store(at, tl.reshape(_hif4_words(scale), [TILE, 2]), mask=inside & (block < out_groups // 4))
    else:
        group = group0 + tl.arange(0, 8)[None, :]
        byte = tl.reshape(scale_byte(scale, member, FORM), [TILE, 8])
        tl.store(scales_ptr + line * out_groups + group, byte, mask=inside & (group < out_groups))
        if members_of(FORM) > 2:
            known = tl.where(group < out_groups, tl.reshape(member, [TILE, 8]), 0)
            twos = tl.reshape(known, [TILE * 2, 4]) << (tl.arange(0, 4) * 2)[None, :]
            four = group0 // 4 + tl.arange(0, 2)[None, :]
            fours = (out_groups + 3) // 4
            byte = tl.reshape(tl.sum(twos, 1), [TILE, 2]).to(tl.uint8)
            tl.store(members_ptr + line * fours + four, byte, mask=inside & (four < fours))


@triton.jit
def _store_powers(scales_ptr, scale, line, block0, inside, blocks, FORM: tl.constexpr, TILE: tl.constexpr):
    """PowersOfTwo.encode: exponents of blocks of 32, of macro blocks four and a fraction."""
    bits = tl.reshape(scale.to(tl.int32, bitcast=True), [TILE, 4])
    i = tl.arange(0, 4)[None, :]
    there = inside & (block0 + i < blocks)
    exponents = (bits >> 23).to(tl.uint8)
    if of(FORM, "macro_bits") is None:
        tl.store(scales_ptr + line * blocks + block0 + i, exponents, mask=there)
    else:
        at = scales_ptr + (line * (blocks // 4) + block0 // 4) * 5
        tl.store(at + i, exponents, mask=there)
        fraction = tl.max((bits & MANTISSA) >> (23 - of(FORM, "macro_bits")), 1)
        tl.store(at + 4, fraction.to(tl.uint8)[:, None], mask=inside & (block0 < blocks))


@triton.jit
def _hif4_words(scale):
    """HiFloat4.encode: int32 [blocks of 64] of scales [blocks of 4]."""
    fours = tl.reshape(scale, [scale.shape[0] // 16, 16])
    s = tl.maximum(tl.max(fours, 1) * 0.25, 2.0**-48)
    limit = s * 2.0
    is4 = fours >= limit[:, None] * 2.0
    by8 = tl.max(tl.reshape(is4.to(tl.int32), [fours.shape[0] * 8, 2]), 1)
    wide = tl.reshape(tl.broadcast_to(by8[:, None], [fours.shape[0] * 8, 2]), fours.shape)
    by4 = tl.where(wide == 1, is4, fours >= limit[:, None]).to(tl.int32)
    low = tl.reshape(by8, [fours.shape[0], 8]) << (tl.arange(0, 8) + 8)[None, :]
    high = by4 << (tl.arange(0, 16) + 16)[None, :]
    byte = (s.to(tl.int32, bitcast=True) >> 21) - ((127 - 48) << 2)
    return byte | tl.sum(low, 1) | tl.sum(high, 1)


@triton.jit
def load_scales(scales_ptr, members_ptr, row, group, C, inside, FORM: tl.constexpr):
    """(scales, members int32) of blocks `group` [1, G] of rows [R, 1] of a packed [.., C]."""
    member = tl.zeros(inside.shape, tl.int32)
    if of(FORM, "scales") == "hif4":
        word = tl.load(
            scales_ptr.to(tl.pointer_type(tl.int32)) + row * (C // 64) + group // 16,
            mask=inside, other=0,
        )  # fmt: skip
        four = group % 16
        exponent = ((word >> (8 + four // 2)) & 1) + ((word >> (16 + four)) & 1)
        bits = (((word & 255) + ((127 - 48) << 2)) << 21) + (exponent << 23)
    elif of(FORM, "scales") == "e8m0":
        if of(FORM, "macro_bits") is None:
            byte = tl.load(scales_ptr + row * (C // 32) + group, mask=inside, other=0)
            bits = byte.to(tl.int32) << 23
        else:
            at = scales_ptr + (row * (C // 128) + group // 4) * 5
            bits = tl.load(at + group % 4, mask=inside, other=0).to(tl.int32) << 23
            fraction = tl.load(at + 4 + group * 0, mask=inside, other=0).to(tl.int32)
            bits = bits | (fraction << (23 - of(FORM, "macro_bits")))
    else:
        byte = tl.load(scales_ptr + row * (C // 16) + group, mask=inside, other=0).to(tl.int32)
        bits = (byte & (127 if members_of(FORM) == 2 else 255)) << 20
        if members_of(FORM) == 2:
            member = byte >> 7
        elif members_of(FORM) > 2:
            at = members_ptr + row * ((C // 16 + 3) // 4) + group // 4
            twos = tl.load(at, mask=inside, other=0).to(tl.int32)
            member = (twos >> (group % 4 * 2)) & 3
    scale = bits.to(tl.float32, bitcast=True)
    if of(FORM, "scales") == "e4m3":
        scale = scale * 2.0**120
    elif of(FORM, "scales") == "ue5m3":
        scale = scale * 2.0**112
    return scale, member
