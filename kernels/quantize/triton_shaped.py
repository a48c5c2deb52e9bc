"""Shaped rounding in Triton (blocks.shape_blocks): a program rounds some rows from their first element to their last.

A thread holds whole rows of a block: its sixteen elements follow one another in registers, and only what whole blocks
hand on goes through the tensor core. Errors of finished blocks lie in global memory as BF16, where only the program
that wrote them reads them; a panel of blocks sums those of all panels before it at once. Factors of rank r need none
of that: all that a row hands on are r sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize.feedback import parts
from kernels.quantize.triton_blocks import quantize_form, quantize_groups
from kernels.quantize.triton_kernels import TINY_FACTOR, TINY_SCALE, tensor_scale
from kernels.quantize.triton_ops import INTERPRET, allocate, constants
from kernels.spec import from_key
from kernels.triton_common import divide, e4m3_byte, encode_words, nearest_bf16, reciprocal_rn, round_e2m1

# Of an H200: at 65,536 and at 640 to 5,632 rows, 640 to 2,816 wide, no other shape was faster by more than 4 %.
TILE, WARPS, STAGES = 32, 1, 3
PANEL = 64


@triton.jit
def _halves(x):
    """[T, n] -> its left and its right half; no data moves where a thread holds whole rows."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _beside(left, right):
    """The inverse of `_halves`."""
    return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [left.shape[0], 2 * left.shape[1]])


@triton.jit
def _handed_on(y, errors, triangle_ptr):
    """y [T, n] less errors [T, m] F: one element's after the other's. Products of two BF16 numbers are exact in FP32,
    so a fused sum rounds as the reference's does."""
    if errors.shape[1] == 1:
        row = tl.load(triangle_ptr + tl.arange(0, y.shape[1]))
        return tl.fma(tl.broadcast_to(-errors, y.shape), tl.broadcast_to(row[None, :], y.shape), y)
    else:
        first, second = _halves(errors)
        y = _handed_on(y, first, triangle_ptr)
        return _handed_on(y, second, triangle_ptr + first.shape[1] * 16)


@triton.jit
def _follow(y, divisor, reciprocal, triangle_ptr, INTERPRET: tl.constexpr):
    """Elements [T, n] one after the other, by F within their block (FP32, 16 a row): (codes, errors, what was
    rounded)."""
    if y.shape[1] == 1:
        codes = round_e2m1(divide(y, divisor, reciprocal, INTERPRET))
        return codes, nearest_bf16(y - codes * divisor, INTERPRET), y
    else:
        HALF: tl.constexpr = y.shape[1] // 2
        left, right = _halves(y)
        codes, errors, left = _follow(left, divisor, reciprocal, triangle_ptr, INTERPRET)
        right = _handed_on(right, errors, triangle_ptr + HALF)
        codes_right, errors_right, right = _follow(
            right, divisor, reciprocal, triangle_ptr + HALF * 16 + HALF, INTERPRET
        )
        return _beside(codes, codes_right), _beside(errors, errors_right), _beside(left, right)


@triton.jit
def _load_block(src_ptr, row, inside, number, K):
    """Block `number` of each row, [T, 16]. Two loads, so that a thread holds whole rows; and all that follows keeps
    this layout, since loads decide it: that is why none is carried from one block to the next."""
    at = src_ptr + row[:, None] * K + (number * 16 + tl.arange(0, 8))[None, :]
    return _beside(tl.load(at, mask=inside, other=0.0), tl.load(at + 8, mask=inside, other=0.0))


@triton.jit
def _round_block(y, number, row, inside, T, factor, triangle_ptr, values_ptr, codes_ptr, scales_ptr, K,
                 TARGET: tl.constexpr, SELECT_46: tl.constexpr, ROUNDING: tl.constexpr, STORE_VALUES: tl.constexpr,
                 STORE_PACKED: tl.constexpr, FORM: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Choose the scales of y [T, 16], round it and store it; its errors, BF16."""
    if FORM is None:
        _, scale = quantize_groups(
            y, T, factor, 0, 0, 0, (0, 0, 0, 0, 0), TARGET, SELECT_46, ROUNDING, 1, False, True, INTERPRET
        )
    else:
        _, _, scale, _ = quantize_form(
            y, T, factor, 0, 0, (0, 0, 0, 0, 0), triangle_ptr, FORM, ROUNDING, 1, False, INTERPRET
        )
    divisor = scale * T * factor
    reciprocal = reciprocal_rn(divisor, INTERPRET)
    codes, errors, y = _follow(y, divisor[:, None], reciprocal[:, None], triangle_ptr + number * 256, INTERPRET)
    at = row[:, None] * K + (number * 16 + tl.arange(0, 16))[None, :]
    if STORE_VALUES:
        tl.store(values_ptr + at, (codes * scale[:, None]).to(tl.bfloat16), mask=inside)
    if STORE_PACKED:
        words = tl.reshape(encode_words(codes, y), [y.shape[0], 2])
        word = row[:, None] * (K // 8) + number * 2 + tl.arange(0, 2)[None, :]
        tl.store(codes_ptr + word, words, mask=inside)
        tl.store(scales_ptr + row[:, None] * (K // 16) + number, e4m3_byte(scale)[:, None], mask=inside)
    return errors.to(tl.bfloat16)


@triton.jit
def _product(a, b, sums, INTERPRET: tl.constexpr):
    """sums + a b of BF16 tiles in FP32; the interpreter's BF16 dot is wrong."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    return tl.dot(a, b, sums)


@triton.jit
def shaped_kernel(src_ptr, amax_ptr, feedback_ptr, triangle_ptr, errors_ptr, sums_ptr, values_ptr, codes_ptr,
                  scales_ptr, scale_ptr, ROWS, K,
                  TARGET: tl.constexpr, RANGE: tl.constexpr, POW2: tl.constexpr, SELECT_46: tl.constexpr,
                  ROUNDING: tl.constexpr, STREAM: tl.constexpr, STORE_VALUES: tl.constexpr,
                  STORE_PACKED: tl.constexpr, TILE: tl.constexpr, PANEL: tl.constexpr, STAGES: tl.constexpr,
                  FORM: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """TILE rows of src [ROWS, K] by F bf16 [K, K], whose blocks on the diagonal are triangle, FP32 [K, 16]. Scratch:
    errors bf16 [ROWS, K], sums FP32 [programs, TILE, PANEL]. STREAM is there for `constants`."""
    T = tensor_scale(tl.load(amax_ptr), RANGE, POW2)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, T)
    factor = tl.where(T < TINY_SCALE, TINY_FACTOR, 1.0)
    tile, sixteen, wide = tl.arange(0, TILE), tl.arange(0, 16), tl.arange(0, PANEL)
    row = (tl.program_id(0) * TILE + tile).to(tl.int64)
    inside = (row < ROWS)[:, None]
    sums_ptr += (tl.program_id(0) * TILE + tile)[:, None] * PANEL
    for start in range(0, K, PANEL):
        sums = tl.zeros([TILE, PANEL], tl.float32)
        columns = start + wide
        for first in tl.range(0, start, PANEL, num_stages=STAGES):
            k = first + wide
            errors = tl.load(errors_ptr + row[:, None] * K + k[None, :], mask=inside, other=0.0)
            at = feedback_ptr + k[:, None] * K + columns[None, :]
            weights = tl.load(at, mask=(columns < K)[None, :], other=0.0)
            sums = _product(errors, weights, sums, INTERPRET)
        tl.store(sums_ptr + wide[None, :], sums)
        tl.debug_barrier()  # sums and errors are read by other threads of this program
        for number in tl.range(start // 16, tl.minimum(start + PANEL, K) // 16, num_stages=1):
            made = columns < number * 16
            own = number * 16 + sixteen
            at = errors_ptr + row[:, None] * K + columns[None, :]
            errors = tl.load(at, mask=inside & made[None, :], other=0.0)
            weights = tl.load(feedback_ptr + columns[:, None] * K + own[None, :], mask=made[:, None], other=0.0)
            before = tl.load(sums_ptr + (own - start)[None, :])
            handed = _product(errors, weights, before, INTERPRET)
            y = _load_block(src_ptr, row, inside, number, K).to(tl.float32) * factor - handed
            errors = _round_block(y, number, row, inside, T, factor, triangle_ptr, values_ptr, codes_ptr, scales_ptr,
                                  K, TARGET, SELECT_46, ROUNDING, STORE_VALUES, STORE_PACKED, FORM,
                                  INTERPRET)  # fmt: skip
            tl.store(errors_ptr + row[:, None] * K + own[None, :], errors, mask=inside)
            tl.debug_barrier()


@triton.jit
def factored_kernel(src_ptr, amax_ptr, feedback_ptr, triangle_ptr, values_ptr, codes_ptr, scales_ptr, scale_ptr, ROWS,
                    K, WIDTH, RANK,
                    TARGET: tl.constexpr, RANGE: tl.constexpr, POW2: tl.constexpr, SELECT_46: tl.constexpr,
                    ROUNDING: tl.constexpr, STREAM: tl.constexpr, STORE_VALUES: tl.constexpr,
                    STORE_PACKED: tl.constexpr, TILE: tl.constexpr, STATE: tl.constexpr, FORM: tl.constexpr,
                    INTERPRET: tl.constexpr):  # fmt: skip
    """The same by factors (feedback.factors), bf16 [K, WIDTH]. STATE: RANK or a little more, as tiles need."""
    T = tensor_scale(tl.load(amax_ptr), RANGE, POW2)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, T)
    factor = tl.where(T < TINY_SCALE, TINY_FACTOR, 1.0)
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (row < ROWS)[:, None]
    direction = tl.arange(0, STATE)
    kept = direction < RANK
    state = tl.zeros([TILE, STATE], tl.float32)
    for number in tl.range(0, K // 16, num_stages=1):
        line = feedback_ptr + 16 + (number * 16 + tl.arange(0, 16)) * WIDTH
        into = tl.load(line[:, None] + direction[None, :], mask=kept[None, :], other=0.0)
        out = tl.load(line[None, :] + RANK + direction[:, None], mask=kept[:, None], other=0.0)
        handed = _product(state.to(tl.bfloat16), out, tl.zeros([TILE, 16], tl.float32), INTERPRET)
        y = _load_block(src_ptr, row, inside, number, K).to(tl.float32) * factor - handed
        errors = _round_block(y, number, row, inside, T, factor, triangle_ptr, values_ptr, codes_ptr, scales_ptr, K,
                              TARGET, SELECT_46, ROUNDING, STORE_VALUES, STORE_PACKED, FORM, INTERPRET)  # fmt: skip
        state = _product(errors, into, state, INTERPRET)


@torch.library.custom_op("nibble::quantize_shaped", mutates_args=())
def _quantize_shaped_op(
    x: Tensor, amax: Tensor, feedback: Tensor, spec: str, store_values: bool, store_packed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, (rows, columns) = x.contiguous(), x.shape
    spec = from_key(spec)
    outputs = allocate(x, False, 1, spec, store_values, store_packed)
    values, scale, codes, block_scales, _ = outputs
    within = parts(feedback)[0].float()
    made = values, codes.view(torch.int32), block_scales, scale, rows, columns
    programs = triton.cdiv(rows, TILE)
    common = dict(
        **constants(spec, 0), STORE_VALUES=store_values, STORE_PACKED=store_packed, TILE=TILE, INTERPRET=INTERPRET,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    if feedback.shape[1] == columns:
        errors = x.new_empty((rows, columns), dtype=torch.bfloat16)
        sums = x.new_empty((programs, TILE, PANEL), dtype=torch.float32)
        shaped_kernel[(programs,)](x, amax, feedback, within, errors, sums, *made, PANEL=PANEL, STAGES=STAGES, **common)
    else:
        rank = (feedback.shape[1] - 16) // 2
        state = max(16, triton.next_power_of_2(rank))
        factored_kernel[(programs,)](x, amax, feedback, within, *made, feedback.shape[1], rank, STATE=state, **common)
    return outputs


@_quantize_shaped_op.register_fake
def _(x, amax, feedback, spec, store_values, store_packed):
    return allocate(x, False, 1, from_key(spec), store_values, store_packed)
