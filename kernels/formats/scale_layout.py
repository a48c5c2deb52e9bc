"""The block-scale layout and the padding that NVFP4 tensor cores read, in plain torch (any device).

Hardware GEMMs take an operand stored as [rows, contraction] with one E4M3 scale per row and group of 16 elements. The
scales are not row-major: they come in blocks of 128 rows x 4 groups, 512 bytes each, in which the four groups of a
row lie side by side and the four rows r, r+32, r+64, r+96 follow each other:

    offset(r, g) = ((r // 128) * ceil(G / 4) + g // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + g % 4

with G = contraction / 16 groups. Rows are padded to 128 and groups to 4; padding holds 0. This is CUTLASS's
Sm1xxBlockScaledConfig<16> (tests compare it with that index map, evaluated on the host), torch's SWIZZLE_32_4_4, and
the "128x4" layout of other libraries.

Operands are padded so that every back end takes them: the contraction to a multiple of 32 (TMA moves 16 bytes = 32
codes a row) with zero codes, and, where the operand becomes the columns of the result, its rows to a multiple of 8
(16-byte rows of a BF16 result). A padded element is code 0 under scale 0: it adds exactly 0 to a sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_TILE = 128  # rows of one 512-byte block of scales
GROUP_TILE = 4  # groups (scales along the contraction) of one block
CONTRACTION_MULTIPLE = 32  # elements: 16 bytes of codes, TMA's unit
COLUMN_MULTIPLE = 8  # rows of the second operand: 16 bytes of a BF16 result (an FP32 result needs only 4)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def swizzled_size(rows: int, groups: int) -> int:
    """Bytes of the swizzled scales of an operand [rows, 16 * groups]."""
    return round_up(rows, ROW_TILE) * round_up(groups, GROUP_TILE)


def swizzled_offsets(rows: int, groups: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [rows, groups]: where the scale of each (row, group) lies. The formula of the module docstring."""
    r = torch.arange(rows, device=device)[:, None]
    g = torch.arange(groups, device=device)[None, :]
    block = (r // ROW_TILE) * (round_up(groups, GROUP_TILE) // GROUP_TILE) + g // GROUP_TILE
    return block * (ROW_TILE * GROUP_TILE) + (r % 32) * 16 + (r % ROW_TILE // 32) * 4 + g % GROUP_TILE


def swizzle(scales: Tensor) -> Tensor:
    """One-byte scales [rows, groups], row-major -> the same bytes in the 128x4 layout, flat, padded with zeros.

    Pure data movement: any one-byte dtype goes in and the same dtype comes out. Raises ValueError for another width
    or rank.
    """
    if scales.dim() != 2 or scales.element_size() != 1:
        raise ValueError(
            f"scales: got {scales.dtype} of shape {tuple(scales.shape)}; need a 2-D tensor of one-byte scales"
        )
    rows, groups = scales.shape
    blocks_r, blocks_g = round_up(rows, ROW_TILE) // ROW_TILE, round_up(groups, GROUP_TILE) // GROUP_TILE
    padded = F.pad(scales.view(torch.uint8), (0, blocks_g * GROUP_TILE - groups, 0, blocks_r * ROW_TILE - rows))
    # row = (block, quarter of 32, row in the quarter); group = (block, place): -> block, block, row, quarter, place
    tiles = padded.view(blocks_r, 4, 32, blocks_g, GROUP_TILE).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(scales.dtype)
