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
Instructions, not bytes, bound such a kernel (kernels.md 8): compiled for sm_90 this one is 32 to 37 an element.

Tiny tensors: with T below 2^-60 the product s_g T could be subnormal and its reciprocal infinite, so the rotation
(loaded anyway) carries a factor 2^64 and so do s_g T and v T after they were rounded: every quotient stays exact.
"""

import triton
import triton.language as tl

from kernels.triton_common import (
    divide,
    e2m1_code,
    e2m1_value,
    e4m3_byte,
    e4m3_value,
    largest_magnitude,
    load_key,
    max_nan,
    next_power_of_two,
    philox4x32,
    round_e2m1,
    round_e4m3,
    stochastic_e2m1,
    stochastic_e4m3,
    top24,
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
def _load_rotation(rotation_ptr, signs_ptr, dim, factor, HAS_SIGNS: tl.constexpr,
                   INTERPRET: tl.constexpr):  # fmt: skip
    """BF16 [128, 128]: diag(signs) @ permuted block-diagonal Hadamard, times a power of two."""
    i = tl.arange(0, 128)
    rotation = tl.load(rotation_ptr + i[:, None] * 128 + i[None, :]).to(tl.float32)
    if HAS_SIGNS:
        rotation = rotation * tl.load(signs_ptr + i % dim)[:, None]
    rotation = rotation * factor
    return rotation if INTERPRET else rotation.to(tl.bfloat16)


@triton.jit
def _load_tile(src_ptr, scales_ptr, row0, col0, R, C, ROWS: tl.constexpr, COLS: tl.constexpr, PACKED: tl.constexpr,
               SQUARE: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """[ROWS, COLS] of the source as BF16 (FP32 when interpreting: its BF16 dot is wrong); zeros outside [R, C]."""
    rows = (row0 + tl.arange(0, ROWS)).to(tl.int64)
    if PACKED:
        group = col0 // 16 + tl.arange(0, COLS // 16)
        mask = (rows < R)[:, None] & (group < C // 16)[None, :]
        scale_row = rows // 16 if SQUARE else rows
        scales = e4m3_value(tl.load(scales_ptr + scale_row[:, None] * (C // 16) + group[None, :], mask=mask, other=0))
        byte = tl.arange(0, 8)
        offsets = (rows[:, None] * (C // 2))[:, :, None] + (group * 8)[None, :, None] + byte[None, None, :]
        codes = tl.load(src_ptr + offsets, mask=mask[:, :, None], other=0).to(tl.int32)
        low = e2m1_value(codes & 15) * scales[:, :, None]
        high = e2m1_value(codes >> 4) * scales[:, :, None]
        tile = tl.reshape(tl.join(low, high), [ROWS, COLS])
    else:
        cols = col0 + tl.arange(0, COLS)
        mask = (rows < R)[:, None] & (cols < C)[None, :]
        tile = tl.load(src_ptr + rows[:, None] * C + cols[None, :], mask=mask, other=0.0)
    return tile.to(tl.float32) if INTERPRET else tile.to(tl.bfloat16)


@triton.jit
def _random24_elements(call, key, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """top 24 bits for each element [GROUPS, SIZE]; Philox call [GROUPS, SIZE / 4] serves four neighbours."""
    k0, k1, step, micro_batch, last = key
    counter = call.to(tl.uint32)
    zero = tl.zeros_like(counter)
    w0, w1, w2, w3 = philox4x32(counter, zero + step, zero + micro_batch, zero + last, k0, k1)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., i, j] is word 2 i + j
    return top24(tl.reshape(words, [GROUPS, SIZE]))


@triton.jit
def _random24_groups(group, key):
    """top 24 bits for each group's scale [GROUPS]."""
    k0, k1, step, micro_batch, last = key
    counter = (group >> 2).to(tl.uint32)
    zero = tl.zeros_like(counter)
    w0, w1, w2, w3 = philox4x32(counter, zero + step, zero + micro_batch, zero + last, k0, k1)
    word = group & 3
    return top24(tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3))))


@triton.jit
def _round_groups(y, ratio, T, factor, random24, SR: tl.constexpr, INTERPRET: tl.constexpr):
    """Reference `_round_blocks`: (elements, codes [G, 16], block scales, alive [G]) of one select branch."""
    scale = round_e4m3(ratio)
    alive = scale > 0.0
    divisor = tl.where(alive, scale * T * factor, float("inf"))
    # 1 / inf = 0 gives a dead block codes 0.
    elements = divide(y, divisor[:, None], tl.div_rn(1.0, divisor)[:, None], INTERPRET)
    codes = stochastic_e2m1(elements, random24) if SR else round_e2m1(elements)
    return elements, codes, tl.where(alive, scale, 1.0), alive


@triton.jit
def _squared_error(elements, codes, scale, alive):
    """Reference `_lower_error`, error of one branch in units of T^2; a dead branch loses."""
    error = codes - elements
    return tl.where(alive, scale * scale * tl.sum(error * error, 1), float("inf"))


@triton.jit
def _over_blocks(per_group, EDEN_GROUPS: tl.constexpr):
    """Sum [G] over each EDEN_GROUPS neighbours, repeated over them."""
    if EDEN_GROUPS == 1:
        return per_group
    blocks = tl.reshape(per_group, [per_group.shape[0] // EDEN_GROUPS, EDEN_GROUPS])
    total = tl.broadcast_to(tl.sum(blocks, 1)[:, None], blocks.shape)
    return tl.reshape(total, per_group.shape)


@triton.jit
def quantize_groups(y, T, factor, call, group, key, TARGET: tl.constexpr, SELECT_46: tl.constexpr,
                    ROUNDING: tl.constexpr, EDEN_GROUPS: tl.constexpr, SCALED: tl.constexpr,
                    INTERPRET: tl.constexpr):  # fmt: skip
    """Reference `quantize_blocks`: FP32 codes [G, n] and block scales [G] of y [G, n] (n = 16, or 256 for tiles).

    T: tensor scale; y carries `factor`. call [G, n/4], group [G]: Philox call numbers of elements and of block scales.
    """
    SR: tl.constexpr = ROUNDING == "sr"
    random24 = _random24_elements(call, key, y.shape[0], y.shape[1]) if SR else 0.0
    ratio = tl.div_rn(tl.max(tl.abs(y), 1), TARGET * T * factor)
    elements, codes, scale, alive = _round_groups(y, ratio, T, factor, random24, SR, INTERPRET)
    if SELECT_46:
        elements4, codes4, scale4, alive4 = _round_groups(y, 1.5 * ratio, T, factor, random24, SR, INTERPRET)
        four = _squared_error(elements4, codes4, scale4, alive4) < _squared_error(elements, codes, scale, alive)
        codes = tl.where(four[:, None], codes4, codes)
        scale = tl.where(four, scale4, scale)
        if ROUNDING == "ms_eden":
            elements = tl.where(four[:, None], elements4, elements)
            alive = tl.where(four, alive4, alive)
    if ROUNDING == "ms_eden":
        weight = scale * scale if EDEN_GROUPS > 1 and not SCALED else 1.0
        squares = _over_blocks(weight * tl.sum(elements * elements, 1), EDEN_GROUPS)
        products = _over_blocks(weight * tl.sum(elements * codes, 1), EDEN_GROUPS)
        correction = tl.where(products > 0.0, tl.div_rn(squares, products), 1.0)
        scale = stochastic_e4m3(correction * scale, _random24_groups(group, key))
        alive = alive & (scale > 0.0)
        codes = tl.where(alive[:, None], codes, 0.0)
        scale = tl.where(alive, scale, 1.0)
    return codes, scale


@triton.jit
def tensor_scale(amax, RANGE: tl.constexpr, POW2: tl.constexpr):
    """T = amax / (C v); 1 for an all-zero tensor; NaN for NaN and Inf, which then reaches the GEMM's output."""
    scale = tl.maximum(tl.div_rn(amax, RANGE), 2.0**-126)
    if POW2:
        scale = next_power_of_two(scale)
    scale = tl.where(amax == 0.0, 1.0, scale)
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def quantize_kernel(src_ptr, src_scales_ptr, src_global_ptr, rotation_ptr, signs_ptr, amax_ptr, rng_ptr, layer_ptr,
                    values_ptr, codes_ptr, scales_ptr, scale_ptr, R, C, dim,
                    AXIS: tl.constexpr, PACKED: tl.constexpr, SQUARE: tl.constexpr, HAS_SIGNS: tl.constexpr,
                    TARGET: tl.constexpr, RANGE: tl.constexpr, POW2: tl.constexpr,
                    SELECT_46: tl.constexpr, ROUNDING: tl.constexpr, EDEN_GROUPS: tl.constexpr, SCALED: tl.constexpr,
                    STREAM: tl.constexpr, STORE_VALUES: tl.constexpr, STORE_PACKED: tl.constexpr,
                    TILE: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Quantize [R, C] in blocks of 16 along AXIS. A program takes every num_programs-th tile of TILE x 128.

    values_ptr: BF16 [R, C]; codes_ptr, scales_ptr: the operand stored as [rows, contraction]; scale_ptr: FP32 [].
    """
    program = tl.program_id(0)
    T = tensor_scale(tl.load(amax_ptr), RANGE, POW2)
    if program == 0:
        outer = T * tl.load(src_global_ptr) if PACKED else T
        tl.store(scale_ptr, outer)
    factor = tl.where(T < TINY_SCALE, TINY_FACTOR, 1.0)
    key = (0, 0, 0, 0, 0)
    if ROUNDING != "rtn":
        key = load_key(rng_ptr, layer_ptr, STREAM)
    rotation = _load_rotation(rotation_ptr, signs_ptr, dim, factor, HAS_SIGNS, INTERPRET)
    TILE_R: tl.constexpr = 128 if AXIS == 0 else TILE
    TILE_C: tl.constexpr = TILE if AXIS == 0 else 128
    contraction = R if AXIS == 0 else C
    tiles_c = tl.cdiv(C, TILE_C)
    tiles = tl.cdiv(R, TILE_R) * tiles_c
    for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=STAGES):
        row0 = (tile // tiles_c) * TILE_R
        col0 = (tile % tiles_c) * TILE_C
        x = _load_tile(src_ptr, src_scales_ptr, row0, col0, R, C, TILE_R, TILE_C, PACKED, SQUARE, INTERPRET)
        if AXIS == 0:
            x = tl.trans(x)
        y = _natural_order(tl.dot(x, rotation), TILE)
        first = col0 if AXIS == 0 else row0
        line = first + tl.arange(0, TILE * 8) // 8
        group_in_line = (row0 if AXIS == 0 else col0) // 16 + tl.arange(0, TILE * 8) % 8
        group = line * (contraction // 16) + group_in_line
        call = group[:, None] * 4 + tl.arange(0, 4)[None, :]
        code, scale = quantize_groups(y, T, factor, call, group, key, TARGET, SELECT_46, ROUNDING, EDEN_GROUPS, SCALED,
                                      INTERPRET)  # fmt: skip
        if STORE_VALUES:
            values = tl.reshape((code * scale[:, None]).to(tl.bfloat16), [TILE, 128])
            if AXIS == 0:
                values = tl.trans(values)
            rows = (row0 + tl.arange(0, TILE_R)).to(tl.int64)
            cols = col0 + tl.arange(0, TILE_C)
            mask = (rows < R)[:, None] & (cols < C)[None, :]
            tl.store(values_ptr + rows[:, None] * C + cols[None, :], values, mask=mask)
        if STORE_PACKED:
            inside = (line < (C if AXIS == 0 else R)) & (group_in_line < contraction // 16)
            low, high = tl.split(tl.reshape(e2m1_code(code, y), [TILE * 8, 8, 2]))
            packed = (low | (high << 4)).to(tl.uint8)
            offsets = group.to(tl.int64)[:, None] * 8 + tl.arange(0, 8)[None, :]
            tl.store(codes_ptr + offsets, packed, mask=inside[:, None])
            tl.store(scales_ptr + group, e4m3_byte(scale), mask=inside)


@triton.jit
def _atomic_max(pointer, value):
    """Non-negative floats order like their bits, NaN above Inf above all numbers: an integer maximum keeps NaN."""
    tl.atomic_max(pointer.to(tl.pointer_type(tl.int32)), value.to(tl.int32, bitcast=True))


@triton.jit
def amax_kernel(src_ptr, src_scales_ptr, rotation_ptr, signs0_ptr, signs1_ptr, amax0_ptr, amax1_ptr, R, C, dim,
                ALONG_0: tl.constexpr, ALONG_1: tl.constexpr, PACKED: tl.constexpr, SQUARE: tl.constexpr,
                TILE: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Largest magnitude of [R, C] rotated along axis 0 and/or axis 1, from one read; atomically into zeroed FP32 []."""
    program = tl.program_id(0)
    TILE_R: tl.constexpr = 128 if ALONG_0 else TILE
    TILE_C: tl.constexpr = 128 if ALONG_1 else TILE
    if ALONG_0:
        rotation0 = _load_rotation(rotation_ptr, signs0_ptr, dim, 1.0, True, INTERPRET)
    if ALONG_1:
        rotation1 = _load_rotation(rotation_ptr, signs1_ptr, dim, 1.0, True, INTERPRET)
    largest0 = tl.zeros([TILE_C], tl.float32)
    largest1 = tl.zeros([TILE_R], tl.float32)
    tiles_c = tl.cdiv(C, TILE_C)
    for tile in tl.range(program, tl.cdiv(R, TILE_R) * tiles_c, tl.num_programs(0), num_stages=STAGES):
        row0 = (tile // tiles_c) * TILE_R
        col0 = (tile % tiles_c) * TILE_C
        x = _load_tile(src_ptr, src_scales_ptr, row0, col0, R, C, TILE_R, TILE_C, PACKED, SQUARE, INTERPRET)
        if ALONG_1:
            largest1 = max_nan(largest1, largest_magnitude(tl.dot(x, rotation1), 1, INTERPRET))
        if ALONG_0:
            largest0 = max_nan(largest0, largest_magnitude(tl.dot(tl.trans(x), rotation0), 1, INTERPRET))
    if ALONG_1:
        _atomic_max(amax1_ptr, largest_magnitude(largest1, 0, INTERPRET))
    if ALONG_0:
        _atomic_max(amax0_ptr, largest_magnitude(largest0, 0, INTERPRET))


@triton.jit
def signs_kernel(rng_ptr, layer_ptr, signs_ptr, STREAM: tl.constexpr, DIM: tl.constexpr, FIXED: tl.constexpr):
    """philox.random_signs: FP32 +1 or -1 [DIM]; word i decides by its top bit. FIXED drops step, micro-batch, layer."""
    k0, k1, step, micro_batch, last = load_key(rng_ptr, layer_ptr, STREAM)
    counter = tl.arange(0, DIM // 4).to(tl.uint32)
    zero = tl.zeros_like(counter)
    if FIXED:
        w0, w1, w2, w3 = philox4x32(counter, zero, zero, zero + STREAM, k0, k1)
    else:
        w0, w1, w2, w3 = philox4x32(counter, zero + step, zero + micro_batch, zero + last, k0, k1)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [DIM])
    tl.store(signs_ptr + tl.arange(0, DIM), 1.0 - 2.0 * (words >> 31).to(tl.int32).to(tl.float32))
