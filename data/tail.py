"""A text that is one document, such as a book in a .txt file, has no documents to split by: its end is validation."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from data.sources import Row, Source
from data.split import group_of


class CutSource:
    """`source`, whose rows all belong to one document, as two: up to a line end near `keep` bytes of text, and the
    rest.

    `before`: bytes of text before each unit. tail_group names the second document.
    """

    def __init__(self, source: Source, before: list[int], keep: int):
        self.source, self.before, self.keep = source, before, keep
        self.units, self.size = source.units, source.size
        first = next(row for unit in range(self.units) for row in source.rows(unit, 0) if row.text)
        self._tail_id = f"{first.id or ''}\0end"
        self.tail_group = group_of(Row("", first.source, self._tail_id), "train", 0)

    def fingerprint(self) -> Any:
        """Of the text itself: where it is cut follows from it."""
        return self.source.fingerprint()

    def row_count(self) -> int | None:
        """Unknown: one row becomes two."""
        return None

    def progress(self) -> float | None:
        """Share of the text read."""
        return self.source.progress()

    def rows(self, unit: int, skip: int) -> Iterator[Row]:
        """Rows of the unit after the first `skip`."""
        return islice(self._rows(unit), skip, None)

    def _rows(self, unit: int) -> Iterator[Row]:
        begin = self.before[unit]
        for row in self.source.rows(unit, 0):
            end = begin + len(row.text.encode())
            if begin < self.keep < end:
                head, tail = cut(row.text, self.keep - begin)
                yield row._replace(text=head)
                yield row._replace(text=tail, id=self._tail_id)
            else:
                yield row if end <= self.keep else row._replace(id=self._tail_id)
            begin = end


def cut_of(source: Source, fraction: float) -> CutSource | None:
    """The source with its last `fraction` of bytes as a document of its own; None if it has several, or too little.

    Reads up to the second document, which most sources have in their second row.
    """
    before, total, group, ordinal = [], 0, None, 0
    for unit in range(source.units):
        before.append(total)
        for row in source.rows(unit, 0):
            if row.text:
                found = group_of(row, "train", ordinal)
                if group not in (None, found):
                    return None
                group = found
            total += len(row.text.encode())
            ordinal += 1
    keep = min(int(total * (1 - fraction)), total - 1)
    return CutSource(source, before, keep) if keep > 0 else None


def cut(text: str, at: int) -> tuple[str, str]:
    """The text in two parts, neither empty where it has two characters: at the first line end from byte `at` on, else
    at the last one before, else at a space, else at a character."""
    data = text.encode()
    for mark in (b"\n", b" "):
        for place in (data.find(mark, at) + 1, data.rfind(mark, 0, at) + 1):
            if 0 < place < len(data):
                return data[:place].decode(), data[place:].decode()
    while at < len(data) and data[at] & 0xC0 == 0x80:  # within a character
        at += 1
    return data[:at].decode(), data[at:].decode()
