"""A pseudo-random permutation of 0 .. n-1, computed for single positions: nothing of size n is ever stored.

A balanced Feistel network permutes 2^(2h) >= n numbers whatever its round function is; numbers that land outside
0 .. n-1 are sent through again until they land inside (cycle walking), which leaves a permutation of 0 .. n-1.
"""

import hashlib

import numpy as np

_ROUNDS = 8


class Permutation:
    """The permutation of 0 .. count-1 that `key` names: the same for the same key on every machine."""

    def __init__(self, count: int, key: str):
        if count < 1:
            raise ValueError(f"a permutation needs at least one element, got {count}")
        self.count = count
        # The smallest even number of bits: fewer than 4 * count points, so walks take under 4 steps on average.
        self.half = max(1, ((count - 1).bit_length() + 1) // 2)
        self.keys = [
            np.uint64(int.from_bytes(hashlib.blake2b(f"{key}/{i}".encode(), digest_size=8).digest(), "little"))
            for i in range(_ROUNDS)
        ]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n] positions in 0 .. count-1 -> int64 [n] elements, each in 0 .. count-1."""
        values = self._network(np.asarray(positions, np.uint64))
        while (outside := values >= self.count).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        shift = np.uint64(self.half)
        mask = np.uint64((1 << self.half) - 1)
        left, right = values >> shift, values & mask
        for key in self.keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit changes every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
