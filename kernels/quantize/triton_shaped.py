"""Shaped rounding in Triton (blocks.shape_blocks): a program rounds some rows from their first element to their last.

Errors of finished blocks lie in global memory as BF16, where only the program that wrote them reads them; one product
on the tensor core brings all of them to the next block. Within a block the sixteen elements follow one another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize.triton_blocks import quantize_groups
from kernels.quantize.triton_kernels import TINY_FACTOR, TINY_SCALE, tensor_scale
from kernels.quantize.triton_ops import INTERPRET, allocate, constants
from kernels.spec import from_key
from kernels.triton_common import divide, e4m3_byte, encode_words, round_e2m1

MANY_ROWS = 8192  # of an activation: tall tiles read F less often. A weight's few rows need many programs instead.
DEPTH = 64


@triton.jit
def shaped_kernel(src_ptr, amax_ptr, feedback_ptr, errors_ptr, values_ptr, codes_ptr, scales_ptr, scale_ptr, ROWS, K,
                  TARGET: tl.constexpr, RANGE: tl.constexpr, POW2: tl.constexpr, SELECT_46: tl.constexpr,
                  ROUNDING: tl.constexpr, STREAM: tl.constexpr, STORE_VALUES: tl.constexpr,
                  STORE_PACKED: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, FORM: tl.constexpr,
                  INTERPRET: tl.constexpr):  # fmt: skip
    """TILE rows of src [ROWS, K]; F and errors bf16. ROUNDING is "rtn"; it, STREAM and FORM, which is None, are there
    for `constants`."""
    T = tensor_scale(tl.load(amax_ptr), RANGE, POW2)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, T)
    factor = tl.where(T < TINY_SCALE, TINY_FACTOR, 1.0)
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (row < ROWS)[:, None]
    sixteen = tl.arange(0, 16)
    for block in range(0, K // 16):
        column = block * 16 + sixteen
        at = row[:, None] * K + column[None, :]
        handed = tl.zeros([TILE, 16], tl.float32)
        for first in range(0, block * 16, DEPTH):
            k = first + tl.arange(0, DEPTH)
            made = k < block * 16
            errors = tl.load(errors_ptr + row[:, None] * K + k[None, :], mask=inside & made[None, :], other=0.0)
            weights = tl.load(feedback_ptr + k[:, None] * K + column[None, :], mask=made[:, None], other=0.0)
            if INTERPRET:  # its BF16 dot is wrong
                errors, weights = errors.to(tl.float32), weights.to(tl.float32)
            handed = tl.dot(errors, weights, handed)
        # Errors carry `factor` as y does.
        y = tl.load(src_ptr + at, mask=inside, other=0.0).to(tl.float32) * factor - handed
        _, scale = quantize_groups(
            y, T, factor, 0, 0, 0, (0, 0, 0, 0, 0), TARGET, SELECT_46, ROUNDING, 1, False, True, INTERPRET
        )
        divisor = scale * T * factor
        reciprocal = tl.div_rn(1.0, divisor)
        for i in tl.static_range(16):
            w = tl.sum(tl.where((sixteen == i)[None, :], y, 0.0), 1)
            error = w - round_e2m1(divide(w, divisor, reciprocal, INTERPRET)) * divisor
            onward = tl.load(feedback_ptr + (block * 16 + i) * K + column).to(tl.float32)
            y = y - error.to(tl.bfloat16).to(tl.float32)[:, None] * onward[None, :]  # F is zero up to element i
        codes = round_e2m1(divide(y, divisor[:, None], reciprocal[:, None], INTERPRET))
        tl.store(errors_ptr + at, (y - codes * divisor[:, None]).to(tl.bfloat16), mask=inside)
        if STORE_VALUES:
            tl.store(values_ptr + at, (codes * scale[:, None]).to(tl.bfloat16), mask=inside)
        if STORE_PACKED:
            words = tl.reshape(encode_words(codes, y), [TILE, 2])
            word = row[:, None] * (K // 8) + block * 2 + tl.arange(0, 2)[None, :]
            tl.store(codes_ptr + word, words, mask=inside)
            tl.store(scales_ptr + row * (K // 16) + block, e4m3_byte(scale), mask=row < ROWS)
        tl.debug_barrier()  # the errors are read by other threads of this program


@torch.library.custom_op("nibble::quantize_shaped", mutates_args=())
def _quantize_shaped_op(
    x: Tensor, amax: Tensor, feedback: Tensor, spec: str, store_values: bool, store_packed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, (rows, columns) = x.contiguous(), x.shape
    spec = from_key(spec)
    outputs = allocate(x, False, 1, spec, store_values, store_packed)
    values, scale, codes, block_scales, _ = outputs
    tile, warps = (64, 4) if rows >= MANY_ROWS else (16, 1)
    errors = x.new_empty((rows, columns), dtype=torch.bfloat16)
    shaped_kernel[(triton.cdiv(rows, tile),)](
        x, amax, feedback, errors, values, codes.view(torch.int32), block_scales, scale, rows, columns,
        **constants(spec, 0), STORE_VALUES=store_values, STORE_PACKED=store_packed, TILE=tile, DEPTH=DEPTH,
        INTERPRET=INTERPRET, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return outputs


@_quantize_shaped_op.register_fake
def _(x, amax, feedback, spec, store_values, store_packed):
    return allocate(x, False, 1, from_key(spec), store_values, store_packed)
