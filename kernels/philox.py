"""Counter-based random bits: Philox4x32-10 in torch int64 arithmetic (Salmon et al., SC 2011).

key = the 64-bit seed; counter = (element // 4, step, micro-batch, layer << 8 | stream); output word = element % 4
(docs/numerics.md#5-random-bits). Nothing is stored: the same numbers give the same bits on resume, in recomputation
and on any number
of devices. A 32-bit word lives in an int64; products wrap modulo 2^64, whose low 64 bits are the exact product.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

# Stream numbers, the low byte of the last counter word: signs use the GEMM number (0, 1, 2), rounding 16 + slot.
ROUNDING_STREAM = 16


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit output words (int64 tensors, 0 .. 2^32-1) of Philox4x32-10.

    counter, key: int64 tensors holding 32-bit words, broadcast together. Known answer: all zeros give
    6627e8d5 e169c58d bc57ac4c 9b00dbd8 (Random123).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK32) ^ c1 ^ k0,
            p1 & MASK32,
            ((p0 >> 32) & MASK32) ^ c3 ^ k1,
            p0 & MASK32,
        )
        k0, k1 = (k0 + WEYL_0) & MASK32, (k1 + WEYL_1) & MASK32
    return c0, c1, c2, c3


def random_words(rng: Tensor, layer: Tensor | int, stream: int, count: int) -> Tensor:
    """int64 [count]: the 32-bit word of each element 0 .. count-1.

    rng: int64 [3] = (seed, step, micro-batch) on the device where the words are wanted. layer: int64 [] tensor or 0.
    """
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=rng.device)
    seed, step, micro_batch = rng.unbind(0)
    key = (seed & MASK32, (seed >> 32) & MASK32)
    last = torch.as_tensor(layer, dtype=torch.int64, device=rng.device) * 256 + stream
    words = philox4x32((blocks, step & MASK32, micro_batch & MASK32, last & MASK32), key)
    return torch.stack(words, dim=-1).reshape(-1)[:count]


def random24(rng: Tensor, layer: Tensor | int, slot: int, count: int, bits: int = 24) -> Tensor:
    """float32 [count]: the top 24 bits of each element's word as an integer. Round up iff it is below frac * 2^24.

    bits 8: byte `element % 4`, from the lowest, of word `element // 4` as (byte + 1/2) * 2^16, the middle of its range.
    """
    if bits == 8:
        words = random_words(rng, layer, ROUNDING_STREAM + slot, (count + 3) // 4)
        bytes_of = words[:, None] >> torch.arange(0, 32, 8, device=words.device) & 0xFF
        return (bytes_of.flatten()[:count] * 2**16 + 2**15).to(torch.float32)
    return (random_words(rng, layer, ROUNDING_STREAM + slot, count) >> 8).to(torch.float32)


def random_signs(rng: Tensor, layer: Tensor | int, gemm: int, dim: int) -> Tensor:
    """float32 [dim] of +1 and -1: -1 where the top bit of the word of that index in the block is set."""
    return 1.0 - 2.0 * (random_words(rng, layer, gemm, dim) >> 31).to(torch.float32)


@dataclass(frozen=True)
class Draw:
    """The random state of one slot in one call. rng: int64 [3] (seed, step, micro-batch); layer: int64 []."""

    rng: Tensor
    layer: Tensor
    slot: int = 0

    def random24(self, count: int, bits: int = 24) -> Tensor:
        return random24(self.rng, self.layer, self.slot, count, bits)
