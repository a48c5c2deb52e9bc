"""An FP8 operand that lies along the wrong axis, transposed: nibble::transpose_bytes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128


@torch.library.custom_op("nibble::transpose_bytes", mutates_args=())
def transpose_bytes(x: Tensor) -> Tensor:
    """FP8 [R, C], contiguous -> [C, R], contiguous, the same bytes."""
    rows, columns = x.shape
    out = x.new_empty(columns, rows)
    grid = (triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))
    transpose_kernel[grid](x.view(torch.uint8), out.view(torch.uint8), rows, columns, TILE=TILE, num_warps=8)
    return out


@transpose_bytes.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[0])


@triton.jit
def transpose_kernel(source_ptr, out_ptr, rows, columns, TILE: tl.constexpr):
    """One program per square tile, transposed on chip so that reads and writes are both contiguous."""
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
    inside = (row < rows) & (column < columns)
    tile = tl.load(source_ptr + row * columns + column, mask=inside)
    tl.store(out_ptr + tl.trans(column * rows + row), tl.trans(tile), mask=tl.trans(inside))
