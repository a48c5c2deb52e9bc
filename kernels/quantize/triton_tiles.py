"""Triton quantizers that need no rotation tile: NVFP4 with one scale for 16x16 elements, FP8, and decoding.

A 16x16 tile is one group of 256 here. Indices follow the stored operand [rows, contraction] through strides, so that
one kernel serves both axes; these run on weights (16x16), which are small beside activations. FP8 values are written as
real float8 [rows, contraction], contiguous along the contraction, which is the only layout that sm_90's FP8 GEMM takes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.formats.minifloat import FP8_DTYPES
from kernels.quantize import Quantized, reference_impl
from kernels.quantize.triton_blocks import calls_of, is_sr, quantize_form, quantize_groups
from kernels.quantize.triton_forms import load_scales, of, scale_byte
from kernels.quantize.triton_kernels import load_tile, tensor_scale
from kernels.quantize.triton_ops import (
    INTERPRET,
    allocate,
    check_columns,
    constants,
    form_of,
    fuses,
    levels_of,
    lookup_of,
)
from kernels.spec import NVFP4_BLOCK, QuantSpec, from_key
from kernels.triton_common import divide, e4m3_byte, encode_bytes, fp8_bytes, load_key


@triton.jit
def square_kernel(src_ptr, table_ptr, amax_ptr, rng_ptr, layer_ptr, values_ptr, codes_ptr, scales_ptr, scale_ptr, ROWS,
                  COLUMNS, row_stride, column_stride, TARGET: tl.constexpr, RANGE: tl.constexpr, POW2: tl.constexpr,
                  SELECT_46: tl.constexpr, ROUNDING: tl.constexpr, STREAM: tl.constexpr, STORE_VALUES: tl.constexpr,
                  STORE_PACKED: tl.constexpr, TILES: tl.constexpr, FORM: tl.constexpr,
                  INTERPRET: tl.constexpr):  # fmt: skip
    """TILES neighbouring 16x16 tiles of the stored operand [ROWS, COLUMNS] a program."""
    T = tensor_scale(tl.load(amax_ptr), RANGE, POW2)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, T)
    factor = tl.where(T < 2.0**-60, 2.0**64, 1.0)
    columns_of_tiles = COLUMNS // 16
    tile = (tl.program_id(0) * TILES + tl.arange(0, TILES)).to(tl.int64)
    inside = tile < (ROWS // 16) * columns_of_tiles
    element = tl.arange(0, 256)
    row = (tile // columns_of_tiles * 16)[:, None] + (element // 16)[None, :]
    column = (tile % columns_of_tiles * 16)[:, None] + (element % 16)[None, :]
    offsets = row * row_stride + column * column_stride
    y = tl.load(src_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32) * factor
    key = (0, 0, 0, 0, 0)
    if is_sr(ROUNDING):
        key = load_key(rng_ptr, layer_ptr, STREAM)
    # Four random words serve four neighbours of one row, or all of a tile's 16: call number = element / 4 or / 16.
    CALLS: tl.constexpr = calls_of(ROUNDING)
    part = tl.arange(0, 16 * CALLS)
    call_row = (tile // columns_of_tiles * 16)[:, None] + (part // CALLS)[None, :]
    call = (call_row * columns_of_tiles + (tile % columns_of_tiles)[:, None]) * CALLS + (part % CALLS)[None, :]
    calls = ROWS * columns_of_tiles * CALLS
    if FORM is not None:
        codes, nibbles, scale, member = quantize_form(
            y, T, factor, call, tile, key, table_ptr, FORM, ROUNDING, 1, STORE_PACKED, INTERPRET
        )
    else:
        codes, scale = quantize_groups(
            y, T, factor, call, calls, tile, key, TARGET, SELECT_46, ROUNDING, 1, False, True, INTERPRET
        )
    if STORE_VALUES:
        tl.store(values_ptr + offsets, (codes * scale[:, None]).to(tl.bfloat16), mask=inside[:, None])
    if STORE_PACKED:
        if FORM is not None:
            low, high = tl.split(tl.reshape(nibbles, [TILES, 128, 2]))
            pairs = low | (high << 4)
        else:
            pairs = encode_bytes(codes, y)
        half = tl.arange(0, 128)
        byte_row = (tile // columns_of_tiles * 16)[:, None] + (half // 8)[None, :]
        byte = byte_row * (COLUMNS // 2) + (tile % columns_of_tiles * 8)[:, None] + (half % 8)[None, :]
        tl.store(codes_ptr + byte, pairs.to(tl.uint8), mask=inside[:, None])
        if FORM is not None:
            tl.store(scales_ptr + tile, scale_byte(scale, member, FORM), mask=inside)
        else:
            tl.store(scales_ptr + tile, e4m3_byte(scale), mask=inside)


@triton.jit
def _fp8_bytes(x, scale, IS_E4M3: tl.constexpr, INTERPRET: tl.constexpr):
    """Float8 bytes of x [R, C] over scale [R]."""
    # A tiny scale's reciprocal would be infinite: the same power of two on both sides leaves the quotient as it is.
    factor = tl.where(scale < 2.0**-60, 2.0**64, 1.0)
    divisor = scale * factor
    reciprocal = tl.div_rn(1.0, divisor)
    quotient = divide(x.to(tl.float32) * factor[:, None], divisor[:, None], reciprocal[:, None], INTERPRET)
    return fp8_bytes(quotient, IS_E4M3)


@triton.jit
def fp8_both_kernel(src_ptr, amax_ptr, values_ptr, transposed_ptr, scale_ptr, other_scale_ptr, R, C,
                    TARGET: tl.constexpr, POW2: tl.constexpr, IS_E4M3: tl.constexpr, TILE_R: tl.constexpr,
                    TILE_C: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """Per-tensor float8 of [R, C], contiguous, stored as it is and transposed: one read, the same bytes twice."""
    row = (tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)).to(tl.int64)
    column = (tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)).to(tl.int64)
    mask = (row < R)[:, None] & (column < C)[None, :]
    x = tl.load(src_ptr + row[:, None] * C + column[None, :], mask=mask, other=0.0)
    T = tensor_scale(tl.load(amax_ptr), TARGET, POW2)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_ptr, T)
        tl.store(other_scale_ptr, T)
    bytes_ = _fp8_bytes(x, tl.zeros([TILE_R], tl.float32) + T, IS_E4M3, INTERPRET)
    tl.store(values_ptr + row[:, None] * C + column[None, :], bytes_, mask=mask)
    tl.store(transposed_ptr + column[:, None] * R + row[None, :], tl.trans(bytes_), mask=tl.trans(mask))


@triton.jit
def fp8_kernel(src_ptr, amax_ptr, values_ptr, scale_ptr, ROWS, COLUMNS, row_stride, column_stride,
               TARGET: tl.constexpr, POW2: tl.constexpr, PER_ROW: tl.constexpr, IS_E4M3: tl.constexpr,
               TILE_R: tl.constexpr, TILE_C: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """One TILE_R x TILE_C tile of the stored operand: float8 bytes, contiguous, and the tensor's or the rows' scale."""
    row = (tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)).to(tl.int64)
    column = (tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)).to(tl.int64)  # along axis 0 its stride is a row's
    mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    x = tl.load(src_ptr + row[:, None] * row_stride + column[None, :] * column_stride, mask=mask, other=0.0)
    if PER_ROW:
        scale = tensor_scale(tl.load(amax_ptr + row, mask=row < ROWS, other=1.0), TARGET, POW2)
        if tl.program_id(1) == 0:
            tl.store(scale_ptr + row, scale, mask=row < ROWS)
    else:
        scale = tl.zeros([TILE_R], tl.float32) + tensor_scale(tl.load(amax_ptr), TARGET, POW2)
        tl.store(scale_ptr + row * 0, scale, mask=(row == 0) & (tl.program_id(1) == 0))
    bytes_ = _fp8_bytes(x, scale, IS_E4M3, INTERPRET)
    tl.store(values_ptr + row[:, None] * COLUMNS + column[None, :], bytes_, mask=mask)


@triton.jit
def unpack_kernel(codes_ptr, scales_ptr, values_ptr, R, C, words, groups, SQUARE: tl.constexpr, AXIS: tl.constexpr,
                  TILE_R: tl.constexpr, TILE_C: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """values = codes * block_scales of packed [R, C] as BF16; into [R, C], or transposed into [C, R] for AXIS 0."""
    row0, col0 = tl.program_id(0) * TILE_R, tl.program_id(1) * TILE_C
    tile = load_tile(
        codes_ptr, scales_ptr, row0, col0, R, C, words, groups, TILE_R, TILE_C, True, SQUARE, False, INTERPRET
    )
    values = (tile.to(tl.float32) * 256.0).to(tl.bfloat16)
    row = (row0 + tl.arange(0, TILE_R)).to(tl.int64)[:, None]
    column = (col0 + tl.arange(0, TILE_C)).to(tl.int64)[None, :]
    mask = (row < R) & (column < C)
    if AXIS == 1:
        tl.store(values_ptr + row * C + column, values, mask=mask)
    else:
        tl.store(values_ptr + tl.trans(column * R + row), tl.trans(values), mask=tl.trans(mask))


@triton.jit
def unpack_form_kernel(codes_ptr, scales_ptr, members_ptr, levels_ptr, values_ptr, R, C, SQUARE: tl.constexpr,
                       AXIS: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr, FORM: tl.constexpr):  # fmt: skip
    """`unpack_kernel` of any Form; codes_ptr: bytes of two. levels_ptr: FP32, 16 for each member."""
    GROUP: tl.constexpr = of(FORM, "group")
    WIDE: tl.constexpr = [TILE_R, TILE_C // GROUP, GROUP]
    row = (tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * TILE_C + tl.arange(0, TILE_C))[None, :]
    group = tl.program_id(1) * (TILE_C // GROUP) + tl.arange(0, TILE_C // GROUP)[None, :]
    mask = (row < R) & (column < C)
    byte = tl.load(codes_ptr + row * (C // 2) + column // 2, mask=mask, other=0).to(tl.int32)
    block_row = row // 16 if SQUARE else row
    inside = (row < R) & (group * GROUP < C)
    scale, member = load_scales(scales_ptr, members_ptr, block_row, group, C, inside, FORM)
    at = (byte >> (column % 2 * 4)) & 15
    at += tl.reshape(tl.broadcast_to(member[:, :, None], WIDE), [TILE_R, TILE_C]) * 16
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], WIDE), [TILE_R, TILE_C])
    values = (tl.load(levels_ptr + at) * scale).to(tl.bfloat16)
    if AXIS == 1:
        tl.store(values_ptr + row * C + column, values, mask=mask)
    else:
        at = values_ptr + column.to(tl.int64) * R + row
        tl.store(tl.trans(at), tl.trans(values), mask=tl.trans(mask))


def quantize_fp8(x: Tensor, spec: QuantSpec, axis: int, amax: Tensor) -> Quantized:
    """FP8 of an unrotated x: values are float8 (e4m3fn or e5m2) with x's shape."""
    return _fp8_operand(*torch.ops.nibble.quantize_fp8(x, amax, axis, *_fp8_settings(spec)), spec, axis)


def quantize_fp8_both(x: Tensor, specs: tuple[QuantSpec, QuantSpec]) -> tuple[Quantized, Quantized]:
    """FP8 of x along axis 1 and along axis 0, in one operator (why: triton_impl.quantize_both)."""
    amaxes = (reference_impl.amax(x, axis, None, spec.per_row) for axis, spec in zip((1, 0), specs, strict=True))
    settings = zip(*(_fp8_settings(spec) for spec in specs), strict=True)
    made = torch.ops.nibble.quantize_fp8_both(x, *amaxes, *(list(pair) for pair in settings))
    return _fp8_operand(*made[:2], specs[0], 1), _fp8_operand(*made[2:], specs[1], 0)


def _fp8_settings(spec: QuantSpec) -> tuple[float, bool, bool, bool]:
    return spec.scale_cap * spec.target_max, spec.tensor_scale == "pow2", spec.per_row, spec.grid == "e4m3"


def _fp8_operand(codes: Tensor, scale: Tensor, spec: QuantSpec, axis: int) -> Quantized:
    values = codes.view(FP8_DTYPES[spec.grid])
    return Quantized(values if axis == 1 else values.t(), scale)


def _stored_shape(x: Tensor, axis: int) -> tuple[int, int, int, int]:
    """(rows, contraction, row stride, contraction stride) of x as the stored operand."""
    rows, columns = x.shape
    strides = x.stride()
    return (rows, columns, *strides) if axis == 1 else (columns, rows, strides[1], strides[0])


@torch.library.custom_op("nibble::quantize_square", mutates_args=())
def _quantize_square_op(
    x: Tensor,
    amax: Tensor,
    rng: Tensor | None,
    layer: Tensor | None,
    axis: int,
    spec: str,
    slot: int,
    store_values: bool,
    store_packed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec, x = from_key(spec), x.contiguous()
    outputs = allocate(x, False, axis, spec, store_values, store_packed)
    values, scale, codes, block_scales, _ = outputs
    rows, columns, row_stride, column_stride = _stored_shape(x, axis)
    tiles_a_program = 8
    grid = (triton.cdiv(rows * columns // NVFP4_BLOCK**2, tiles_a_program),)
    square_kernel[grid](
        x, lookup_of(spec, x.device), amax, rng, layer, values, codes, block_scales, scale, rows, columns,
        row_stride, column_stride, **constants(spec, slot), STORE_VALUES=store_values, STORE_PACKED=store_packed,
        TILES=tiles_a_program, INTERPRET=INTERPRET, num_warps=4, enable_fp_fusion=fuses(spec),
    )  # fmt: skip
    return outputs


@_quantize_square_op.register_fake
def _(x, amax, rng, layer, axis, spec, slot, store_values, store_packed):
    return allocate(x, False, axis, from_key(spec), store_values, store_packed)


@torch.library.custom_op("nibble::quantize_fp8", mutates_args=())
def _quantize_fp8_op(
    x: Tensor, amax: Tensor, axis: int, target: float, pow2: bool, per_row: bool, is_e4m3: bool
) -> tuple[Tensor, Tensor]:
    codes, scale = _allocate_fp8(x, axis, per_row)
    rows, columns, row_stride, column_stride = _stored_shape(x, axis)
    tile_r, tile_c = (16, 256) if axis == 1 else (64, 64)
    fp8_kernel[(triton.cdiv(rows, tile_r), triton.cdiv(columns, tile_c))](
        x, amax.contiguous(), codes, scale, rows, columns, row_stride, column_stride,
        TARGET=target, POW2=pow2, PER_ROW=per_row, IS_E4M3=is_e4m3, TILE_R=tile_r, TILE_C=tile_c, INTERPRET=INTERPRET,
        num_warps=4,
    )  # fmt: skip
    return codes, scale


def _allocate_fp8(x: Tensor, axis: int, per_row: bool) -> tuple[Tensor, Tensor]:
    rows, columns, _, _ = _stored_shape(x, axis)
    scale = () if not per_row else (rows, 1) if axis == 1 else (1, rows)
    return x.new_empty((rows, columns), dtype=torch.uint8), x.new_empty(scale, dtype=torch.float32)


@_quantize_fp8_op.register_fake
def _(x, amax, axis, target, pow2, per_row, is_e4m3):
    return _allocate_fp8(x, axis, per_row)


def launch_fp8_both(
    x: Tensor, amax: Tensor, target: float, pow2: bool, is_e4m3: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale) along axis 1 and along axis 0; per tensor, so that both have the same codes."""
    x = x.contiguous()
    (codes, scale), (transposed, other_scale) = (_allocate_fp8(x, axis, False) for axis in (1, 0))
    rows, columns = x.shape
    fp8_both_kernel[(triton.cdiv(rows, 64), triton.cdiv(columns, 128))](
        x, amax, codes, transposed, scale, other_scale, rows, columns, TARGET=target, POW2=pow2, IS_E4M3=is_e4m3,
        TILE_R=64, TILE_C=128, INTERPRET=INTERPRET, num_warps=4,
    )  # fmt: skip
    return codes, scale, transposed, other_scale


@torch.library.custom_op("nibble::quantize_fp8_both", mutates_args=())
def _quantize_fp8_both_op(
    x: Tensor,
    amax1: Tensor,
    amax0: Tensor,
    targets: list[float],
    pow2: list[bool],
    per_row: list[bool],
    e4m3: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not any(per_row) and all(setting[0] == setting[1] for setting in (targets, pow2, e4m3)):
        return launch_fp8_both(x, amax1, targets[0], pow2[0], e4m3[0])
    settings = zip(targets, pow2, per_row, e4m3, strict=True)
    along1, along0 = (
        _quantize_fp8_op(x, amax, axis, *one) for axis, amax, one in zip((1, 0), (amax1, amax0), settings, strict=True)
    )
    return *along1, *along0


@_quantize_fp8_both_op.register_fake
def _(x, amax1, amax0, targets, pow2, per_row, e4m3):
    return *_allocate_fp8(x, 1, per_row[0]), *_allocate_fp8(x, 0, per_row[1])


@torch.library.custom_op("nibble::unpack_values", mutates_args=())
def _unpack_op(codes: Tensor, scales: Tensor, axis: int) -> Tensor:
    values = _allocate_values(codes, axis)
    rows, columns = codes.shape[0], codes.shape[1] * 2
    check_columns(columns)
    tile_r, tile_c = (32, 256) if axis == 1 else (64, 128)
    unpack_kernel[(triton.cdiv(rows, tile_r), triton.cdiv(columns, tile_c))](
        codes.view(torch.int32), scales, values, rows, columns, columns // 8, columns // 16,
        SQUARE=scales.shape[0] != rows, AXIS=axis, TILE_R=tile_r, TILE_C=tile_c, INTERPRET=INTERPRET, num_warps=4,
    )  # fmt: skip
    return values


def _allocate_values(codes: Tensor, axis: int) -> Tensor:
    rows, columns = codes.shape[0], codes.shape[1] * 2
    return codes.new_empty((rows, columns) if axis == 1 else (columns, rows), dtype=torch.bfloat16)


@_unpack_op.register_fake
def _(codes, scales, axis):
    return _allocate_values(codes, axis)


@torch.library.custom_op("nibble::unpack_form", mutates_args=())
def _unpack_form_op(codes: Tensor, scales: Tensor, members: Tensor | None, axis: int, spec: str) -> Tensor:
    values, spec = _allocate_values(codes, axis), from_key(spec)
    rows, columns = codes.shape[0], codes.shape[1] * 2
    tile_r, tile_c = (16, 256) if axis == 1 else (64, 64)
    unpack_form_kernel[(triton.cdiv(rows, tile_r), triton.cdiv(columns, tile_c))](
        codes, scales.view(torch.uint8), members, levels_of(spec, codes.device), values, rows, columns,
        SQUARE=spec.is_square, AXIS=axis, TILE_R=tile_r, TILE_C=tile_c, FORM=form_of(spec), num_warps=4,
    )  # fmt: skip
    return values


@_unpack_form_op.register_fake
def _(codes, scales, members, axis, spec):
    return _allocate_values(codes, axis)
