"""The 128x4 scale layout, on its own: a bijection onto the padded buffer, hand-computed places, errors."""

import pytest
import torch

from kernels.formats import scale_layout as layout

SHAPES = [(1, 1), (3, 2), (128, 4), (129, 5), (200, 7), (256, 8), (384, 64), (127, 3), (32, 4), (640, 40)]


def scales_of(rows: int, groups: int) -> torch.Tensor:
    """Distinct non-zero bytes as far as 255 values allow."""
    return (torch.arange(rows * groups) % 255 + 1).to(torch.uint8).view(rows, groups)


@pytest.mark.parametrize(("rows", "groups"), SHAPES)
def test_swizzle_puts_every_scale_at_its_offset_and_zeros_elsewhere(rows, groups):
    scales = scales_of(rows, groups)
    expected = torch.zeros(layout.swizzled_size(rows, groups), dtype=torch.uint8)
    expected[layout.swizzled_offsets(rows, groups).flatten()] = scales.flatten()
    assert torch.equal(layout.swizzle(scales), expected)


def test_offsets_computed_by_hand():
    offsets = layout.swizzled_offsets(200, 6)
    # (row, group): blocks of 512 bytes, two along the 6 groups; in a block 16 bytes a row of 32, 4 bytes a quarter
    by_hand = {(0, 0): 0, (0, 3): 3, (0, 4): 512, (1, 0): 16, (32, 0): 4, (33, 1): 21, (127, 3): 511, (128, 0): 1024}
    assert {place: int(offsets[place]) for place in by_hand} == by_hand
    assert layout.swizzled_size(200, 6) == 256 * 8


def test_swizzle_keeps_the_dtype_and_the_bytes_of_float8():
    scales = torch.rand(130, 9).to(torch.float8_e4m3fn)
    swizzled = layout.swizzle(scales)
    assert swizzled.dtype == torch.float8_e4m3fn
    assert torch.equal(swizzled.view(torch.uint8)[layout.swizzled_offsets(130, 9)], scales.view(torch.uint8))


def test_wrong_width_rank_and_size_are_named():
    with pytest.raises(ValueError, match="one-byte scales"):
        layout.swizzle(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="2-D"):
        layout.swizzle(torch.zeros(4, dtype=torch.uint8))
