"""Where documents come from. A source is a list of units (files, or pieces of a hub data set) read row by row.

Rows of a unit always come in the same order, so that (unit, row number) names a row and preparation can go on after
a kill. Local files are here; data.pydocs has the Python documentation, data.hub Hugging Face's `datasets`.
"""

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from base.files import expanded, glob_paths, shown
from base.fingerprints import sums
from data.spec import DataSpec

# `zstd --long=27`: decoding such files needs a window of 128 MiB.
ZSTD_MAX_WINDOW = 1 << 27
# Compressed bytes at a time: a highly compressed file may unpack to a hundred times as much.
_ZSTD_READ_BYTES = 1 << 17
# A plain text file is one document; one longer than this is cut at line ends, so that memory stays bounded.
TXT_ROW_CHARACTERS = 1 << 20
_BOM = codecs.BOM_UTF8  # at the beginning of a file, and of each of several that were put into one
_TEXT_SUFFIXES = (".txt", ".jsonl", ".json")


class Row(NamedTuple):
    """One text; (source, id) names its document, id None means that the row is its own document. `bad`: why a row that
    was left out (data.bad_rows=skip) has no text. `ids`: instead of a text its tokens, BOS first (data.source=tokens).
    """

    text: str
    source: str = ""
    id: str | None = None
    bad: str = ""
    ids: Any = None


class BadRowError(ValueError):
    """A row that can't be read, in a file that can be read on."""


class Source(Protocol):
    """units: how many; size: bytes on disk or None; fingerprint(): JSON-able, the same wherever the data lies."""

    units: int
    size: int | None

    def fingerprint(self) -> Any: ...
    def rows(self, unit: int, skip: int) -> Iterator[Row]: ...
    def row_count(self) -> int | None: ...
    def progress(self) -> float | None: ...


class FileSource:
    """Local text, JSON-lines and Parquet files, in the order given (globs sorted); one unit per file."""

    def __init__(self, patterns: list[str], spec: DataSpec, root: Path, option: str):
        self.paths = expand(patterns, f"data.{option}")
        self.spec, self.root = spec, root
        self.units = len(self.paths)
        # Once: asked again at every file, 10,000 files are 50 million questions to a file system.
        self._begins = list(accumulate((p.stat().st_size for p in self.paths), initial=0))
        self.size = self._begins[-1]
        self._done = 0
        self._handle: IO[bytes] | None = None

    def fingerprint(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of each file, without its folder."""
        entries = file_fingerprints(self.paths, self.root)
        for path, entry in zip(self.paths, entries, strict=True):
            # Was text once: a folder that was made so keeps its name, and another one is made.
            if _kind(path) == ".txt" and _begins_with_bom(path):
                entry["byte_order_mark"] = "left out"
        return entries

    def row_count(self) -> int | None:
        """Unknown without reading the files."""
        return None

    def progress(self) -> float | None:
        """Share of the source's bytes read so far."""
        here = self._handle.tell() if self._handle and not self._handle.closed else 0
        return (self._done + here) / max(self.size, 1)

    def rows(self, unit: int, skip: int) -> Iterator[Row]:
        """Rows of file `unit` after the first `skip`. Raises ValueError naming file and line of a bad row."""
        path = self.paths[unit]
        self._done = self._begins[unit]
        with open(path, "rb") as self._handle:
            yield from self._parse(path, self._handle, skip)
        self._done = self._begins[unit + 1]

    def _parse(self, path: Path, handle: IO[bytes], skip: int) -> Iterator[Row]:
        kind = _kind(path)
        if kind == ".parquet":
            return self._parquet(path, handle, skip)
        lines = _lines(path, handle)
        return islice(_txt(path, lines, self.root), skip, None) if kind == ".txt" else self._json(path, lines, skip)

    def _json(self, path: Path, lines: Iterator[bytes], skip: int) -> Iterator[Row]:
        # Empty lines are no rows: an editor or a script leaves one at the end, concatenated files have some within.
        numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip().removeprefix(_BOM))
        for number, line in islice(numbered, skip, None):
            where = f"{shown(path)}, line {number}"
            yield checked_row(partial(_json_row, line.removeprefix(_BOM), self.spec, where), self.spec)

    def _parquet(self, path: Path, handle: IO[bytes], skip: int) -> Iterator[Row]:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise RuntimeError(f"{shown(path)}: Parquet needs pyarrow: pip install 'nibble-train[hub]'") from error
        number = 0
        try:
            file = pyarrow.parquet.ParquetFile(handle)
            columns = _columns(path, file.schema_arrow.names, self.spec)
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for values in _values(batch):
                    number += 1
                    if number > skip:
                        where = f"{shown(path)}, row {number}"
                        yield checked_row(partial(_parquet_row, values, self.spec, where), self.spec)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"{shown(path)}: {error}; is the file cut off or damaged? ({number} rows were read)"
            ) from error


def _columns(path: Path, names: list[str], spec: DataSpec) -> list[str]:
    """The columns to read. Raises ValueError where the text's is missing or one is there twice."""
    if spec.text_key not in names:
        there = ", ".join(shown(name) for name in names)
        raise ValueError(f"{shown(path)}: no column data.text_key={shown(spec.text_key)}; it has {there}")
    wanted = [name for name in (spec.text_key, spec.source_key, spec.id_key) if name in names]
    for name in wanted:
        if names.count(name) > 1:
            raise ValueError(
                f"{shown(path)}: {names.count(name)} columns are called {shown(name)}; rename or remove all but one"
            )
    return list(dict.fromkeys(wanted))


def _values(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow batch; a value that is not UTF-8 comes as the error, the others of its batch as they are."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for i in range(batch.num_rows):
        yield {name: _value(column[i]) for name, column in zip(batch.schema.names, batch.columns, strict=True)}


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _parquet_row(values: dict[str, Any], spec: DataSpec, where: str) -> Row:
    for name, value in values.items():
        if isinstance(value, UnicodeDecodeError):
            raise BadRowError(f"{where}: the value of {shown(name)} is not UTF-8 ({_bad_byte(value)} into it)")
    return make_row(values, spec, where)


def _json_row(line: bytes, spec: DataSpec, where: str) -> Row:
    text = _utf8(line, where)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, too deep
        cut = "" if line.endswith(b"\n") else "; is the file cut off?"
        raise BadRowError(f"{where}: not JSON ({error}){cut}{_whole_json(line)}") from error
    if not isinstance(row, dict):
        raise BadRowError(f"{where}: a {type(row).__name__}, not an object with a text{_whole_json(line)}")
    for key in (spec.text_key, spec.source_key, spec.id_key):
        if key and text.count(f'"{key}"') > 1 and json.loads(text, object_pairs_hook=_keys).count(key) > 1:
            raise BadRowError(f"{where}: the key {shown(key)} is there twice")
    return make_row(row, spec, where)


def _keys(pairs: list[tuple[str, Any]]) -> list[str]:
    return [key for key, _ in pairs]


def _whole_json(line: bytes) -> str:
    """The way out for a file that is one JSON value, and not one a line."""
    is_whole = line.lstrip()[:1] == b"[" or line.strip() == b"{"
    return "; one object a line is needed: jq -c '.[]' turns a list into that" if is_whole else ""


def checked_row(make: Callable[[], Row], spec: DataSpec) -> Row:
    """make(), or a row without text where that raises BadRowError and data.bad_rows=skip."""
    try:
        return make()
    except BadRowError as error:
        if spec.bad_rows == "skip":
            return Row("", bad=str(error))
        raise BadRowError(f"{error} (data.bad_rows=skip leaves such rows out and counts them)") from error


def make_row(row: dict[str, Any], spec: DataSpec, where: str) -> Row:
    """A mapping with the spec's keys -> Row. Raises BadRowError when the text is missing or no string."""
    text = row.get(spec.text_key)
    if not isinstance(text, str):
        keys = ", ".join(shown(key) for key in row)
        found = f"the row's keys are {keys}" if spec.text_key not in row else f"found {_kind_of(text)}"
        raise BadRowError(f"{where}: no text under data.text_key={shown(spec.text_key)}; {found}")
    identity = _name(row.get(spec.id_key)) if spec.id_key else None
    source = _name(row.get(spec.source_key)) if spec.source_key else None
    return Row(_valid_utf8(text), source or "", identity)


def _name(value: Any) -> str | None:
    """An id or a source as text; None where there is none: null, NaN (an empty cell of a table), an empty string."""
    if value is None or value != value:
        return None
    name = _valid_utf8(str(value))
    return name if name.strip() else None


def _kind_of(value: Any) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"


def _valid_utf8(text: str) -> str:
    """A lone surrogate (half of an escaped pair in JSON) has no UTF-8: it becomes a question mark."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()


def expand(patterns: list[str], option: str) -> list[Path]:
    """As expand_any, and raises ValueError for a file type that FileSource can't read."""
    paths = expand_any(patterns, option)
    for path in paths:
        _kind(path)
    return paths


def expand_any(patterns: list[str], option: str) -> list[Path]:
    """Globs and paths -> files, each glob sorted. Raises ValueError when a pattern matches nothing."""
    paths: list[Path] = []
    for pattern in patterns:
        found = glob_paths(expanded(pattern, option))
        if not found:
            raise ValueError(f"{option}: no file matches {pattern!r} (current folder: {os.getcwd()})")
        paths += found
    return paths


def file_fingerprints(paths: list[Path], root: Path) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of files; sums are remembered in root/fingerprints.json (base/fingerprints.py)."""
    known = zip(paths, sums(paths, root), strict=True)
    return [{"file": path.name, "size": path.stat().st_size, "sha256": sha256} for path, sha256 in known]


def _kind(path: Path) -> str:
    suffixes = [s for s in path.suffixes if s not in (".gz", ".zst")]
    kind = suffixes[-1] if suffixes else ""
    if kind in _TEXT_SUFFIXES or (kind == ".parquet" and path.suffix == ".parquet"):
        return kind
    if path.is_dir():
        raise ValueError(f"{shown(path)} is a folder; name its files, such as '{shown(path)}/*.jsonl'")
    raise ValueError(
        f"{shown(path)}: unknown file type; possible are .txt .jsonl .json (each also .gz, .zst) and .parquet"
    )


def _lines(path: Path, handle: IO[bytes]) -> Iterator[bytes]:
    """Lines of bytes, which end at "\\n" alone: decoding first would split at a bare carriage return and change the
    text."""
    try:
        yield from _unpacked(path, handle)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{shown(path)}: {error}; is the file cut off or damaged?") from error


def _unpacked(path: Path, handle: IO[bytes]) -> Any:
    """The file's bytes as a stream of lines."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=handle)
    return io.BufferedReader(_ZstdFile(handle), 1 << 20) if path.suffix == ".zst" else handle


def _begins_with_bom(path: Path) -> bool:
    with open(path, "rb") as handle:
        try:
            return _unpacked(path, handle).read(len(_BOM)) == _BOM
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return False  # named with the file's name when it is read


def _utf8(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            reason = "it begins as UTF-16; convert the file: iconv -f UTF-16 -t UTF-8"
        else:
            reason = f"{_bad_byte(error)} into the line; is the file damaged or in another encoding?"
        raise BadRowError(f"{where}: not UTF-8 ({reason})") from error


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x}, {error.start + 1} bytes"


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of all frames of a file. Unlike zstandard's own reader, a file that is cut off is an error."""

    def __init__(self, handle: IO[bytes]):
        import zstandard

        self.handle = handle
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)
        self.error = zstandard.ZstdError
        self.frame = self.decompressor.decompressobj()
        self.has_begun = False
        self.waiting = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.waiting:
            compressed = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame, self.has_begun = self.decompressor.decompressobj(), False
            compressed = compressed or self.handle.read(_ZSTD_READ_BYTES)
            if not compressed:
                if self.has_begun:
                    raise EOFError("the last zstd frame is not complete")
                return 0
            self.has_begun = True
            try:
                self.waiting = memoryview(self.frame.decompress(compressed))
            except self.error as error:
                raise EOFError(f"zstd: {error}") from error
        size = min(len(buffer), len(self.waiting))
        buffer[:size] = self.waiting[:size]
        self.waiting = self.waiting[size:]
        return size


def _txt(path: Path, lines: Iterator[bytes], root: Path) -> Iterator[Row]:
    # The contents' hash is the document's source, so that equal names in two folders stay two documents.
    source = file_fingerprints([path], root)[0]["sha256"]
    kept: list[str] = []
    size = 0
    for number, line in enumerate(lines, 1):
        text = _utf8(line.removeprefix(_BOM) if number == 1 else line, f"{shown(path)}, line {number}")
        kept.append(text)
        size += len(text)
        if size >= TXT_ROW_CHARACTERS:
            yield Row("".join(kept), source, path.name)
            kept, size = [], 0
    if kept:
        yield Row("".join(kept), source, path.name)
