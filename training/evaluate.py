"""Validation on a fixed token list (data/evalset.py), on all ranks.

The list is cut into the same batches on any number of ranks, because a quantizer's amax belongs to its batch, and the
batches are dealt round-robin. Nats are summed in FP64 per (sequence, document) segment: the rows that runs pair on.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from base.files import atomic_write
from base.runfolder import SEGMENT_KEYS
from data.evalset import EvalSet
from training.ranks.distributed import Dist

# Evaluation batches count from here in the random state's micro-batch field: never a training micro-batch's number.
EVAL_MICRO_BASE = 2**24


def evaluate(
    nats_per_token: Callable[[Tensor], Tensor],
    evalset: EvalSet,
    batch: int,
    ranks: Dist,
    before_batch: Callable[[int], None],
) -> np.ndarray:
    """Score every sequence, `batch` at a time; every rank gets the FP64 nats of all segments.

    nats_per_token: int64 tokens [B, T + 1] on the device -> FP32 [B, T]. `before_batch(i)` sets the random state.
    The device has its next batch before the host takes up the nats of the one before: neither waits for the other.
    """
    total = np.zeros(len(evalset.segments.sequence))
    batches = list(enumerate(range(0, evalset.sequences, batch)))
    scored: Scored | None = None
    with torch.no_grad():
        for first_of_round in range(0, len(batches), ranks.world):
            # A forward is a collective under FSDP: a rank without a batch in the last round repeats the first one.
            has_batch = first_of_round + ranks.rank < len(batches)
            i, first = batches[first_of_round + ranks.rank] if has_batch else batches[0]
            count = min(batch, evalset.sequences - first)
            before_batch(EVAL_MICRO_BASE + i)
            tokens = evalset.samples(first, count)
            tokens = tokens.pin_memory() if ranks.device.type == "cuda" else tokens
            nats = nats_per_token(tokens.to(ranks.device, non_blocking=True))
            if scored:
                scored.add_to(total, evalset)
            scored = Scored(first, count, nats) if has_batch else None
    if scored:
        scored.add_to(total, evalset)
    return ranks.sum(torch.from_numpy(total)).numpy()


class Scored:
    """The nats of sequences first .. first + count, on their way from the device."""

    def __init__(self, first: int, count: int, nats: Tensor) -> None:
        self._first, self._count, self._arrived = first, count, None
        self._nats = nats
        if nats.is_cuda:
            self._nats = torch.empty(nats.shape, dtype=nats.dtype, pin_memory=True).copy_(nats, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def add_to(self, total: np.ndarray, evalset: EvalSet) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()
        where = evalset.segment_range(self._first, self._count)
        total[where] = evalset.segment_nats(self._first, self._nats.numpy())


def save_rows(path: Path, evalset: EvalSet, nats: np.ndarray) -> None:
    """Write eval/<step>.npz atomically: one row per segment, its ids, FP64 nats, target tokens and bytes."""
    path.parent.mkdir(exist_ok=True)
    part = {key: nats if key == "nats" else getattr(evalset.segments, key) for key in SEGMENT_KEYS}
    with atomic_write(path) as file:
        np.savez(file, **part)
