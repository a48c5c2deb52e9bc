"""Validation on a fixed token list: nats per token, bits per byte, and a standard error clustered by document.

The list is cut into the same batches on any number of ranks (a quantizer's amax belongs to its batch) and the batches
are dealt round-robin. Nats are summed in FP64 per (sequence, document) segment; those rows are what runs pair on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.evalset import EvalSet
from training.distributed import Dist

# Evaluation batches count from here in the random state's micro-batch field: never a training micro-batch's number.
EVAL_MICRO_BASE = 2**24


@dataclass(frozen=True)
class EvalRows:
    """One row per (sequence, document) segment: ids, summed nats, target tokens, bytes of the target tokens."""

    sequence: np.ndarray
    document: np.ndarray
    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def bpb(self) -> float:
        """Bits per byte of text; special tokens stand for no bytes."""
        return float(self.nats.sum() / (math.log(2) * self.bytes.sum()))

    @property
    def standard_error(self) -> float:
        """Of the loss: ratio estimator with documents as clusters, n / (n - 1) corrected. NaN for one document."""
        _, cluster = np.unique(self.document, return_inverse=True)
        residual = np.bincount(cluster, weights=self.nats - self.loss * self.tokens)
        n = len(residual)
        return float(np.sqrt(n / (n - 1) * (residual**2).sum()) / self.tokens.sum()) if n > 1 else math.nan

    def save(self, path: Path) -> None:
        """Write eval/<step>.npz atomically."""
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **{name: getattr(self, name) for name in ROW_FIELDS})
        temporary.replace(path)


ROW_FIELDS = ("sequence", "document", "nats", "tokens", "bytes")


def evaluate(
    nats_per_token: Callable[[Tensor], Tensor],
    evalset: EvalSet,
    batch: int,
    ranks: Dist,
    before_batch: Callable[[int], None],
) -> EvalRows:
    """Score every window of `evalset`, `batch` at a time; every rank gets all rows.

    nats_per_token: int64 tokens [B, T + 1] on the device -> FP32 [B, T]. `before_batch(i)` sets the random state.
    """
    total = np.zeros(len(evalset.segments), dtype=np.float64)
    with torch.no_grad():
        batches = list(enumerate(range(0, len(evalset), batch)))
        for turn in range(0, len(batches), ranks.world):
            # A forward is a collective under FSDP: a rank without a batch in the last turn repeats the first one.
            has_batch = turn + ranks.rank < len(batches)
            i, first = batches[turn + ranks.rank] if has_batch else batches[0]
            before_batch(EVAL_MICRO_BASE + i)
            tokens = evalset.windows(first, min(batch, len(evalset) - first))
            nats = nats_per_token(tokens.to(ranks.device))
            if has_batch:
                evalset.add_nats(total, first, nats.double().cpu().numpy())
    total = ranks.sum(torch.from_numpy(total)).numpy()
    segments = evalset.segments
    return EvalRows(segments.sequence, segments.document, total, segments.tokens, segments.bytes)
