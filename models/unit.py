"""Rows or columns of a matrix scaled to length one.

Sums are FP64: how the rows of a matrix are dealt to ranks then changes a length by single roundings, in rare cases.
"""

import torch
from torch import Tensor

# What is nearer to 1 stays as it is. Division leaves a length within 2^-22 of 1, so that scaling twice is scaling once.
TOLERANCE = 2.0**-21

COLUMNS, ROWS = 0, 1  # the dimension that a sum runs over


def square_sums(matrix: Tensor, over: int) -> Tensor:
    """FP64 squared lengths: [rows] over ROWS, [columns] over COLUMNS."""
    return torch.linalg.vector_norm(matrix, dim=over, dtype=torch.float64).square()


def divisors(sums: Tensor) -> Tensor:
    """FP32: what vectors of these squared lengths are divided by; 1 for a zero vector."""
    lengths = sums.sqrt()
    stays = (lengths == 0) | ((lengths - 1).abs() <= TOLERANCE)
    return torch.where(stays, 1.0, lengths).float()


def unit(matrix: Tensor, over: int) -> Tensor:
    """The matrix with rows (over ROWS) or columns (over COLUMNS) of length one."""
    return matrix / divisors(square_sums(matrix, over)).unsqueeze(over)
