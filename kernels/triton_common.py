"""Triton building blocks of the 4-bit quantizers: rounding, division, Philox bits, E2M1 and E4M3 codes.

Everything here is FP32 and 32-bit integer arithmetic without float8 casts, so that the kernels compile for every
architecture and the interpreter, whose float8 casts are wrong (docs/kernels.md#5-triton), gives the same bits. What
it can't run
(PTX, fused multiply-add) has another branch for it, by INTERPRET; and E2M1 on Blackwell has a conversion instruction
that replaces the arithmetic (`has_e2m1_instruction`). The definition is
kernels/formats (minifloat.py, nvfp4.py) and kernels/philox.py; each function below names the one it repeats.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

# 1.5 * 2^(23 - mantissa_bits): adding and subtracting that many binades rounds to the format's step (minifloat.py).
E2M1_SHIFT = tl.constexpr(1.5 * 2.0**22)
E4M3_SHIFT = tl.constexpr(1.5 * 2.0**20)
E5M2_SHIFT = tl.constexpr(1.5 * 2.0**21)
E4M3_MIN_NORMAL = tl.constexpr(2.0**-6)
E5M2_MIN_NORMAL = tl.constexpr(2.0**-14)
E4M3_MAX = tl.constexpr(448.0)
E5M2_MAX = tl.constexpr(57344.0)
EXPONENT_MASK = tl.constexpr(0x7F800000)
RANDOM_RANGE = tl.constexpr(2.0**24)
SIGN_BIT = tl.constexpr(-(2**31))
PAIR_SIGNS = tl.constexpr(0x80008000 - 2**32)
HIGH_HALF = tl.constexpr(-(2**16))
PAIR_CODES = tl.constexpr(0x01C001C0)


@triton.constexpr_function
def has_e2m1_instruction():
    """Whether the GPU that a kernel is compiled for converts FP32 to E2M1 (cvt.rn.satfinite.e2m1x2.f32): Blackwell.

    That is sm_100a, sm_103a, sm_110a, sm_120a and sm_121a (PTX ISA, cvt; Triton always asks for the "a" features).
    Nobody here has one. What says that the instruction gives our codes: it is what cuda_fp4.h's converter compiles to,
    that converter's host code gives our codes for every tie, the floats beside it, saturation, both zeros and a million
    random numbers (tests/kernels/test_csrc_host.py), and python -m kernels.selftest compares every quantizer with the
    reference, byte by byte, on the chip. NaN differs (6 here), which no output shows: a NaN makes the tensor scale NaN.
    """
    return not triton.knobs.runtime.interpret and cuda_capability_geq(10, 0)


@triton.jit
def binade(magnitude):
    """The power of two at or below a positive FP32 value."""
    return (magnitude.to(tl.int32, bitcast=True) & EXPONENT_MASK).to(tl.float32, bitcast=True)


@triton.constexpr_function
def interpreted():
    return triton.knobs.runtime.interpret


@triton.jit
def _clamped(x, LIMIT: tl.constexpr):
    """x's sign on min(|x|, LIMIT)."""
    if interpreted():
        return tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    return tl.inline_asm_elementwise(
        "min.xorsign.abs.f32 $0, $1, $2;", "=f,f,f", [x, LIMIT], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _floored(x, LIMIT: tl.constexpr):
    """x's sign on max(|x|, LIMIT)."""
    if interpreted():
        return tl.where(x < 0.0, tl.minimum(x, -LIMIT), tl.maximum(x, LIMIT))
    return tl.inline_asm_elementwise(
        "max.xorsign.abs.f32 $0, $1, $2;", "=f,f,f", [x, LIMIT], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def reciprocal_rn(d, INTERPRET: tl.constexpr):
    """IEEE 1 / d of normal d up to 2^126, without the branch of a division that compilers put there for other d.

    The chip's approximation is within one unit and one Newton step with fused products rounds it right, as in the
    division it replaces.
    """
    if INTERPRET:
        return tl.div_rn(1.0, d)
    near = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], tl.float32, is_pure=True, pack=1)
    return tl.fma(near, tl.fma(near, -d, 1.0), near)


@triton.jit
def round_e2m1(x):
    """formats.round_nearest(x, E2M1). The product inside each fma is exact, so fused or not gives the same bits."""
    if has_e2m1_instruction():
        # To E2M1 and back, two elements at a time; adding +0 makes minus zeros positive.
        return (
            tl.inline_asm_elementwise(
                """{
            .reg .b8 codes;
            .reg .b16 first, second;
            .reg .b32 both;
            cvt.rn.satfinite.e2m1x2.f32 codes, $3, $2;
            cvt.rn.f16x2.e2m1x2 both, codes;
            mov.b32 {first, second}, both;
            cvt.f32.f16 $0, first;
            cvt.f32.f16 $1, second;
            }""",
                "=f,=f,f,f",
                [x],
                dtype=tl.float32,
                is_pure=True,
                pack=2,
            )
            + 0.0
        )
    # With K of x's sign and binade, or 1, x + 2^22 K has steps of half a binade, that is E2M1's. 2^22 K is an even
    # number of steps where x is a tie, so ties go to even; the factor keeps the sum from the next binade, whose steps
    # are wider. Where the factor takes K to the binade below, x is its lower end up to 2^-20 and rounds to that end.
    x = _clamped(x, 6.0)
    power = _floored(x * (1.0 - 2.0**-20), 1.0)
    return tl.fma(power, -(2.0**22), tl.fma(power, 2.0**22, x))


@triton.jit
def nearest_bf16(x, INTERPRET: tl.constexpr):
    """x rounded to BF16, as FP32. One instruction: the upper half of a pair of BF16 is an FP32 number."""
    if INTERPRET:
        return x.to(tl.bfloat16).to(tl.float32)
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 zero;
        .reg .b32 both;
        mov.f32 zero, 0f00000000;
        cvt.rn.bf16x2.f32 both, $1, zero;
        mov.b32 $0, both;
        }""",
        "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def round_e4m3(x):
    """formats.round_nearest(x, E4M3) of non-negative x."""
    x = tl.minimum(x, E4M3_MAX)
    power = tl.maximum(binade(x), E4M3_MIN_NORMAL)
    return tl.fma(power, -E4M3_SHIFT, tl.fma(power, E4M3_SHIFT, x))


@triton.jit
def stochastic_e2m1(x, random24, INTERPRET: tl.constexpr):
    """formats.round_stochastic(x, E2M1, random24).

    Between neighbours low <= |x| < low + step: up iff |x| - random24 * 2^-24 * step > low, so the result is that
    difference rounded up to a multiple of step. Upward rounding of the difference itself can't carry it past one.

    Not cvt.rs.satfinite.e2m1x4: its random bits are not the contract's (docs/numerics.md#5-random-bits), and sm_120
    has no such instruction.
    """
    magnitude = tl.minimum(tl.abs(x), 6.0)
    power = binade(tl.maximum(magnitude, 1.0))  # 2 * step
    if INTERPRET:
        steps = (magnitude.to(tl.float64) - random24.to(tl.float64) * (power * 2.0**-25)) / (power * 0.5)
        rounded = tl.abs(tl.ceil(steps) * (power * 0.5)).to(tl.float32)
    else:
        lowered = fma_up(random24, power * -(2.0**-25), magnitude)
        rounded = tl.fma(power, -E2M1_SHIFT, fma_up(power, E2M1_SHIFT, lowered))
    sign = x.to(tl.int32, bitcast=True) & SIGN_BIT
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def fma_up(a, b, c):
    """a * b + c, rounded once and towards +infinity."""
    return tl.inline_asm_elementwise(
        "fma.rp.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def stochastic_e4m3(x, random24):
    """formats.round_stochastic(x, E4M3, random24) of non-negative x."""
    x = tl.minimum(x, E4M3_MAX)
    step = tl.maximum(binade(x), E4M3_MIN_NORMAL) * 0.125
    # x / step by its reciprocal, exactly: both are powers of two, whose exponent fields add up to 2 * 127.
    steps = x * (0x7F000000 - step.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    low = tl.floor(steps)
    return tl.where(random24 < (steps - low) * RANDOM_RANGE, low + 1.0, low) * step


@triton.jit
def round_fp8(x, IS_E4M3: tl.constexpr):
    """formats.round_nearest(x, E4M3 or E5M2) of signed x."""
    MAX: tl.constexpr = E4M3_MAX if IS_E4M3 else E5M2_MAX
    TINY: tl.constexpr = E4M3_MIN_NORMAL if IS_E4M3 else E5M2_MIN_NORMAL
    SHIFT: tl.constexpr = E4M3_SHIFT if IS_E4M3 else E5M2_SHIFT
    x = tl.minimum(tl.maximum(x, -MAX), MAX)
    power = tl.maximum(binade(tl.abs(x)), TINY)
    return tl.fma(power, -SHIFT, tl.fma(power, SHIFT, x))


@triton.constexpr_function
def has_fp8_instruction():
    """Whether the GPU that a kernel is compiled for converts FP32 to FP8 (cvt.rn.satfinite.e4m3x2.f32): Ada, Hopper."""
    return not triton.knobs.runtime.interpret and cuda_capability_geq(8, 9)


@triton.jit
def fp8_bytes(x, IS_E4M3: tl.constexpr):
    """The bytes of round_fp8(x, IS_E4M3), uint8; zeros are positive."""
    if has_fp8_instruction():
        # Four elements at a time; minus zeros, which the arithmetic below never gives, lose their sign.
        CONVERT: tl.constexpr = "cvt.rn.satfinite.e4m3x2.f32" if IS_E4M3 else "cvt.rn.satfinite.e5m2x2.f32"
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; .reg .b32 all, size, sign; "
            + CONVERT
            + " low, $2, $1; "
            + CONVERT
            + " high, $4, $3; mov.b32 all, {low, high}; and.b32 size, all, 0x7F7F7F7F; "
            "add.u32 sign, size, 0x7F7F7F7F; and.b32 sign, sign, 0x80808080; and.b32 sign, sign, all; "
            "or.b32 $0, size, sign; }",
            "=r,f,f,f,f",
            [x],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    values = round_fp8(x, IS_E4M3)
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 128
    if IS_E4M3:
        magnitude = (tl.abs(values) * 2.0**-120).to(tl.int32, bitcast=True) >> 20
    else:
        magnitude = (tl.abs(values) * 2.0**-112).to(tl.int32, bitcast=True) >> 21
    return (magnitude | sign).to(tl.uint8)


@triton.jit
def divide(x, d, reciprocal, INTERPRET: tl.constexpr):
    """IEEE x / d from reciprocal = RN(1 / d): Markstein's correction, one fused remainder and one fused update.

    Three instructions an element instead of about ten. The interpreter's fma rounds twice, so it divides.
    """
    if INTERPRET:
        return tl.where(reciprocal == 0.0, 0.0, tl.div_rn(x, d))
    quotient = x * reciprocal
    return tl.fma(tl.fma(quotient, -d, x), reciprocal, quotient)  # -quotient would be a second product


@triton.jit
def e2m1_code(value, source):
    """nibbles.encode: grid value -> code 0 .. 15 (int32), the sign bit taken from `source`.

    |value| * 2^-126 puts E2M1's subnormal 0.5 on FP32's subnormal 2^-127, so that the code is the bits from 22 up.
    """
    magnitude = (tl.abs(value) * 2.0**-126).to(tl.int32, bitcast=True) >> 22
    return magnitude | ((source.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def e4m3_byte(value):
    """The byte of a non-negative E4M3 value held in FP32: bias 7 instead of 127, so 2^-120 aligns the subnormals."""
    return ((value * 2.0**-120).to(tl.int32, bitcast=True) >> 20).to(tl.uint8)


@triton.jit
def e4m3_value(byte):
    """The FP32 value of a non-negative E4M3 byte (block scales have no sign and no NaN)."""
    return ((byte.to(tl.int32) & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def encode_bytes(values, source):
    """Grid values [G, 2 n] -> int32 [G, n] bytes of two codes (nibbles.pack: the earlier one in the lower half)."""
    PAIRS: tl.constexpr = [values.shape[0], values.shape[1] // 2, 2]
    if has_e2m1_instruction():
        sign = source.to(tl.int32, bitcast=True) & SIGN_BIT
        signed = (tl.abs(values).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        low, high = tl.split(tl.reshape(signed, PAIRS))
        return tl.inline_asm_elementwise(
            "{ .reg .b8 codes; cvt.rn.satfinite.e2m1x2.f32 codes, $2, $1; cvt.u32.u8 $0, codes; }",
            "=r,f,f",
            [low, high],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    low, high = tl.split(tl.reshape(e2m1_code(values, source), PAIRS))
    return low | (high << 4)


@triton.jit
def encode_words(values, source):
    """Grid values [G, 16] -> int32 [G * 2] words of 8 codes, the earliest in the lowest nibble."""
    GROUPS: tl.constexpr = values.shape[0]
    if has_e2m1_instruction():
        pairs = tl.reshape(encode_bytes(values, source), [GROUPS * 2, 4])
        return tl.sum(pairs << (tl.arange(0, 4) * 8)[None, :], 1)
    codes = tl.reshape(e2m1_code(values, source), [GROUPS * 2, 8])
    return tl.sum(codes << (tl.arange(0, 8) * 4)[None, :], 1)


@triton.jit
def both_halves(pairs):
    """Words of two BF16 numbers [G, n] -> FP32 [G, 2 n]."""
    low, high = (pairs << 16).to(tl.float32, bitcast=True), (pairs & HIGH_HALF).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), [pairs.shape[0], 2 * pairs.shape[1]])


@triton.jit
def two_bf16(x):
    """int32: an FP32 number that is exact in BF16, as two of them."""
    bits = x.to(tl.int32, bitcast=True)
    return bits | ((bits >> 16) & 0xFFFF)


@triton.jit
def joined(low, high):
    """[G, 2 n] of its two halves."""
    return tl.reshape(tl.permute(tl.join(low, high), [0, 2, 1]), [low.shape[0], 2 * low.shape[1]])


@triton.jit
def halves(x):
    """The first and the second half of each row of [G, n]."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def values_and_word(even, odd, twice, pairs):
    """Of 8 neighbours: values as words of two BF16 numbers [G, 4] and the word of their codes [G], as `encode_words`.

    even, odd [G, 4]: grid values; twice: the block's scale as two BF16 numbers; pairs: what was quantized, for signs.
    Times 2^-126 the bits of a grid value that are its code are 8 to 6 of each half (as in _decode_pair); six bits
    higher they stand beside the sign, in the upper half of a byte. The value's own sign, which zeros have not kept,
    falls into a byte that is not taken.
    """
    values, nibbles = tl.inline_asm_elementwise(
        """{
        .reg .b32 both, code, tiny;
        cvt.rn.bf16x2.f32 both, $3, $2;
        mul.rn.bf16x2 $0, both, $5;
        mov.b32 tiny, 0x00800080;
        mul.rn.bf16x2 code, both, tiny;
        shl.b32 code, code, 6;
        lop3.b32 $1, code, $4, 0x80008000, 0xF8;  // code | (pair & signs)
        }""",
        "=r,=r,f,f,r,r",
        [even, odd, pairs, twice],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    first, second = tl.split(tl.reshape(nibbles, [nibbles.shape[0], 2, 2]))  # pairs 0, 2 and pairs 1, 3
    pair0, pair2 = tl.split(first)
    pair1, pair3 = tl.split(second)
    word = tl.inline_asm_elementwise(
        """{
        .reg .b32 early, late, even, odd;
        prmt.b32 early, $1, $2, 0x7531;
        prmt.b32 late, $3, $4, 0x7531;
        prmt.b32 even, early, late, 0x6420;
        prmt.b32 odd, early, late, 0x7531;
        shr.u32 even, even, 4;
        or.b32 $0, even, odd;
        }""",
        "=r,r,r,r,r",
        [pair0, pair1, pair2, pair3],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    return values, word


@triton.jit
def _decode_pair(words, scales, INDEX: tl.constexpr, INTERPRET: tl.constexpr):
    """Codes INDEX and INDEX + 4 of each word, [..., 2], decoded in both halves of a word at once."""
    top = words << (12 - 4 * INDEX)
    bits = (top & PAIR_SIGNS) | ((top >> 6) & PAIR_CODES)
    if INTERPRET:
        low, high = (bits << 16).to(tl.float32, bitcast=True), (bits & HIGH_HALF).to(tl.float32, bitcast=True)
    else:
        low = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low * scales, high * scales)


@triton.jit
def decode_words(words, scale_bytes, ROWS: tl.constexpr, COLS: tl.constexpr, INTERPRET: tl.constexpr):
    """int32 words of 8 codes [ROWS, COLS / 8] and E4M3 bytes [ROWS, COLS / 16] -> BF16 [ROWS, COLS] values * 2^-8.

    A code's bits at 15 and 8..6 are E2M1 on BF16's smallest exponents, times 2^-126. The factor 2^118 * scale (at most
    2^127) undoes that up to 2^-8 in one product, exactly; in FP32 when interpreting. Joined, words stay in one thread.
    """
    scales = e4m3_value(scale_bytes) * 2.0**118
    scales = scales if INTERPRET else scales.to(tl.bfloat16)
    scales = tl.reshape(tl.broadcast_to(scales[:, :, None], [ROWS, COLS // 16, 2]), [ROWS, COLS // 8])
    even = tl.join(_decode_pair(words, scales, 0, INTERPRET), _decode_pair(words, scales, 2, INTERPRET))
    odd = tl.join(_decode_pair(words, scales, 1, INTERPRET), _decode_pair(words, scales, 3, INTERPRET))
    return tl.reshape(tl.join(even, odd), [ROWS, COLS])


@triton.jit
def next_power_of_two(x):
    """formats.next_power_of_two."""
    return ((x.to(tl.int32, bitcast=True) + 0x7FFFFF) & EXPONENT_MASK).to(tl.float32, bitcast=True)


@triton.jit
def wide_product(a, b, INTERPRET: tl.constexpr):
    """(low, high) 32-bit words of the product of uint32 a and b. As plain code it becomes two multiplications."""
    if INTERPRET:
        return a * b, tl.umulhi(a, b)
    return tl.inline_asm_elementwise(
        "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$0, $1}, p; }", "=r,=r,r,r", [a, b], (tl.uint32, tl.uint32),
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1, INTERPRET: tl.constexpr):
    """philox.philox4x32 on uint32 words."""
    for _ in tl.static_range(10):
        low0, high0 = wide_product(c0, 0xD2511F53, INTERPRET)
        low1, high1 = wide_product(c2, 0xCD9E8D57, INTERPRET)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def load_key(rng_ptr, layer_ptr, STREAM: tl.constexpr):
    """(key 0, key 1, step, micro-batch, layer << 8 | stream) as uint32, from the int64 device tensors of design 3.5."""
    seed = tl.load(rng_ptr)
    step = tl.load(rng_ptr + 1)
    micro_batch = tl.load(rng_ptr + 2)
    last = tl.load(layer_ptr) * 256 + STREAM
    return (
        (seed & 0xFFFFFFFF).to(tl.uint32),
        ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (step & 0xFFFFFFFF).to(tl.uint32),
        (micro_batch & 0xFFFFFFFF).to(tl.uint32),
        (last & 0xFFFFFFFF).to(tl.uint32),
    )


@triton.jit
def top24(word):
    """The top 24 bits of a 32-bit word as an FP32 integer, exact."""
    return (word >> 8).to(tl.int32).to(tl.float32)


@triton.jit
def _middle(word):
    return (word & 0xFF).to(tl.int32).to(tl.float32) * 2.0**16 + 2.0**15


@triton.jit
def middles(word, INTERPRET: tl.constexpr):
    """philox.random24 of 8 bits: of each byte b of a word, from the lowest, (b + 1/2) * 2^16 in FP32, exact.

    Between the bytes 4B 00 and 80 a byte is the FP32 number 2^23 + (b + 1/2) * 2^8, which one instruction makes.
    """
    if INTERPRET:
        return _middle(word), _middle(word >> 8), _middle(word >> 16), _middle(word >> 24)
    b0, b1, b2, b3 = tl.inline_asm_elementwise(
        """{
        prmt.b32 $0, $4, 0x4B000080, 0x7504;
        prmt.b32 $1, $4, 0x4B000080, 0x7514;
        prmt.b32 $2, $4, 0x4B000080, 0x7524;
        prmt.b32 $3, $4, 0x4B000080, 0x7534;
        }""",
        "=r,=r,=r,=r,r", [word], (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip
    return (
        tl.fma(b0, 256.0, -(2.0**31)),
        tl.fma(b1, 256.0, -(2.0**31)),
        tl.fma(b2, 256.0, -(2.0**31)),
        tl.fma(b3, 256.0, -(2.0**31)),
    )


@triton.jit
def max_nan(a, b):
    """Maximum that keeps NaN; the plain one would hide a NaN in amax."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _larger_magnitude(a, b):
    """max(|a|, |b|), NaN if there is one, under some sign. One instruction, where |x| of max.NaN takes another."""
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def largest_magnitude(x, AXIS: tl.constexpr, INTERPRET: tl.constexpr):
    """max |x| along AXIS, NaN if there is one. The interpreter runs a custom reduction element by element: too slow."""
    return tl.max(tl.abs(x), AXIS) if INTERPRET else tl.abs(tl.reduce(x, AXIS, _larger_magnitude))
