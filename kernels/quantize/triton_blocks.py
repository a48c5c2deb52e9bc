"""Blocks in Triton, the twin of blocks.py: quantize_groups for E2M1 under E4M3 scales by one or two fits, best_of and
what follows it for every other Form.

Candidates are rounded one after the other, and only levels, scales, member and elements of the best so far are kept; in
a loop, for want of registers, elements are not, and are divided out again by the scale that won where they are needed.
"""

import triton
import triton.language as tl

from kernels.quantize.triton_forms import (
    REACH,
    candidate_of,
    candidates_of,
    code_of,
    has_shifts,
    has_sides,
    has_steps,
    hif4_scale,
    is_looped,
    level_in,
    look_up,
    macro_factor,
    members_of,
    nearest,
    neighbour,
    of,
    power_exponent,
    rounded_scale,
    stochastic,
    untagged,
)
from kernels.triton_common import (
    divide,
    middles,
    philox4x32,
    reciprocal_rn,
    round_e2m1,
    round_e4m3,
    stochastic_e2m1,
    stochastic_e4m3,
    top24,
)


@triton.constexpr_function
def is_sr(rounding):
    """Of a kernel's ROUNDING: "sr8" is SR by 8 random bits an element."""
    return rounding in ("sr", "sr8")


@triton.constexpr_function
def calls_of(rounding):
    """Philox calls that 16 elements take."""
    return 1 if rounding == "sr8" else 4


@triton.jit
def _random24_elements(call, key, GROUPS: tl.constexpr, SIZE: tl.constexpr, INTERPRET: tl.constexpr):
    """random24 for each element [GROUPS, SIZE]; Philox call [GROUPS, SIZE / 4] serves four neighbours, call
    [GROUPS, SIZE / 16] sixteen by 8 bits."""
    k0, k1, step, micro_batch, last = key
    counter = call.to(tl.uint32)
    zero = tl.zeros_like(counter)
    w0, w1, w2, w3 = philox4x32(counter, zero + step, zero + micro_batch, zero + last, k0, k1, INTERPRET)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., i, j] is word 2 i + j
    if call.shape[1] * 4 == SIZE:
        return top24(tl.reshape(words, [GROUPS, SIZE]))
    else:
        b0, b1, b2, b3 = middles(words, INTERPRET)
        return tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), [GROUPS, SIZE])


@triton.jit
def _random24_groups(group, key, GROUPS: tl.constexpr, INTERPRET: tl.constexpr):
    """top 24 bits for the scale of each of GROUPS groups, numbered by `group`, or by the even one of each pair."""
    k0, k1, step, micro_batch, last = key
    counter = (group >> 2).to(tl.uint32)
    zero = tl.zeros_like(counter)
    w0, w1, w2, w3 = philox4x32(counter, zero + step, zero + micro_batch, zero + last, k0, k1, INTERPRET)
    upper = (group & 2) == 2
    even, odd = tl.where(upper, w2, w0), tl.where(upper, w3, w1)
    if group.shape[0] == GROUPS:
        word = tl.where((group & 1) == 1, odd, even)
    else:
        is_even = (tl.arange(0, 2) == 0)[None, :]
        word = tl.reshape(tl.where(is_even, even[:, None], odd[:, None]), [GROUPS])
    return top24(word)


@triton.jit
def _round_groups(y, ratio, T, factor, random24, SR: tl.constexpr, INTERPRET: tl.constexpr):
    """Reference `_round_blocks`: (elements, codes [G, 16], block scales, alive [G]) of one select branch."""
    scale = round_e4m3(ratio)
    alive = scale > 0.0
    divisor = tl.where(alive, scale * T * factor, 1.0)
    # A zero reciprocal gives a dead block codes 0.
    reciprocal = tl.where(alive, reciprocal_rn(divisor, INTERPRET), 0.0)
    elements = divide(y, divisor[:, None], reciprocal[:, None], INTERPRET)
    codes = stochastic_e2m1(elements, random24, INTERPRET) if SR else round_e2m1(elements)
    return elements, codes, tl.where(alive, scale, 1.0), alive


@triton.jit
def _fold(x, SIZE: tl.constexpr):
    """Reference `fold`: sum [G, SIZE] over SIZE by adding upper halves to lower halves, in that very order."""
    if SIZE == 2:
        low, high = tl.split(x)
        return low + high
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, SIZE // 2]), [0, 2, 1]))
        return _fold(low + high, SIZE // 2)


@triton.jit
def _squared_error(elements, codes, scale, alive):
    """Reference `_lower_error`, error of one branch in units of T^2; a dead branch loses.

    Bit for bit, if the compiler does not fuse the square into the sums: such kernels run with enable_fp_fusion=False.
    """
    error = codes - elements
    return tl.where(alive, scale * scale * _fold(error * error, error.shape[1]), float("inf"))


@triton.jit
def _over_blocks(per_group, EDEN_GROUPS: tl.constexpr):
    """Sum [G] over each EDEN_GROUPS neighbours, repeated over them."""
    if EDEN_GROUPS == 1:
        return per_group
    blocks = tl.reshape(per_group, [per_group.shape[0] // EDEN_GROUPS, EDEN_GROUPS])
    total = tl.broadcast_to(tl.sum(blocks, 1)[:, None], blocks.shape)
    return tl.reshape(total, per_group.shape)


@triton.jit
def _corrected(elements, codes, scale, alive, group, key, EDEN_GROUPS: tl.constexpr, SCALED: tl.constexpr,
               SETTLED: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Reference `correct`, MS-EDEN: (codes, block scales, alive). Not SETTLED: blocks that died here keep their codes
    and have scale 0."""
    weight = scale * scale if EDEN_GROUPS > 1 and not SCALED else 1.0
    squares = _over_blocks(weight * tl.sum(elements * elements, 1), EDEN_GROUPS)
    products = _over_blocks(weight * tl.sum(elements * codes, 1), EDEN_GROUPS)
    quotient = divide(squares, products, reciprocal_rn(products, INTERPRET), INTERPRET)
    correction = tl.where(products > 0.0, quotient, 1.0)
    scale = stochastic_e4m3(correction * scale, _random24_groups(group, key, scale.shape[0], INTERPRET))
    if not SETTLED:
        return codes, scale, alive
    alive = alive & (scale > 0.0)
    codes = tl.where(alive[:, None], codes, 0.0)
    return codes, tl.where(alive, scale, 1.0), alive


@triton.jit
def quantize_groups(y, T, factor, call, calls, group, key, TARGET: tl.constexpr, SELECT_46: tl.constexpr,
                    ROUNDING: tl.constexpr, EDEN_GROUPS: tl.constexpr, SCALED: tl.constexpr,
                    SETTLED: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Reference `quantize_blocks`: FP32 codes [G, n] and block scales [G] of y [G, n] (n = 16, or 256 for tiles).

    T: tensor scale; y carries `factor`. call [G, n/16 * calls_of], group [G]: Philox call numbers of elements and of
    block scales; calls: how many the elements take in all (a second stochastic branch goes on from there). A group
    [G / 2] numbers the first of each pair of neighbours, if that is always even: a pair then shares one Philox call.
    """
    SR: tl.constexpr = is_sr(ROUNDING)
    random24 = _random24_elements(call, key, y.shape[0], y.shape[1], INTERPRET) if SR else 0.0
    largest = TARGET * T * factor
    ratio = divide(tl.max(tl.abs(y), 1), largest, tl.div_rn(1.0, largest), INTERPRET)
    elements, codes, scale, alive = _round_groups(y, ratio, T, factor, random24, SR, INTERPRET)
    if SELECT_46:
        random24 = _random24_elements(call + calls, key, y.shape[0], y.shape[1], INTERPRET) if SR else 0.0
        elements4, codes4, scale4, alive4 = _round_groups(y, 1.5 * ratio, T, factor, random24, SR, INTERPRET)
        four = _squared_error(elements4, codes4, scale4, alive4) < _squared_error(elements, codes, scale, alive)
        codes = tl.where(four[:, None], codes4, codes)
        scale = tl.where(four, scale4, scale)
        if ROUNDING == "ms_eden":
            elements = tl.where(four[:, None], elements4, elements)
            alive = tl.where(four, alive4, alive)
    if ROUNDING == "ms_eden":
        codes, scale, alive = _corrected(elements, codes, scale, alive, group, key, EDEN_GROUPS, SCALED, SETTLED,
                                         INTERPRET)  # fmt: skip
    return codes, scale


# --- every other form -----------------------------------------------------------------------------


@triton.jit
def quantize_form(
    y, T, factor, call, group, key, table_ptr, FORM: tl.constexpr, ROUNDING: tl.constexpr,
    EDEN_GROUPS: tl.constexpr, TAGGED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """(levels [G, n], 4-bit codes [G, n], block scales [G], members [G]) of y [G, 16], or of tiles.

    n: elements under one scale. Codes and members are int32, codes right if TAGGED. Arguments as those
    of `quantize_groups`.
    """
    GROUP: tl.constexpr = of(FORM, "group") if y.shape[1] == 16 else y.shape[1]
    BLOCKS: tl.constexpr = y.shape[0] * y.shape[1] // GROUP
    random24 = 0.0
    if is_sr(ROUNDING):
        random24 = _random24_elements(call, key, y.shape[0], y.shape[1], INTERPRET)
        random24 = tl.reshape(random24, [BLOCKS, GROUP])
    y = tl.reshape(y, [BLOCKS, GROUP])
    if of(FORM, "scales") == "hif4":
        return _hif4(y, FORM)
    elif of(FORM, "scales") == "e8m0":
        return _mxfp4(y, random24, FORM, ROUNDING, INTERPRET)
    else:
        return _competed(y, T, factor, random24, group, key, table_ptr, FORM, ROUNDING, EDEN_GROUPS, TAGGED,
                         INTERPRET)  # fmt: skip


@triton.jit
def _competed(
    y, T, factor, random24, group, key, table_ptr, FORM: tl.constexpr, ROUNDING: tl.constexpr,
    EDEN_GROUPS: tl.constexpr, TAGGED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Blocks under E4M3 or UE5M3 scales."""
    x = y
    if of(FORM, "looked_up"):
        q, scale, alive, member, x = _best_table(y, T, factor, table_ptr, FORM, INTERPRET)
    else:
        q, scale, alive, member, x = _best_of(y, T, factor, FORM, TAGGED, INTERPRET)
        if is_looped(FORM) and (ROUNDING != "rtn" or (TAGGED and has_shifts(FORM))):
            x = _elements(y, scale, alive, T, factor, INTERPRET)
    if is_sr(ROUNDING):
        q = _rounded_again(q, x, member, random24, FORM, TAGGED, INTERPRET)
    levels = untagged(q, FORM, TAGGED and not of(FORM, "looked_up"))
    if ROUNDING == "ms_eden":
        levels, scale, alive = _corrected(x, levels, scale, alive, group, key, EDEN_GROUPS, False,
                                          True, INTERPRET)  # fmt: skip
    if members_of(FORM) > 1:  # blocks.settle_dead
        levels = tl.where(alive[:, None], levels, 0.0)
        member = tl.where(alive, member, of(FORM, "zero_member"))
    codes = tl.zeros(y.shape, tl.int32)
    if TAGGED and of(FORM, "looked_up"):
        entry = look_up(x, table_ptr, 1, FORM, INTERPRET)
        codes = tl.where(alive[:, None], entry >> (member * 4)[:, None], of(FORM, "empty_code")) & 15
    elif TAGGED:
        q = tl.where(alive[:, None], q, of(FORM, "empty"))
        codes = _codes(q, x if has_shifts(FORM) else y, member, FORM)
    return levels, codes, scale, member


@triton.jit
def _best_of(y, T, factor, FORM: tl.constexpr, TAGGED: tl.constexpr, INTERPRET: tl.constexpr):
    """blocks.best_of: (levels, scales, alive, member, elements; in a loop those of the first candidate)."""
    high, low = _reaches(y, FORM)
    q, scale, alive, error, x = _candidate(y, high, low, T, factor, 0, False, FORM, TAGGED, INTERPRET)
    member = tl.zeros(high.shape, tl.int32)
    if is_looped(FORM):  # unrolled, the registers of all candidates together would spill
        for c in tl.range(1, candidates_of(FORM), num_stages=1):
            made = _candidate(y, high, low, T, factor, c, True, FORM, TAGGED, INTERPRET)
            take = made[3] < error
            member = tl.where(take, of_candidate(c, "member", FORM).to(tl.int32), member)
            q, scale, alive, error = _lower(take, q, scale, alive, error, made)
    else:
        for c in tl.static_range(1, candidates_of(FORM)):
            made = _candidate(y, high, low, T, factor, c, False, FORM, TAGGED, INTERPRET)
            take = made[3] < error
            member = tl.where(take, candidate_of(FORM, c, "member"), member)
            q, scale, alive, error = _lower(take, q, scale, alive, error, made)
            x = tl.where(take[:, None], made[4], x)
    return q, scale, alive, member, x


@triton.jit
def _best_table(y, T, factor, table_ptr, FORM: tl.constexpr, INTERPRET: tl.constexpr):
    """_best_of where the members share a scale and are looked up together; and the elements."""
    high, low = _reaches(y, FORM)
    up, down = candidate_of(FORM, 0, "up") * T * factor, candidate_of(FORM, 0, "down") * T * factor
    scale, alive = _fitted(high, low, up, down, 1.0, 0, FORM, INTERPRET)
    elements = _elements(y, scale, alive, T, factor, INTERPRET)
    entry = look_up(elements, table_ptr, 0, FORM, INTERPRET)
    levels = level_in(entry, 0)
    error = _squared_error(elements, levels, scale, alive)
    member = tl.zeros(scale.shape, tl.int32)
    for m in tl.static_range(1, members_of(FORM)):
        other = level_in(entry, m)
        other_error = _squared_error(elements, other, scale, alive)
        take = other_error < error
        levels = tl.where(take[:, None], other, levels)
        error = tl.where(take, other_error, error)
        member = tl.where(take, m, member)
    return levels, scale, alive, member, elements


@triton.jit
def _lower(take, q, scale, alive, error, other):
    """blocks.merged: `other` where `take`."""
    return (
        tl.where(take[:, None], other[0], q),
        tl.where(take, other[1], scale),
        tl.where(take, other[2], alive),
        tl.where(take, other[3], error),
    )


@triton.jit
def _candidate(
    y, high, low, T, factor, c, LOOPED: tl.constexpr, FORM: tl.constexpr, TAGGED: tl.constexpr, INTERPRET: tl.constexpr
):
    """(levels, block scales, alive, squared error, elements) of candidate c, a constant unless LOOPED."""
    if LOOPED:
        up, down = of_candidate(c, "up", FORM), of_candidate(c, "down", FORM)
        stretch, step = of_candidate(c, "stretch", FORM), of_candidate(c, "step", FORM).to(tl.int32)
    else:
        up, down = candidate_of(FORM, c, "up"), candidate_of(FORM, c, "down")
        stretch, step = candidate_of(FORM, c, "stretch"), candidate_of(FORM, c, "step")
    scale, alive = _fitted(high, low, up * T * factor, down * T * factor, stretch, step, FORM, INTERPRET)
    elements = _elements(y, scale, alive, T, factor, INTERPRET)
    if LOOPED:
        shift = of_candidate(c, "shift", FORM)
        q = round_e2m1(elements - shift) + shift
    else:
        q = nearest(elements, FORM, candidate_of(FORM, c, "member"), TAGGED)
    return q, scale, alive, _squared_error(elements, untagged(q, FORM, TAGGED), scale, alive), elements


@triton.jit
def of_candidate(c, NAME: tl.constexpr, FORM: tl.constexpr):
    """A field of candidate c, which is no constant."""
    value = tl.zeros([], tl.float32) + candidate_of(FORM, 0, NAME)
    for i in tl.static_range(1, candidates_of(FORM)):
        value = tl.where(c == i, candidate_of(FORM, i, NAME), value)
    return value


@triton.jit
def _reaches(y, FORM: tl.constexpr):
    """How far blocks reach up and down; their largest magnitudes twice where no grid has sides."""
    if has_sides(FORM):
        return tl.maximum(tl.max(y, 1), 0.0), tl.maximum(-tl.min(y, 1), 0.0)
    else:
        largest = tl.max(tl.abs(y), 1)
        return largest, largest


@triton.jit
def _fitted(high, low, up, down, stretch, step, FORM: tl.constexpr, INTERPRET: tl.constexpr):
    """(block scales, alive) that fit reaches to ends."""
    ratio = divide(high, up, reciprocal_rn(up, INTERPRET), INTERPRET)
    if has_sides(FORM):
        ratio = tl.maximum(ratio, divide(low, down, reciprocal_rn(down, INTERPRET), INTERPRET))
    scale = rounded_scale(stretch * ratio, FORM)
    alive = scale > 0.0
    if has_steps(FORM):
        scale = neighbour(scale, step)
    return tl.where(alive, scale, 1.0), alive


@triton.jit
def _elements(y, scale, alive, T, factor, INTERPRET: tl.constexpr):
    """y in units of its blocks' scales; 0 in a dead block."""
    divisor = tl.where(alive, scale * T * factor, 1.0)
    reciprocal = tl.where(alive, reciprocal_rn(divisor, INTERPRET), 0.0)
    return divide(y, divisor[:, None], reciprocal[:, None], INTERPRET)


@triton.jit
def _rounded_again(
    q, elements, member, random24, FORM: tl.constexpr, TAGGED: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """blocks.round_again: stochastically, by the grid that was chosen."""
    q = stochastic(elements, random24, FORM, 0, TAGGED, INTERPRET)
    for m in tl.static_range(1, members_of(FORM)):
        other = stochastic(elements, random24, FORM, m, TAGGED, INTERPRET)
        q = tl.where((member == m)[:, None], other, q)
    return q


@triton.jit
def _codes(q, x, member, FORM: tl.constexpr):
    """4-bit codes; x, what was rounded, gives zeros their signs."""
    codes = code_of(q, x, FORM, 0)
    for m in tl.static_range(1, members_of(FORM)):
        codes = tl.where((member == m)[:, None], code_of(q, x, FORM, m), codes)
    return codes


@triton.jit
def _mxfp4(y, random24, FORM: tl.constexpr, ROUNDING: tl.constexpr, INTERPRET: tl.constexpr):
    """Blocks of 32 under powers of two. A power's inverse is exact, a factor lies in [1, 2)."""
    if of(FORM, "rule") == "rms":
        largest = REACH * tl.sqrt_rn(_fold(y * y, y.shape[1]) * (1.0 / y.shape[1]))
    else:
        largest = tl.max(tl.abs(y), 1)
    if of(FORM, "macro_bits") is not None:
        fours = tl.max(tl.reshape(largest, [largest.shape[0] // 4, 4]), 1)
        macro = _spread(macro_factor(fours, FORM), 4)
        largest = tl.div_rn(largest, macro)
    exponent = power_exponent(largest, FORM)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    if of(FORM, "prescale") != 1.0:
        y = y * of(FORM, "prescale")
    if of(FORM, "rule") == "rms":  # up to 2^127, and 0 for a block whose squares all vanish
        x = y * 0.5 * ((255 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        x = tl.where((largest > 0.0)[:, None], x, 0.0)
    else:
        x = y * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    if of(FORM, "macro_bits") is not None:
        x = divide(x, macro[:, None], tl.div_rn(1.0, macro)[:, None], INTERPRET)
        scale = scale * macro
    if is_sr(ROUNDING):
        q = stochastic(x, random24, FORM, 0, False, INTERPRET)
    else:
        q = nearest(x, FORM, 0, False)
    scale = tl.where(largest > 0.0, scale, 1.0)
    return q, code_of(q, y, FORM, 0), scale, tl.zeros(scale.shape, tl.int32)


@triton.jit
def _hif4(y, FORM: tl.constexpr):
    """Blocks of 64 with a bit for each 8 and each 4: HiFloat4.round and elements. y [G, 4]."""
    FOURS: tl.constexpr = y.shape[0]
    fours = tl.max(tl.abs(y), 1)
    eights = tl.max(tl.reshape(fours, [FOURS // 2, 2]), 1)
    s, reciprocal = hif4_scale(tl.max(tl.reshape(eights, [FOURS // 16, 8]), 1))
    by8 = tl.where(eights * _spread(reciprocal, 8) >= 4.0, 2.0, 1.0)
    by8 = _spread(by8, 2)
    reciprocal = _spread(reciprocal, 16)
    inverse = tl.where(by8 == 2.0, 0.5, 1.0)
    by4 = tl.where(fours * reciprocal * inverse >= 2.0, 2.0, 1.0)
    scale = _spread(s, 16) * by8 * by4
    x = y * (reciprocal * inverse * tl.where(by4 == 2.0, 0.5, 1.0))[:, None]
    q = nearest(x, FORM, 0, False)
    return q, code_of(q, y, FORM, 0), scale, tl.zeros(scale.shape, tl.int32)


@triton.jit
def _spread(x, TIMES: tl.constexpr):
    """[N] -> [N * TIMES], each number repeated."""
    wide = tl.broadcast_to(x[:, None], [x.shape[0], TIMES])
    return tl.reshape(wide, [x.shape[0] * TIMES])
