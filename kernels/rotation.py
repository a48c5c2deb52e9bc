"""Random Hadamard rotations of several rounds, merged into one integer matrix; the check that asks for a second round.

One round is x -> (D_0 x) H, with signs D_0 on the diagonal and the unnormalised Hadamard matrix H, in blocks of dim
along the contraction. Two rounds bring a single coordinate near a normal distribution, three bring pairs (arXiv
2605.06014). A product of rounds has integer entries and R R^T = dim^rounds * identity, so R replaces the signs and the
GEMM's scalar is 1 / dim^rounds. Signs of round r are words r * dim + i of the stream that round 0 has.
"""

import torch
from torch import Tensor

ROUNDS = (1, 2, 3, "auto")
# Of a block's third absolute moment: 1.6 for a Gaussian, sqrt(dim) for a single element. And the share of the energy in
# blocks beyond it from which a second round is worth it. Both are ours: the bias that MS-EDEN keeps after one round is
# 400e-6 of a block's energy at moments near 6, 20e-6 near 4.
HEAVY_MOMENT, HEAVY_SHARE = 5.0, 0.05
EXACT_STEP = 16.0  # entries of three rounds reach dim^1.5; BF16 holds integers to 256, so they are split at 16


def hadamard(dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """[dim, dim] of +1 and -1 in Sylvester's order: entry (i, j) is -1 to the number of bits that i and j share."""
    matrix = torch.ones(1, 1, device=device, dtype=dtype)
    while matrix.shape[0] < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def merged(signs: Tensor, dim: int) -> Tensor:
    """float32 [dim, dim] of integers: D_0 H D_1 H ... for signs [rounds * dim]."""
    h = hadamard(dim, signs.device)
    matrix = torch.eye(dim, device=signs.device)
    for diagonal in signs.view(-1, dim):
        matrix = (matrix * diagonal) @ h
    return matrix


def two_parts(matrix: Tensor) -> Tensor:
    """float32 [2, dim, dim]: multiples of 16 and the rest, each exact in BF16; together `matrix`."""
    high = (matrix / EXACT_STEP).round() * EXACT_STEP
    return torch.stack((high, matrix - high))


def chosen(signs: Tensor, dim: int, heavy: Tensor) -> Tensor:
    """float32 [dim, dim], for the first operand of a GEMM: two rounds where `heavy` (bool []), else one, times the
    power of two at or below sqrt(dim). signs [2 * dim].

    With `partner` for the second operand the GEMM's scalar is 1 / dim^2 either way; powers of two change no code."""
    once = 2.0 ** (dim.bit_length() // 2 if dim.bit_length() % 2 else dim.bit_length() // 2 - 1)
    return torch.where(heavy, merged(signs, dim), once * merged(signs[:dim], dim))


def partner(rotation: Tensor) -> Tensor:
    """What the second operand takes beside a first one's `chosen`: the same, doubled where one round fell short."""
    return rotation * (rotation.shape[0] ** 2 / rotation[0].square().sum())


def is_heavy(x: Tensor, axis: int, dim: int) -> Tensor:
    """bool []: whether blocks of dim along `axis` whose third absolute moment is large hold much of the energy of x."""
    y = (x if axis == 1 else x.t()).to(torch.float32)
    blocks = y.reshape(-1, dim)
    blocks = blocks / blocks.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    energy = blocks.square().sum(dim=-1)
    moment = dim**0.5 * blocks.abs().pow(3).sum(dim=-1) / energy.pow(1.5)
    beyond = torch.where(moment > HEAVY_MOMENT, energy, 0.0)  # an empty block's moment is NaN, and no more than that
    return beyond.sum() > HEAVY_SHARE * energy.sum()


def rotated(y: Tensor, rotation: Tensor) -> Tensor:
    """FP32 y [rows, contraction] in blocks along the contraction: by signs [dim], or by `merged` or `two_parts`."""
    blocks = y.view(-1, rotation.shape[-1])
    if rotation.ndim == 1:
        return ((blocks * rotation) @ hadamard(rotation.shape[0], y.device)).view(y.shape)
    matrix = rotation if rotation.ndim == 2 else rotation.sum(dim=0)
    return (blocks @ matrix).view(y.shape)


def restored(y: Tensor, rotation: Tensor) -> Tensor:
    """What `rotated` made, rotated back and normalised."""
    dim = rotation.shape[-1]
    blocks = y.view(-1, dim)
    if rotation.ndim == 1:
        return ((blocks @ hadamard(dim, y.device)) * (rotation / dim)).view(y.shape)
    matrix = rotation if rotation.ndim == 2 else rotation.sum(dim=0)
    return (blocks @ matrix.t() / matrix[0].square().sum()).view(y.shape)
