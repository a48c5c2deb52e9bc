"""How a token stream is cut into sequences of seq_len + 1 tokens (inputs and targets overlap by one).

A sequence is a list of spans (first token, length) of the stream. StreamWindows cuts at every seq_len tokens from an
offset; PackedWindows follows the layout of data.packing. Both are pure functions of a window's number.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from data.packing import load_layout
from data.tokens import Stream, TokenSet

Span = tuple[int, int]


class Windows(Protocol):
    """count: sequences per epoch; max_offset: the largest offset that leaves `count` whole sequences."""

    count: int
    max_offset: int

    def spans(self, index: int, offset: int) -> Iterator[Span]: ...


class StreamWindows:
    """Documents back to back: sequence i is tokens offset + i * seq_len and the seq_len after it."""

    def __init__(self, stream: Stream, seq_len: int):
        self.seq_len = seq_len
        targets = stream.length - 1
        if targets < seq_len:
            raise ValueError(_too_short(stream, seq_len))
        # Room for an offset of up to seq_len - 1, so that every epoch has the same number of sequences.
        self.count = max((targets - (seq_len - 1)) // seq_len, 1)
        self.max_offset = min(targets - self.count * seq_len, seq_len - 1)

    def spans(self, index: int, offset: int) -> Iterator[Span]:
        """One span of seq_len + 1 tokens."""
        yield offset + index * self.seq_len, self.seq_len + 1


class PackedWindows:
    """Rows of the best-fit layout: each begins with a BOS and holds the beginnings of documents, mostly whole ones."""

    max_offset = 0

    def __init__(self, tokens: TokenSet, split: str, seq_len: int):
        self.rows, self.pieces = load_layout(tokens, split, seq_len + 1)
        self.count = len(self.rows) - 1
        if self.count < 1:
            raise ValueError(_too_short(tokens.split(split), seq_len))

    def spans(self, index: int, offset: int) -> Iterator[Span]:
        """The row's documents in order; their lengths sum to seq_len + 1."""
        for piece in self.pieces[self.rows[index] : self.rows[index + 1]].tolist():
            yield piece[0], piece[1]


def open_windows(tokens: TokenSet, split: str, seq_len: int, packing: str) -> Windows:
    """The windows of a split for data.packing = stream | bos_bestfit. Raises ValueError if there is none."""
    if packing == "stream":
        return StreamWindows(tokens.split(split), seq_len)
    if packing == "bos_bestfit":
        return PackedWindows(tokens, split, seq_len)
    raise ValueError(f"data.packing={packing!r} is none of stream, bos_bestfit")


def read_spans(stream: Stream, spans: Iterable[Span], out: np.ndarray) -> None:
    """Copy one sequence into out [seq_len + 1]."""
    done = 0
    for start, length in spans:
        stream.read(start, out[done : done + length])
        done += length


def _too_short(stream: Stream, seq_len: int) -> str:
    return (
        f"the {stream.name} split of {stream.tokens.path} has {stream.length} tokens and one sequence needs "
        f"{seq_len + 1}: give more text or a smaller batch.seq_len"
    )
