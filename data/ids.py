"""Text that others have tokenized: files of token ids, read as documents that each begin with a BOS.

    .bin      raw ids as nanoGPT writes them (uint16, or uint32), or llm.c's with a header of 256 int32:
              20240520 (ids of two bytes) or 20240801 (of four), version, number of ids
    .npy      one array of ids
    .parquet, .arrow   rows with a list of ids, as Hugging Face's `datasets` keeps them: documents, or
              equally long pieces of one stream

Files of one stream are joined in their order, since documents go on in the next one. A BOS begins a document wherever
it is (nanoGPT ends documents with the same token); documents without any text are left out.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from base.files import say, shown
from data.sources import Row, expand_any, file_fingerprints
from data.spec import DataSpec
from data.tokenizer import TextTokenizer, tokenizer_file

HEADER_INTS = 256
HEADER_IDS = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}  # llm.c: magic number -> type of the ids
CHUNK = 1 << 20  # ids at a time
MAX_DOCUMENT = 1 << 26  # ids; more without a BOS are no document but a mistake
SAMPLE = 100  # rows that tell documents from pieces of a stream
_SUFFIXES = (".bin", ".npy", ".parquet", ".arrow")


class IdSource:
    """Documents of files of ids (data.source=tokens), all in one unit: a document may go on in the next file."""

    units = 1

    def __init__(self, patterns: list[str], spec: DataSpec, root: Path, option: str):
        self.spec, self.root = spec, root
        self.paths = expand_any(patterns, f"data.{option}")
        for path in self.paths:
            if path.suffix not in _SUFFIXES:
                raise ValueError(f"{shown(path)}: no file of token ids; possible are {' '.join(_SUFFIXES)}")
        self._begins = list(accumulate((path.stat().st_size for path in self.paths), initial=0))
        self.size = self._begins[-1]
        self._read = 0

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of each file, and that its ids are read."""
        return [{**entry, "ids": self._column} for entry in file_fingerprints(self.paths, self.root)]

    def row_count(self) -> int | None:
        """Unknown without reading the files."""
        return None

    def progress(self) -> float | None:
        """Share of the files read."""
        return self._read / max(self.size, 1)

    def rows(self, unit: int, skip: int) -> Iterator[Row]:
        """Documents after the first `skip`. Raises ValueError naming the file for ids that don't fit the tokenizer."""
        return islice((Row("", ids=ids) for ids in documents(self._pieces(), self.tokenizer.bos_id)), skip, None)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """Of whom these ids are."""
        return TextTokenizer(tokenizer_file(self.spec.tokenizer), self.spec.bos)

    @property
    def _column(self) -> str:
        return "input_ids" if self.spec.text_key == DataSpec.text_key else self.spec.text_key

    def _pieces(self) -> Iterator[tuple[np.ndarray, bool, Path]]:
        """(ids, are they a document of their own?, file) in order."""
        for number, path in enumerate(self.paths):
            self._read = self._begins[number]
            position = 0
            for ids, is_document in self._file(path):
                self._check(ids, path, position)
                position += len(ids)
                yield ids, is_document, path
        self._read = self.size

    def _file(self, path: Path) -> Iterator[tuple[np.ndarray, bool]]:
        if path.suffix in (".bin", ".npy"):
            ids = _array(path) if path.suffix == ".npy" else _binary(path, self.tokenizer.vocab_size)
            return ((ids[i : i + CHUNK], False) for i in range(0, len(ids), CHUNK))
        return _table(path, self._column, self.tokenizer.bos_id)

    def _check(self, ids: np.ndarray, path: Path, position: int) -> None:
        bad = np.flatnonzero((ids < 0) | (ids >= self.tokenizer.vocab_size)) if len(ids) else ids
        if len(bad):
            raise ValueError(
                f"{shown(path)}: id {ids[bad[0]]} at position {position + bad[0]}, but data.tokenizer="
                f"{self.spec.tokenizer} has {self.tokenizer.vocab_size} entries: give the tokenizer of these ids"
            )


def documents(pieces: Iterator[tuple[np.ndarray, bool, Path]], bos_id: int) -> Iterator[np.ndarray]:
    """Pieces of a stream, or whole documents, -> int64 arrays that begin with the BOS and hold it nowhere else."""
    open_: list[np.ndarray] = []
    for ids, is_document, path in pieces:
        if is_document:
            yield from _document(open_, bos_id)
            open_ = []
        first, *others = np.split(ids, np.flatnonzero(ids == bos_id))
        open_.append(first)
        for part in others:
            yield from _document(open_, bos_id)
            open_ = [part]
        if is_document:
            yield from _document(open_, bos_id)
            open_ = []
        if sum(map(len, open_)) > MAX_DOCUMENT:
            raise ValueError(
                f"{shown(path)}: {MAX_DOCUMENT:,} ids without a BOS (id {bos_id}): name the token that separates its "
                "documents with data.bos=..."
            )
    yield from _document(open_, bos_id)


def _document(parts: list[np.ndarray], bos_id: int) -> Iterator[np.ndarray]:
    ids = np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
    if len(ids) and ids[0] != bos_id:
        ids = np.concatenate([[bos_id], ids])
    if len(ids) > 1:
        yield ids


def _binary(path: Path, vocab_size: int) -> np.ndarray:
    """The ids of a .bin file, memory-mapped. Raises ValueError for a size that doesn't fit."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", HEADER_INTS)
    if len(header) == HEADER_INTS and int(header[0]) in HEADER_IDS:
        dtype, count, begin = HEADER_IDS[int(header[0])], int(header[2]), 4 * HEADER_INTS
        if size != begin + count * dtype.itemsize:
            raise ValueError(
                f"{shown(path)}: its header says {count:,} ids, which take {begin + count * dtype.itemsize:,} bytes, "
                f"it has {size:,}; is the file cut off?"
            )
    else:
        dtype, begin = _raw_dtype(path, vocab_size), 0
        if size % dtype.itemsize or not size:
            raise ValueError(
                f"{shown(path)}: {size:,} bytes are no ids of {dtype.itemsize} bytes; is the file cut off?"
            )
    return np.memmap(path, dtype, "r", offset=begin) if size > begin else np.zeros(0, dtype)


def _raw_dtype(path: Path, vocab_size: int) -> np.dtype:
    """Two bytes while every id fits, as nanoGPT has it; four where every second number is zero."""
    head = np.fromfile(path, "<u2", 1 << 13)
    is_wide = len(head) >= 16 and not head[1::2].any() and head[::2].any()
    return np.dtype("<u4") if vocab_size > 1 << 16 or is_wide else np.dtype("<u2")


def _array(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{shown(path)}: {error}; is the file cut off or damaged?") from error
    if ids.ndim != 1 or ids.dtype.kind not in "ui":
        raise ValueError(f"{shown(path)}: an array {list(ids.shape)} of {ids.dtype}; needed: one row of integers")
    return ids


def _table(path: Path, column: str, bos_id: int) -> Iterator[tuple[np.ndarray, bool]]:
    """The rows of a Parquet or Arrow file; equally long ones of which some lack the BOS are pieces of one stream."""
    try:
        import pyarrow
    except ImportError as error:
        raise RuntimeError(f"{shown(path)}: needs pyarrow: pip install 'nibble-train[hub]'") from error
    rows = _lists(path, column)
    try:
        sample = list(islice(rows, SAMPLE))
        lengths = {len(ids) for ids in sample}
        is_stream = len(sample) > 1 and len(lengths) == 1 and not all(ids[:1] == bos_id for ids in sample)
        if is_stream:
            say(f"{shown(path)}: rows of {lengths.pop()} ids are read as one stream")
        for ids in chain(sample, rows):
            yield ids, not is_stream
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{shown(path)}: {error}; is the file cut off or damaged?") from error


def _lists(path: Path, column: str) -> Iterator[np.ndarray]:
    """A column's lists. Raises ValueError where it is missing or holds something else than integers."""
    for batch in _batches(path):
        if column not in batch.schema.names:
            there = ", ".join(shown(name) for name in batch.schema.names)
            raise ValueError(
                f"{shown(path)}: no column {shown(column)} of ids; it has {there}: data.text_key=... names it"
            )
        lists = batch.column(column)
        for i in range(len(lists)):
            ids = lists[i].values if hasattr(lists[i], "values") else None
            if ids is None or ids.null_count or not str(ids.type).lstrip("u").startswith("int"):
                raise ValueError(f"{shown(path)}: column {shown(column)} is {lists.type}; needed: lists of integers")
            yield ids.to_numpy()


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow.ipc
    import pyarrow.parquet

    if path.suffix == ".parquet":
        yield from pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        return
    with pyarrow.memory_map(str(path)) as file:
        try:
            reader = pyarrow.ipc.open_stream(file)  # what `datasets` writes
        except pyarrow.ArrowInvalid:
            reader = pyarrow.ipc.open_file(file)
            reader = (reader.get_batch(i) for i in range(reader.num_record_batches))
        yield from reader
