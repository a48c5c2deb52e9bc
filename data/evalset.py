"""A fixed list of validation sequences, and which target token belongs to which document.

The list depends on the token set, the sequence length and the number of tokens only: not on batch size or ranks.
Per (sequence, document) there is one segment of ordinary targets; a BOS target (the end of the previous document) is a
segment of its own with 0 bytes. So: nats per token = all nats / all tokens; bits per byte = nats of the segments
of text / (ln 2 * their bytes), special tokens left out; errors cluster by document.
"""

from dataclasses import dataclass
from math import log

import numpy as np
import torch
from torch import Tensor

from data.tokens import Stream, TokenSet
from data.windows import Span, StreamWindows, Windows, open_windows, read_spans

_CHUNK = 256  # sequences at a time: bounds the memory that building the list takes


@dataclass(frozen=True)
class Segments:
    """Arrays of equal length, int64 but for is_text: targets begin .. end (positions 0 .. seq_len) of `sequence`
    lie in `document`."""

    sequence: np.ndarray
    document: np.ndarray  # number of the document in val, by first appearance; rows of one document share it
    begin: np.ndarray
    end: np.ndarray
    bytes: np.ndarray  # of the targets' text
    is_text: np.ndarray  # bool: not a BOS

    @property
    def tokens(self) -> np.ndarray:
        """Number of targets in each segment."""
        return self.end - self.begin


class EvalSet:
    """`count` validation targets in sequences of seq_len, spread evenly over val; count=None takes every target once.

    Attributes: sequences (how many), targets (how many count), segments. With packing=bos_bestfit the sequences are
    rows of the packed layout, and None means every row. Raises ValueError, with the numbers, when val is shorter than
    asked.
    """

    def __init__(self, tokens: TokenSet, seq_len: int, count: int | None, packing: str = "stream"):
        self.tokens, self.stream, self.seq_len = tokens, tokens.split("val"), seq_len
        windows = open_windows(tokens, "val", seq_len, packing)
        there = _sequences(self.stream, windows, seq_len)
        chosen = range(there) if count is None else self._spread(count, there)
        self._spans: list[list[Span]] = [list(windows.spans(i, 0)) for i in chosen]
        self._tail = 0  # targets at the start of the last sequence that the one before it has counted
        if count is None and packing == "stream":
            self._add_tail()
        self.sequences = len(self._spans)
        self.segments = self._segments()
        self.targets = int(self.segments.tokens.sum())

    def samples(self, first: int, count: int) -> Tensor:
        """Sequences first .. first + count as int64 [count, seq_len + 1]: inputs [:, :-1], targets [:, 1:]."""
        return torch.from_numpy(self._read(first, count))

    def segment_nats(self, first: int, nats: np.ndarray) -> np.ndarray:
        """Per-target nats [n, seq_len] of sequences first .. first + n -> FP64 sums of these sequences' segments."""
        where = self.segment_range(first, len(nats))
        sums = np.zeros((len(nats), self.seq_len + 1))
        np.cumsum(nats, axis=1, dtype=np.float64, out=sums[:, 1:])
        row = self.segments.sequence[where] - first
        return sums[row, self.segments.end[where]] - sums[row, self.segments.begin[where]]

    def segment_range(self, first: int, count: int) -> slice:
        """Where the segments of sequences first .. first + count are in `segments`."""
        low, high = np.searchsorted(self.segments.sequence, [first, first + count])
        return slice(int(low), int(high))

    def summary(self, nats: np.ndarray) -> dict[str, float | None]:
        """FP64 nats of all segments -> loss (nats per target, BOS included), bpb (BOS excluded), se of the loss; and
        bpb_approximate, true where the tokens don't spell the text whose bytes are counted.

        The standard error takes documents as the independent units (a ratio estimate); with one document it is None.
        """
        part = self.segments
        loss = nats.sum() / part.tokens.sum()
        bpb = nats[part.is_text].sum() / (log(2) * part.bytes.sum())
        marks = {} if self.stream.bytes_are_exact else {"bpb_approximate": True}
        return {"loss": float(loss), "bpb": float(bpb), "se": self._standard_error(nats, loss), **marks}

    def difference(self, nats: np.ndarray, other: np.ndarray) -> tuple[float, float | None]:
        """Loss of `nats` over that of `other`, two scores of this list, and its standard error: documents pair."""
        apart = nats - other
        loss = apart.sum() / self.targets
        return float(loss), self._standard_error(apart, loss)

    def _standard_error(self, nats: np.ndarray, loss: float) -> float | None:
        part = self.segments
        residual = np.bincount(part.document, nats - loss * part.tokens)
        size = len(residual)
        if size < 2:
            return None
        return float(np.sqrt(size / (size - 1) * (residual**2).sum()) / part.tokens.sum())

    def _spread(self, count: int, there: int) -> list[int]:
        wanted = count // self.seq_len
        if not 1 <= wanted <= there:
            raise ValueError(
                f"{count} evaluation tokens are {wanted} sequences of {self.seq_len}; the val split of "
                f"{self.tokens.path} has {there}: give {self.seq_len} to {there * self.seq_len} tokens, or null for all"
            )
        return [i * there // wanted for i in range(wanted)]

    def _add_tail(self) -> None:
        rest = self.stream.length - 1 - len(self._spans) * self.seq_len
        if rest:
            self._spans.append([(self.stream.length - 1 - self.seq_len, self.seq_len + 1)])
            self._tail = self.seq_len - rest

    def _read(self, first: int, count: int) -> np.ndarray:
        if not 0 <= first <= first + count <= self.sequences:
            raise ValueError(f"sequences {first} to {first + count} asked, there are {self.sequences}")
        out = np.empty((count, self.seq_len + 1), np.int64)
        for row, spans in zip(out, self._spans[first : first + count], strict=True):
            read_spans(self.stream, spans, row)
        self.stream.check(out)
        return out

    def _segments(self) -> Segments:
        pieces = [self._segments_of(i, min(_CHUNK, self.sequences - i)) for i in range(0, self.sequences, _CHUNK)]
        sequence, row, *others = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return Segments(sequence, _numbered(self.stream.documents[row, 2]), *others)

    def _segments_of(self, first: int, count: int) -> tuple[np.ndarray, ...]:
        """(sequence, row of the document index, begin, end, bytes, is text?) of the segments of some sequences."""
        chosen = self._spans[first : first + count]
        places = [np.concatenate([np.arange(start, start + length) for start, length in spans]) for spans in chosen]
        positions = np.stack(places)[:, 1:]
        sizes = self.stream.sizes(positions, self._read(first, count)[:, 1:])
        row = self.stream.rows(positions)
        since_bos = positions - self.stream.documents[row, 0]
        counted = np.ones_like(row, bool)
        if first + count == self.sequences:
            counted[-1, : self._tail] = False
        # A segment starts where the sequence does, where the document changes, and at and after a BOS.
        new = np.ones_like(row, bool)
        new[:, 1:] = (row[:, 1:] != row[:, :-1]) | (since_bos[:, 1:] <= 1) | (counted[:, 1:] != counted[:, :-1])
        at = np.flatnonzero(new)
        length = np.diff(at, append=new.size)
        begin = at % self.seq_len
        columns = (
            first + at // self.seq_len,
            row.ravel()[at],
            begin,
            begin + length,
            np.add.reduceat(sizes.ravel(), at),
            since_bos.ravel()[at] > 0,
        )
        return tuple(column[counted.ravel()[at]] for column in columns)


def available(tokens: TokenSet, seq_len: int, packing: str) -> int:
    """Targets of EvalSet(tokens, seq_len, None), told without reading val: half a billion tokens take minutes."""
    stream, windows = tokens.split("val"), open_windows(tokens, "val", seq_len, packing)
    return stream.length - 1 if packing == "stream" else _sequences(stream, windows, seq_len) * seq_len


def _sequences(stream: Stream, windows: Windows, seq_len: int) -> int:
    """Whole sequences from the first token on; training's windows leave room for an offset."""
    return (stream.length - 1) // seq_len if isinstance(windows, StreamWindows) else windows.count


def _numbered(groups: np.ndarray) -> np.ndarray:
    """Group names -> 0, 1, 2, ... in order of first appearance."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
