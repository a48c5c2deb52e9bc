"""Where documents come from. A source is a list of units (files, or pieces of a hub data set) read row by row.

Rows of a unit always come in the same order, so that (unit, row number) names a row and preparation can go on after
a kill. Local files are here; data.pydocs has the Python documentation, data.hub Hugging Face's `datasets`.
"""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from base.files import sha256_of, write_json
from data.spec import DataSpec

# `zstd --long=27`: decoding such files needs a window of 128 MiB.
ZSTD_MAX_WINDOW = 1 << 27
# Compressed bytes at a time: a highly compressed file may unpack to a hundred times as much.
_ZSTD_READ_BYTES = 1 << 17
# A plain text file is one document; one longer than this is cut at line ends, so that memory stays bounded.
TXT_ROW_CHARACTERS = 1 << 20
_TEXT_SUFFIXES = (".txt", ".jsonl", ".json")


class Row(NamedTuple):
    """One text; (source, id) names its document, id None means that the row is its own document."""

    text: str
    source: str = ""
    id: str | None = None


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
        return file_fingerprints(self.paths, self.root)

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
        lines = _decoded(path, handle)
        return islice(_txt(path, lines, self.root), skip, None) if kind == ".txt" else self._json(path, lines, skip)

    def _json(self, path: Path, lines: Iterator[str], skip: int) -> Iterator[Row]:
        for number, line in enumerate(islice(lines, skip, None), skip + 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, too deep
                raise ValueError(f"{path}, line {number}: not JSON ({error}); is the file cut off?") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a {type(row).__name__}, not an object with a text")
            yield make_row(row, self.spec, f"{path}, line {number}")

    def _parquet(self, path: Path, handle: IO[bytes], skip: int) -> Iterator[Row]:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise RuntimeError(f"{path}: Parquet needs pyarrow: pip install 'nibble-train[hub]'") from error
        keys = {self.spec.text_key, self.spec.source_key, self.spec.id_key}
        number = 0
        try:
            table = pyarrow.parquet.ParquetFile(handle)
            names = table.schema_arrow.names
            if self.spec.text_key not in names:
                raise ValueError(f"{path}: no column data.text_key={self.spec.text_key}; it has {', '.join(names)}")
            columns = [name for name in names if name in keys]
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    if number > skip:
                        yield make_row(row, self.spec, f"{path}, row {number}")
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: {error}; is the file cut off or damaged? ({number} rows were read)") from error


def make_row(row: dict[str, Any], spec: DataSpec, where: str) -> Row:
    """A mapping with the spec's keys -> Row. Raises ValueError when the text is missing or no string."""
    text = row.get(spec.text_key)
    if not isinstance(text, str):
        found = f"the row's keys are {', '.join(row)}" if spec.text_key not in row else f"found {_kind_of(text)}"
        raise ValueError(f"{where}: no text under data.text_key={spec.text_key}; {found}")
    identity = row.get(spec.id_key) if spec.id_key else None
    source = row.get(spec.source_key) if spec.source_key else None
    identity = None if identity is None else _valid_utf8(str(identity))
    return Row(_valid_utf8(text), "" if source is None else _valid_utf8(str(source)), identity)


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
        found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not found:
            raise ValueError(f"{option}: no file matches {pattern!r} (current folder: {os.getcwd()})")
        paths += [Path(p) for p in found]
    return paths


def file_fingerprints(paths: list[Path], root: Path) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of files; sums are remembered in root/fingerprints.json by path, size and mtime."""
    root.mkdir(parents=True, exist_ok=True)
    cache_path = root / "fingerprints.json"
    cache = _remembered(cache_path)
    known = dict(cache)
    result = []
    for path in paths:
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        cache[key] = cache.get(key) or sha256_of(path)
        result.append({"file": path.name, "size": stat.st_size, "sha256": cache[key]})
    if cache != known and os.access(root, os.W_OK):  # prepared folders may lie where nothing can be written
        write_json(cache_path, cache)
    return result


def _remembered(path: Path) -> dict[str, str]:
    """The sums in `path`; none where it is missing or damaged: they are only made again."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _kind(path: Path) -> str:
    suffixes = [s for s in path.suffixes if s not in (".gz", ".zst")]
    kind = suffixes[-1] if suffixes else ""
    if kind in _TEXT_SUFFIXES or (kind == ".parquet" and path.suffix == ".parquet"):
        return kind
    raise ValueError(f"{path}: unknown file type; possible are .txt .jsonl .json (each also .gz, .zst) and .parquet")


def _decoded(path: Path, handle: IO[bytes]) -> Iterator[str]:
    stream: Any = handle
    if path.suffix == ".gz":
        stream = gzip.GzipFile(fileobj=handle)
    elif path.suffix == ".zst":
        stream = io.BufferedReader(_ZstdFile(handle), 1 << 20)
    try:
        # Lines of bytes end at "\n" alone: decoding first would split at a bare carriage return and change the text.
        for number, line in enumerate(stream, 1):
            yield _utf8(line, f"{path}, line {number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}; is the file cut off or damaged?") from error


def _utf8(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        bad = f"byte 0x{line[error.start]:02x}, {error.start + 1} bytes into the line"
        raise ValueError(f"{where}: not UTF-8 ({bad}); is the file damaged or in another encoding?") from error


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


def _txt(path: Path, lines: Iterator[str], root: Path) -> Iterator[Row]:
    # The contents' hash is the document's source, so that equal names in two folders stay two documents.
    source = file_fingerprints([path], root)[0]["sha256"]
    kept: list[str] = []
    size = 0
    for line in lines:
        kept.append(line)
        size += len(line)
        if size >= TXT_ROW_CHARACTERS:
            yield Row("".join(kept), source, path.name)
            kept, size = [], 0
    if kept:
        yield Row("".join(kept), source, path.name)
