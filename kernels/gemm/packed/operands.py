"""NVFP4Tensor -> what a tensor core reads: padded codes, E4M3 scales in the 128x4 layout. Plain torch, any device."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.formats.scale_layout import CONTRACTION_MULTIPLE, round_up, swizzle
from kernels.spec import NVFP4_BLOCK


@dataclass(frozen=True)
class HardwareOperand:
    """One operand in the layout of the tensor cores; `rows` of its codes' rows are real, the others are padding.

    codes: uint8 [padded rows, padded K / 2], contiguous. scales: float8_e4m3fn, flat (kernels/formats/scale_layout.py).
    """

    codes: Tensor
    scales: Tensor
    rows: int


def prepare(operand: NVFP4Tensor, row_multiple: int = 1) -> HardwareOperand:
    """Pad the contraction to a multiple of 32 and the rows to `row_multiple`; expand 16x16 scales; swizzle.

    Padding is code 0 under scale 0, so it adds exactly 0 to every sum. The scales need no padding here: blocks of 128
    rows and 4 groups already cover it (32 elements are 2 groups, and row_multiple divides 128).

    Swizzled here, not by the quantizers' own stores: what re-quantizes or transposes a packed tensor reads its scales
    by row, and moving them costs 1/8 byte an element beside the 2.6 that a quantizer reads and writes.
    """
    rows, k = operand.shape
    scales = operand.block_scales.view(torch.uint8)
    if operand.is_square:
        scales = scales.repeat_interleave(NVFP4_BLOCK, dim=0)
    extra_rows = round_up(rows, row_multiple) - rows
    extra_bytes = (round_up(k, CONTRACTION_MULTIPLE) - k) // 2
    codes = operand.codes
    if extra_rows or extra_bytes:
        codes = F.pad(codes, (0, extra_bytes, 0, extra_rows))
    return HardwareOperand(codes.contiguous(), swizzle(scales).view(torch.float8_e4m3fn), rows)


def crop(d: Tensor, columns: int) -> Tensor:
    """The first `columns` columns of a result, contiguous; d itself if it has no more."""
    if d.shape[1] == columns:
        return d
    # Not d[:, :columns].contiguous(): a CPU build of torch can't trace that on fake CUDA tensors (2.13).
    return d.narrow(1, 0, columns).clone(memory_format=torch.contiguous_format)
