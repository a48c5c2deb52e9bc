"""The Triton quantizer: one template for every 1x16 NVFP4 slot, its choices compile-time constants.

    load a tile with 128 elements along the contraction (BF16, or packed codes and block scales)
    -> y = tile @ rotation          tensor core, +-1 (exact) entries; the identity where a slot has no rotation
    -> T = amax / (C v), s_g = RNE_e4m3(max_g|y| / (v T)), q = round_e2m1(y / (s_g T)), MS-EDEN's corrected s_g
    -> store q * s_g as BF16 (exact) in the source's own layout, and on request packed codes and block scales

Layout. A tensor-core result leaves a thread, in each of its rows, the columns n = 8 j + 2 l + b (j = 0..15, b = 0, 1;
l = lane % 4). `rotation`'s columns are permuted so that column n holds the rotated element 32 l + 2 j + b: the thread
then owns two whole groups of 16, all group sums stay inside a thread, and per-group work (division, Philox, E4M3) is
done once, not four times. The result does not depend on it: `_natural_order` undoes the permutation in the indices.
Along axis 0 the tile is multiplied transposed, so the groups lie along the columns there too.
Instructions, not bytes, bound such a kernel: for sm_90 its loop has 19 (MS-EDEN) or 30 (SR) an element, and it runs at
76 % and 52 % of a copy's speed on an H200 (scripts/bench/bench_quantize.py, docs/kernels.md#5-triton).

Tiny tensors: with T below 2^-60 the product s_g T could be subnormal and its reciprocal infinite, so the rotation
(loaded anyway) carries a factor 2^64 and so do s_g T and v T after they were rounded: every quotient stays exact.
"""

import triton
import triton.language as tl

from kernels.quantize.triton_blocks import calls_of, quantize_form, quantize_groups
from kernels.quantize.triton_forms import prescale_of, scale_byte, store_form
from kernels.triton_common import (
    both_halves,
    decode_words,
    e4m3_byte,
    encode_words,
    halves,
    has_e2m1_instruction,
    joined,
    largest_magnitude,
    load_key,
    max_nan,
    next_power_of_two,
    philox4x32,
    two_bf16,
    values_and_word,
)

ROTATION_TILE = tl.constexpr(128)
TINY_SCALE = tl.constexpr(2.0**-60)
TINY_FACTOR = tl.constexpr(2.0**64)


@triton.jit
def _natural_order(y, ROWS: tl.constexpr):
    """Tensor-core columns [ROWS, 128] -> groups [ROWS * 8, 16] in the order of the rotated elements. No data moves."""
    y = tl.permute(tl.reshape(y, [ROWS, 2, 8, 4, 2]), [0, 3, 1, 2, 4])
    return tl.reshape(y, [ROWS * 8, 16])


@triton.jit
def _load_rotation(rotation_ptr, signs_ptr, dim, factor, HAS_SIGNS: tl.constexpr, PARTS: tl.constexpr,
                   PART: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """BF16 [128, 128]: diag(signs) @ permuted block-diagonal Hadamard, times a power of two.

    PARTS: 0, or of how many FP32 [dim, dim] a merged rotation (kernels.rotation) is the sum: PART of them, laid out."""
    i = tl.arange(0, 128)
    if PARTS > 0:
        column = i % 8 // 2 * 32 + i // 8 * 2 + i % 2
        inside = (i // dim)[:, None] == (column // dim)[None, :]
        at = (PART * dim + i % dim)[:, None] * dim + (column % dim)[None, :]
        rotation = tl.load(rotation_ptr + at, mask=inside, other=0.0) * factor
        return rotation if INTERPRET else rotation.to(tl.bfloat16)
    else:
        rotation = tl.load(rotation_ptr + i[:, None] * 128 + i[None, :])
        rows = tl.load(signs_ptr + i % dim) * factor if HAS_SIGNS else tl.zeros([128], tl.float32) + factor
        if INTERPRET:
            return rotation.to(tl.float32) * rows[:, None]
        else:
            return rotation * rows.to(tl.bfloat16)[:, None]


@triton.jit
def _rotated(x, rotation, low, PARTS: tl.constexpr):
    """FP32 x @ rotation, or by both parts of it."""
    y = tl.dot(x, rotation)
    return tl.dot(x, low, acc=y) if PARTS == 2 else y


@triton.jit
def _corner(row0, col0, columns):
    """Where a tile begins: the only 64-bit number, made once a tile. Inside one 32 bits do (columns < 2^24)."""
    return row0.to(tl.int64) * columns + col0


@triton.jit
def load_tile(src_ptr, scales_ptr, row0, col0, R, C, words, groups, ROWS: tl.constexpr, COLS: tl.constexpr,
              PACKED: tl.constexpr, SQUARE: tl.constexpr, EVEN: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """[ROWS, COLS] of the source as BF16 (FP32 when interpreting: its BF16 dot is wrong); zeros outside [R, C].

    Packed sources come in words of 8 codes, `words` = C / 8 and `groups` = C / 16 a row, and give values * 2^-8.
    EVEN: the tiles cover [R, C] exactly, so that no access needs a mask.
    """
    row = tl.arange(0, ROWS)
    if PACKED:
        word, group = tl.arange(0, COLS // 8), tl.arange(0, COLS // 16)
        word_at = src_ptr + _corner(row0, col0 // 8, words) + (row[:, None] * words + word[None, :])
        scale_row0, scale_row = (row0 // 16, row // 16) if SQUARE else (row0, row)
        scale_at = scales_ptr + _corner(scale_row0, col0 // 16, groups) + (scale_row[:, None] * groups + group[None, :])
        if EVEN:
            codes = tl.load(word_at)
            scales = tl.load(scale_at)
        else:
            inside = (row0 + row < R)[:, None]
            codes = tl.load(word_at, mask=inside & (col0 // 8 + word < words)[None, :], other=0)
            scales = tl.load(scale_at, mask=inside & (col0 // 16 + group < groups)[None, :], other=0)
        tile = decode_words(codes, scales, ROWS, COLS, INTERPRET)
    else:
        col = tl.arange(0, COLS)
        at = src_ptr + _corner(row0, col0, C) + (row[:, None] * C + col[None, :])
        if EVEN:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(row0 + row < R)[:, None] & (col0 + col < C)[None, :], other=0.0)
    return tile.to(tl.float32) if INTERPRET else tile.to(tl.bfloat16)


@triton.jit
def _first_tile(tiles_c, TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    """(row, column) where this program's first tile begins, and how far on its next one is in each direction."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    return (
        program // tiles_c * TILE_R,
        program % tiles_c * TILE_C,
        programs // tiles_c * TILE_R,
        programs % tiles_c * TILE_C,
    )


@triton.jit
def _next_tile(row0, col0, step_r, step_c, tiles_c, TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    """Where the tile num_programs on begins: without the division that its number would take."""
    row0, col0 = row0 + step_r, col0 + step_c
    over = col0 >= tiles_c * TILE_C
    return tl.where(over, row0 + TILE_R, row0), tl.where(over, col0 - tiles_c * TILE_C, col0)


@triton.jit
def tensor_scale(amax, RANGE: tl.constexpr, POW2: tl.constexpr):
    """T = amax / (C v); 1 for an all-zero tensor; NaN for NaN and Inf, which then reaches the GEMM's output.

    RANGE = C v; 0 for a format without a scale of the tensor, which has 1 there."""
    if RANGE == 0.0:
        scale = 1.0
    else:
        scale = tl.maximum(tl.div_rn(amax, RANGE), 2.0**-126)
        if POW2:
            scale = next_power_of_two(scale)
        scale = tl.where(amax == 0.0, 1.0, scale)
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def _outer_scale(T, FORM: tl.constexpr):
    """Of the operand: what was multiplied before quantizing is undone on the product."""
    return T if prescale_of(FORM) == 1.0 else T * (1.0 / prescale_of(FORM))


@triton.jit
def _group_numbers(line0, group0, out_groups, TILE: tl.constexpr, ROW: tl.constexpr):
    """Numbers of ROW groups, evenly spaced among the eight, of each of TILE rows."""
    i = tl.arange(0, TILE * ROW)
    return (line0 + i // ROW) * out_groups + group0 + i % ROW * (8 // ROW)


@triton.jit
def _tile_groups(x, rotation, low, PARTS: tl.constexpr, table_ptr, T, factor, key, line0, group0, lines, out_groups,
                 TARGET: tl.constexpr,
                 SELECT_46: tl.constexpr, ROUNDING: tl.constexpr, EDEN_GROUPS: tl.constexpr, SCALED: tl.constexpr,
                 PAIRS: tl.constexpr, TILE: tl.constexpr, FORM: tl.constexpr, TAGGED: tl.constexpr,
                 SETTLED: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Rotate x [TILE, 128], whose first group is (line0, group0) of the stored operand: (levels, block scales, what
    packed codes are made from, members): y, or with a FORM the codes.

    An input of -0 comes out as +0, without a rotation too: a dot product adds to +0."""
    y = _natural_order(_rotated(x, rotation, low, PARTS), TILE)
    group = _group_numbers(line0, group0, out_groups, TILE, 8)
    CALLS: tl.constexpr = calls_of(ROUNDING)
    call = group[:, None] * CALLS + tl.arange(0, CALLS)[None, :]
    if PAIRS:
        group = _group_numbers(line0, group0, out_groups, TILE, 4)
    if FORM is not None:
        levels, codes, scale, member = quantize_form(y, T, factor, call, group, key, table_ptr, FORM, ROUNDING,
                                                     EDEN_GROUPS, TAGGED, INTERPRET)  # fmt: skip
        return levels, scale, codes, member
    else:
        calls = lines * out_groups * CALLS
        codes, scale = quantize_groups(y, T, factor, call, calls, group, key, TARGET, SELECT_46, ROUNDING, EDEN_GROUPS,
                                       SCALED, SETTLED, INTERPRET)  # fmt: skip
        return codes, scale, y, scale


@triton.jit
def _store_values(values_ptr, codes, scale, row0, col0, R, C, AXIS: tl.constexpr, TILE: tl.constexpr,
                  EVEN: tl.constexpr, DEAD_ZERO: tl.constexpr):  # fmt: skip
    """codes * scale as BF16 (exact) into [R, C]; the tile lies transposed for AXIS 0."""
    if DEAD_ZERO:  # what scale 0 makes of a negative code is +0
        values = tl.fma(codes, tl.broadcast_to(scale[:, None], codes.shape), 0.0)
    else:
        values = codes * scale[:, None]
    values = tl.reshape(values.to(tl.bfloat16), [TILE, 128])
    if AXIS == 0:
        values = tl.trans(values)
    row = tl.arange(0, 128 if AXIS == 0 else TILE)
    col = tl.arange(0, TILE if AXIS == 0 else 128)
    at = values_ptr + _corner(row0, col0, C) + (row[:, None] * C + col[None, :])
    if EVEN:
        tl.store(at, values)
    else:
        tl.store(at, values, mask=(row0 + row < R)[:, None] & (col0 + col < C)[None, :])


@triton.jit
def quantize_kernel(src_ptr, src_scales_ptr, src_global_ptr, rotation_ptr, signs_ptr, table_ptr, amax_ptr, rng_ptr,
                    layer_ptr, values_ptr, codes_ptr, scales_ptr, members_ptr, scale_ptr, R, C, src_words, src_groups,
                    out_words, out_groups, dim,
                    AXIS: tl.constexpr, PACKED: tl.constexpr, SQUARE: tl.constexpr, HAS_SIGNS: tl.constexpr,
                    PARTS: tl.constexpr, TARGET: tl.constexpr, RANGE: tl.constexpr, POW2: tl.constexpr,
                    SELECT_46: tl.constexpr, ROUNDING: tl.constexpr, EDEN_GROUPS: tl.constexpr, SCALED: tl.constexpr,
                    PAIRS: tl.constexpr, STREAM: tl.constexpr, STORE_VALUES: tl.constexpr, STORE_PACKED: tl.constexpr,
                    EVEN: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, FORM: tl.constexpr,
                    INTERPRET: tl.constexpr):  # fmt: skip
    """Quantize [R, C] in blocks of 16 along AXIS. A program takes every num_programs-th tile of TILE x 128.

    values_ptr: BF16 [R, C]; codes_ptr (words of 8 codes), scales_ptr: the operand stored as [rows, contraction], with
    out_words = contraction / 8 and out_groups = contraction / 16; scale_ptr: FP32 []. PAIRS: out_groups is even.
    FORM: None for E2M1 under E4M3 scales by one or two fits; else TARGET and SELECT_46 mean nothing, and members_ptr is
    for families of three or four; table_ptr: `lookup`.
    """
    program = tl.program_id(0)
    T = tensor_scale(tl.load(amax_ptr), RANGE, POW2)
    if program == 0:
        made = _outer_scale(T, FORM)
        outer = made * tl.load(src_global_ptr) if PACKED else made
        tl.store(scale_ptr, outer)
    factor = tl.where(T < TINY_SCALE, TINY_FACTOR, 1.0)
    key = (0, 0, 0, 0, 0)
    if ROUNDING != "rtn":
        key = load_key(rng_ptr, layer_ptr, STREAM)
    unpacking: tl.constexpr = 256.0 if PACKED else 1.0
    SETTLED: tl.constexpr = STORE_PACKED or ROUNDING != "ms_eden" or FORM is not None
    rotation = _load_rotation(rotation_ptr, signs_ptr, dim, factor * unpacking, HAS_SIGNS, PARTS, 0, INTERPRET)
    low = rotation
    if PARTS == 2:
        low = _load_rotation(rotation_ptr, signs_ptr, dim, factor * unpacking, HAS_SIGNS, PARTS, 1, INTERPRET)
    TILE_R: tl.constexpr = 128 if AXIS == 0 else TILE
    TILE_C: tl.constexpr = TILE if AXIS == 0 else 128
    tiles_c = tl.cdiv(C, TILE_C)
    tiles = tl.cdiv(R, TILE_R) * tiles_c
    near_r, near_c, step_r, step_c = _first_tile(tiles_c, TILE_R, TILE_C)
    # From the end, which what ran before, the amax say, has left in the L2 cache.
    BACKWARDS: tl.constexpr = AXIS == 1
    last_row, last_col = (tl.cdiv(R, TILE_R) - 1) * TILE_R, (tiles_c - 1) * TILE_C
    for _ in tl.range(program, tiles, tl.num_programs(0), num_stages=STAGES):
        row0, col0 = (last_row - near_r, last_col - near_c) if BACKWARDS else (near_r, near_c)
        x = load_tile(src_ptr, src_scales_ptr, row0, col0, R, C, src_words, src_groups, TILE_R, TILE_C, PACKED, SQUARE,
                      EVEN, INTERPRET)  # fmt: skip
        if AXIS == 0:
            x = tl.trans(x)
        line0 = col0 if AXIS == 0 else row0
        group0 = (row0 if AXIS == 0 else col0) // 16
        code, scale, y, member = _tile_groups(x, rotation, low, PARTS, table_ptr, T, factor, key, line0, group0,
                                              C if AXIS == 0 else R, out_groups, TARGET, SELECT_46, ROUNDING,
                                              EDEN_GROUPS, SCALED, PAIRS, TILE, FORM, STORE_PACKED,
                                              SETTLED, INTERPRET)  # fmt: skip
        if STORE_VALUES:
            _store_values(values_ptr, code, scale, row0, col0, R, C, AXIS, TILE, EVEN, not SETTLED)
        if STORE_PACKED and FORM is not None:
            store_form(codes_ptr, scales_ptr, members_ptr, y, scale, member, line0, group0, C if AXIS == 0 else R,
                       out_words, out_groups, FORM, TILE)  # fmt: skip
        elif STORE_PACKED:
            lines = (line0 + tl.arange(0, TILE)).to(tl.int64)
            words = group0 * 2 + tl.arange(0, 16)
            groups = group0 + tl.arange(0, 8)
            inside = (lines < (C if AXIS == 0 else R))[:, None]
            packed = tl.reshape(encode_words(code, y), [TILE, 16])
            at = codes_ptr + lines[:, None] * out_words + words[None, :]
            scale_at = scales_ptr + lines[:, None] * out_groups + groups[None, :]
            scale_bytes = tl.reshape(e4m3_byte(scale), [TILE, 8])
            if EVEN:
                tl.store(at, packed)
                tl.store(scale_at, scale_bytes)
            else:
                tl.store(at, packed, mask=inside & (words < out_words)[None, :])
                tl.store(scale_at, scale_bytes, mask=inside & (groups < out_groups)[None, :])
        near_r, near_c = _next_tile(near_r, near_c, step_r, step_c, tiles_c, TILE_R, TILE_C)


@triton.jit
def load_halves(pointer, at, HALF: tl.constexpr, inside):
    """What begins at `at` and HALF further on, as loads of their own: a thread then holds whole groups."""
    return tl.load(pointer + at, mask=inside, other=0), tl.load(pointer + at + HALF, mask=inside, other=0)


@triton.jit
def rows_kernel(src_ptr, table_ptr, amax_ptr, rng_ptr, layer_ptr, values_ptr, codes_ptr, scales_ptr, scale_ptr, count,
                TARGET: tl.constexpr, RANGE: tl.constexpr, POW2: tl.constexpr, SELECT_46: tl.constexpr,
                ROUNDING: tl.constexpr, STREAM: tl.constexpr, STORE_VALUES: tl.constexpr, STORE_PACKED: tl.constexpr,
                BLOCK: tl.constexpr, FORM: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """BF16 source, axis 1, no rotation: groups are 32 contiguous bytes and `count` of them follow each other.

    No tensor core and no shared memory. Each half of a group is its own load, so that a thread holds whole groups.
    """
    T = tensor_scale(tl.load(amax_ptr), RANGE, POW2)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, T)
    factor = tl.where(T < TINY_SCALE, TINY_FACTOR, 1.0)
    key = (0, 0, 0, 0, 0)
    if ROUNDING != "rtn":
        key = load_key(rng_ptr, layer_ptr, STREAM)
    IS_BF16: tl.constexpr = src_ptr.dtype.element_ty == tl.bfloat16 and not INTERPRET
    IN_WORDS: tl.constexpr = FORM is None and IS_BF16 and not has_e2m1_instruction()
    CALLS: tl.constexpr = calls_of(ROUNDING)
    blocks = tl.cdiv(count, BLOCK)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=1):
        group = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)  # backwards, as along axis 1 above
        inside = (group < count)[:, None]
        if IN_WORDS:
            at = group.to(tl.int64)[:, None] * 8 + tl.arange(0, 4)[None, :]
            low, high = load_halves(src_ptr.to(tl.pointer_type(tl.int32)), at, 4, inside)
            x = both_halves(joined(low, high))
        else:
            at = group.to(tl.int64)[:, None] * 16 + tl.arange(0, 8)[None, :]
            x = joined(*load_halves(src_ptr, at, 8, inside)).to(tl.float32)
        y = x * factor
        call = group[:, None] * CALLS + tl.arange(0, CALLS)[None, :]
        if FORM is not None:
            code, words, scale, member = quantize_form(
                y, T, factor, call, group, key, table_ptr, FORM, ROUNDING, 1, STORE_PACKED, INTERPRET
            )
        else:
            calls = count * CALLS
            code, scale = quantize_groups(
                y, T, factor, call, calls, group, key, TARGET, SELECT_46, ROUNDING, 1, False, True, INTERPRET
            )
        if IN_WORDS:
            even, odd = tl.split(tl.reshape(code, [BLOCK, 8, 2]))
            even_low, even_high = halves(even)
            odd_low, odd_high = halves(odd)
            twice = two_bf16(scale)[:, None]
            low, word = values_and_word(even_low, odd_low, twice, low)
            high, next_word = values_and_word(even_high, odd_high, twice, high)
            words = tl.join(word, next_word)
            if STORE_VALUES:
                tl.store(values_ptr.to(tl.pointer_type(tl.int32)) + at, low, mask=inside)
                tl.store(values_ptr.to(tl.pointer_type(tl.int32)) + at + 4, high, mask=inside)
        elif STORE_VALUES:
            at = group.to(tl.int64)[:, None] * 16 + tl.arange(0, 16)[None, :]
            tl.store(values_ptr + at, (code * scale[:, None]).to(tl.bfloat16), mask=inside)
        if STORE_PACKED:
            at = group.to(tl.int64)[:, None] * 2 + tl.arange(0, 2)[None, :]
            if FORM is not None:
                words = tl.sum(tl.reshape(words, [BLOCK * 2, 8]) << (tl.arange(0, 8) * 4)[None, :], 1)
                tl.store(scales_ptr + group, scale_byte(scale, member, FORM), mask=group < count)
            else:
                tl.store(scales_ptr + group, e4m3_byte(scale), mask=group < count)
                if not IN_WORDS:
                    words = encode_words(code, y)
            tl.store(codes_ptr + at, tl.reshape(words, [BLOCK, 2]), mask=inside)


@triton.jit
def _atomic_max(pointer, value):
    """Non-negative floats order like their bits, NaN above Inf above all numbers: an integer maximum keeps NaN."""
    tl.atomic_max(pointer.to(tl.pointer_type(tl.int32)), value.to(tl.int32, bitcast=True))


@triton.jit
def amax_kernel(src_ptr, src_scales_ptr, rotation0_ptr, rotation1_ptr, signs0_ptr, signs1_ptr, amax0_ptr, amax1_ptr,
                plain_ptr, R, C, words, groups, dim, ALONG_0: tl.constexpr, ALONG_1: tl.constexpr, PLAIN: tl.constexpr,
                PARTS: tl.constexpr, PACKED: tl.constexpr, SQUARE: tl.constexpr, EVEN: tl.constexpr,
                TILE: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Largest magnitude of [R, C] rotated along axis 0 and/or axis 1, and not rotated (PLAIN), from one read;
    atomically into zeroed FP32 []."""
    program = tl.program_id(0)
    unpacking: tl.constexpr = 256.0 if PACKED else 1.0
    TILE_R: tl.constexpr = 128 if ALONG_0 else TILE
    TILE_C: tl.constexpr = 128 if ALONG_1 else TILE
    if ALONG_0:
        rotation0 = _load_rotation(rotation0_ptr, signs0_ptr, dim, unpacking, PARTS == 0, PARTS, 0, INTERPRET)
        low0 = rotation0
        if PARTS == 2:
            low0 = _load_rotation(rotation0_ptr, signs0_ptr, dim, unpacking, False, PARTS, 1, INTERPRET)
    if ALONG_1:
        rotation1 = _load_rotation(rotation1_ptr, signs1_ptr, dim, unpacking, PARTS == 0, PARTS, 0, INTERPRET)
        low1 = rotation1
        if PARTS == 2:
            low1 = _load_rotation(rotation1_ptr, signs1_ptr, dim, unpacking, False, PARTS, 1, INTERPRET)
    largest0 = tl.zeros([TILE_C], tl.float32)
    largest1 = tl.zeros([TILE_R], tl.float32)
    largest = tl.zeros([TILE_R], tl.float32)
    tiles_c = tl.cdiv(C, TILE_C)
    row0, col0, step_r, step_c = _first_tile(tiles_c, TILE_R, TILE_C)
    for _ in tl.range(program, tl.cdiv(R, TILE_R) * tiles_c, tl.num_programs(0), num_stages=STAGES):
        x = load_tile(src_ptr, src_scales_ptr, row0, col0, R, C, words, groups, TILE_R, TILE_C, PACKED, SQUARE,
                      EVEN, INTERPRET)  # fmt: skip
        if PLAIN:
            largest = max_nan(largest, largest_magnitude(x.to(tl.float32), 1, INTERPRET))
        if ALONG_1:
            largest1 = max_nan(largest1, largest_magnitude(_rotated(x, rotation1, low1, PARTS), 1, INTERPRET))
        if ALONG_0:
            turned = _rotated(tl.trans(x), rotation0, low0, PARTS)
            largest0 = max_nan(largest0, largest_magnitude(turned, 1, INTERPRET))
        row0, col0 = _next_tile(row0, col0, step_r, step_c, tiles_c, TILE_R, TILE_C)
    if ALONG_1:
        _atomic_max(amax1_ptr, largest_magnitude(largest1, 0, INTERPRET))
    if ALONG_0:
        _atomic_max(amax0_ptr, largest_magnitude(largest0, 0, INTERPRET))
    if PLAIN:
        _atomic_max(plain_ptr, largest_magnitude(largest, 0, INTERPRET))


@triton.jit
def signs_kernel(rng_ptr, layer_ptr, signs_ptr, STREAM: tl.constexpr, DIM: tl.constexpr, FIXED: tl.constexpr,
                 INTERPRET: tl.constexpr):  # fmt: skip
    """philox.random_signs: FP32 +1 or -1 [DIM]; word i decides by its top bit. FIXED drops step, micro-batch, layer."""
    k0, k1, step, micro_batch, last = load_key(rng_ptr, layer_ptr, STREAM)
    counter = tl.arange(0, DIM // 4).to(tl.uint32)
    zero = tl.zeros_like(counter)
    if FIXED:
        w0, w1, w2, w3 = philox4x32(counter, zero, zero, zero + STREAM, k0, k1, INTERPRET)
    else:
        w0, w1, w2, w3 = philox4x32(counter, zero + step, zero + micro_batch, zero + last, k0, k1, INTERPRET)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [DIM])
    tl.store(signs_ptr + tl.arange(0, DIM), 1.0 - 2.0 * (words >> 31).to(tl.int32).to(tl.float32))
