"""Training batches as a pure function of (seed, epoch, global sample index). There is no state to save or lose.

Sample s belongs to epoch s // samples_per_epoch. Each epoch visits all windows in another order, from another offset
into the token stream; both follow from the seed and the epoch alone, so the number of GPUs, the batch size, a resume
or a prefetch depth can't change what sample s is.
"""

import hashlib
import queue
import threading
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data.order import Permutation
from data.tokens import TokenSet
from data.windows import open_windows, read_spans

PREFETCH_BATCHES = 4


class Loader:
    """Sequences of seq_len + 1 tokens from one split of a token set, shuffled by `seed`.

    Raises ValueError when the split is too short for one sequence.
    """

    def __init__(self, tokens: TokenSet, split: str, seq_len: int, seed: int, packing: str = "stream"):
        self.tokens, self.stream = tokens, tokens.split(split)
        self.seq_len, self.seed, self.packing = seq_len, seed, packing
        self.windows = open_windows(tokens, split, seq_len, packing)
        self.samples_per_epoch = self.windows.count
        self._order = lru_cache(maxsize=2)(self._make_order)

    def samples(self, first: int, count: int) -> Tensor:
        """Global samples first .. first + count as int64 [count, seq_len + 1]: inputs [:, :-1], targets [:, 1:]."""
        out = np.empty((count, self.seq_len + 1), np.int64)
        for row, (index, offset) in zip(out, self._locate(first, count).tolist(), strict=True):
            read_spans(self.stream, self.windows.spans(index, offset), row)
        self.stream.check(out)
        return torch.from_numpy(out)

    def sample_hashes(self, first: int, count: int, batches: int) -> list[str]:
        """For each of `batches` batches of `count` samples from sample `first` on, 16 hex digits that name it: which
        windows of which data, in which order.

        Reads no tokens (the data's fingerprint stands for them) and locates all samples at once: the GPU waits
        meanwhile.
        """
        what = f"{self.tokens.fingerprint}/{self.seq_len}/{self.packing}".encode()
        where = self._locate(first, count * batches).astype("<i8").reshape(batches, -1)
        return [hashlib.blake2b(what + batch.tobytes(), digest_size=8).hexdigest() for batch in where]

    def prefetch(self, ranges: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
        """Yield samples(first, count) for each range, read ahead by a thread; in pinned memory if there is CUDA.

        Keeps up to PREFETCH_BATCHES batches ready. An error in the thread is raised here; closing the iterator (or
        dropping it) ends the thread.
        """
        ready: queue.Queue[Tensor | Exception | None] = queue.Queue(PREFETCH_BATCHES)
        stop = threading.Event()
        thread = threading.Thread(target=self._read_ahead, args=(iter(ranges), ready, stop), daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _read_ahead(self, ranges: Iterator[tuple[int, int]], ready: queue.Queue, stop: threading.Event) -> None:
        def put(item: Tensor | Exception | None) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        try:
            pin = torch.cuda.is_available()
            for first, count in ranges:
                batch = self.samples(first, count)
                if not put(batch.pin_memory() if pin else batch):
                    return
            put(None)
        except Exception as error:  # raised again by the consumer, where the run can report it
            put(error)

    def _locate(self, first: int, count: int) -> np.ndarray:
        """(window, offset into the stream) of each sample, int64 [count, 2]."""
        if first < 0 or count < 1:
            raise ValueError(f"samples first={first}, count={count}: first must be 0 or more and count 1 or more")
        return self.locate(np.arange(first, first + count))

    def locate(self, samples: np.ndarray) -> np.ndarray:
        """(window, offset into the stream) of samples given by number, int64 [n, 2]."""
        where = np.empty((len(samples), 2), np.int64)
        epochs, positions = np.divmod(samples, self.samples_per_epoch)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            permutation, offset = self._order(epoch)
            where[mine, 0] = permutation(positions[mine])
            where[mine, 1] = offset
        return where

    def _make_order(self, epoch: int) -> tuple[Permutation, int]:
        key = f"order/{self.seed}/{epoch}"
        draw = int.from_bytes(hashlib.blake2b(f"offset/{self.seed}/{epoch}".encode(), digest_size=8).digest(), "little")
        return Permutation(self.samples_per_epoch, key), draw % (self.windows.max_offset + 1)
