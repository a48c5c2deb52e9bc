"""Several token folders as one text to train on, each with its share of the sequences.

Which folder sample s is from is a pure function of (seed, s), as all order is: within every period of samples each
folder has exactly its share, in an order that the seed and the period name, and its own samples follow each other as if
it were trained on alone. So shares hold at any number of ranks, under resume, and over any stretch of whole periods.
"""

from functools import lru_cache
from math import isclose
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from base.files import json_hash
from data.loader import Loader
from data.order import Permutation
from data.spec import DataSpec
from data.tokens import TokenSet
from data.windows import read_spans

MAX_PERIOD = 10_000  # samples; shares are rounded to this, where no shorter period has them exactly


class Mixture(TokenSet):
    """The first folder, whose validation text counts, with the others beside it for training.

    parts: the folders; counts: samples of each in a period. Raises ValueError for folders of different tokenizers.
    """

    def __init__(self, folders: list[str], weights: list[float], verify: bool = False):
        super().__init__(folders[0], verify)
        self.parts = [self, *(TokenSet(folder, verify) for folder in folders[1:])]
        for part in self.parts[1:]:
            mine, other = ([s.tokenizer_hash, s.bos_id, s.dtype.name] for s in (self, part))
            if mine != other:
                raise ValueError(
                    f"{part.path} has another tokenizer than {self.path}: prepare it again with data.tokenizer="
                    f"{self.path}/tokenizer.json data.bos='{self.manifest['tokenizer']['bos']}'"
                )
        if len({part.fingerprint for part in self.parts}) < len(self.parts):
            raise ValueError("data.mix names the same text twice: give each folder once, with its whole weight")
        self.counts = shares(weights)
        self.shares = [count / sum(self.counts) for count in self.counts]
        prints = [part.fingerprint for part in self.parts]
        self.fingerprint = json_hash([[name, share] for name, share in zip(prints, self.shares, strict=True)])

    @property
    def train_tokens(self) -> int:
        """Tokens of training after which the first of the folders has been read once."""
        lengths = [part.split("train").length for part in self.parts]
        return int(min(length / share for length, share in zip(lengths, self.shares, strict=True)))

    @property
    def label(self) -> str:
        """Names and shares."""
        pairs = zip(self.parts, self.shares, strict=True)
        return " + ".join(f"{100 * share:.4g} % {part.path.name}" for part, share in pairs)

    def check_unchanged(self) -> None:
        """As TokenSet's, of every folder."""
        super().check_unchanged()
        for part in self.parts[1:]:
            part.check_unchanged()


class MixedLoader(Loader):
    """Samples of a mixture; the interface of Loader."""

    def __init__(self, tokens: Mixture, split: str, seq_len: int, seed: int, packing: str = "stream"):
        super().__init__(tokens, split, seq_len, seed, packing)
        others = [Loader(part, split, seq_len, seed, packing) for part in tokens.parts[1:]]
        self.loaders = [Loader(tokens, split, seq_len, seed, packing), *others]
        self.ends = np.cumsum(tokens.counts)
        self._slots = lru_cache(maxsize=4)(lambda period: Permutation(int(self.ends[-1]), f"mix/{seed}/{period}"))

    def samples(self, first: int, count: int) -> Tensor:
        """As Loader.samples."""
        out = np.empty((count, self.seq_len + 1), np.int64)
        where = self._locate(first, count)
        for row, (part, index, offset) in zip(out, where.tolist(), strict=True):
            loader = self.loaders[part]
            read_spans(loader.stream, loader.windows.spans(index, offset), row)
        for part in np.unique(where[:, 0]).tolist():
            self.loaders[part].stream.check(out[where[:, 0] == part])
        return torch.from_numpy(out)

    def parts_of(self, first: int, count: int) -> np.ndarray:
        """(folder, number of its own sample) of each sample, int64 [count, 2]."""
        samples = np.arange(first, first + count)
        period, position = np.divmod(samples, self.ends[-1])
        slot = np.empty(count, np.int64)
        for one in np.unique(period).tolist():
            slot[period == one] = self._slots(one)(position[period == one])
        part = np.searchsorted(self.ends, slot, "right")
        counts = np.diff(self.ends, prepend=0)
        return np.stack([part, period * counts[part] + slot - (self.ends - counts)[part]], 1)

    def _locate(self, first: int, count: int) -> np.ndarray:
        """(folder, window, offset into its stream) of each sample, int64 [count, 3]."""
        found = self.parts_of(first, count)
        where = np.empty((count, 3), np.int64)
        where[:, 0] = found[:, 0]
        for part in np.unique(found[:, 0]).tolist():
            mine = found[:, 0] == part
            where[mine, 1:] = self.loaders[part].locate(found[mine, 1])
        return where


def shares(weights: list[float]) -> list[int]:
    """Samples of each folder in a period: the shortest period that has the weights exactly, else MAX_PERIOD, to which
    they are rounded by largest remainder. Raises ValueError for weights that add up to another number than 1."""
    total = sum(weights)
    if not all(weight > 0 for weight in weights) or not isclose(total, 1, abs_tol=1e-6):
        fitting = ",".join(f"{weight / total:.6g}" for weight in weights) if all(w > 0 for w in weights) else "..."
        raise ValueError(
            f"data.weights={list(weights)} add up to {total:.6g}; needed: shares above 0 that add up to 1: "
            f"data.weights=[{fitting}]"
        )
    for period in range(len(weights), MAX_PERIOD):
        counts = [round(weight * period) for weight in weights]
        exact = all(isclose(w * period, c, abs_tol=1e-6) for w, c in zip(weights, counts, strict=True))
        if exact and sum(counts) == period:
            return counts
    counts = [int(weight * MAX_PERIOD) for weight in weights]
    by_rest = sorted(range(len(weights)), key=lambda i: counts[i] - weights[i] * MAX_PERIOD)
    for i in by_rest[: MAX_PERIOD - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        raise ValueError(f"data.weights={list(weights)}: a share must be at least {1 / MAX_PERIOD}")
    return counts


def open_tokens(spec: DataSpec, folder: Path | str) -> TokenSet:
    """What a run reads: the folder that was prepared or given, or the mixture that data.mix names."""
    if not spec.mix:
        return TokenSet(folder, verify=spec.verify)
    return Mixture(spec.mixed_folders(), [float(weight) for weight in spec.weights], spec.verify)


def open_loader(tokens: TokenSet, seq_len: int, seed: int, packing: str) -> Loader:
    """Training samples of a token folder or a mixture."""
    return (MixedLoader if isinstance(tokens, Mixture) else Loader)(tokens, "train", seq_len, seed, packing)
