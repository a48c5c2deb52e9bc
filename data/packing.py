"""BOS-aligned best-fit packing, the layout of the nanochat runs: every sequence starts with a document's first token.

Rows of `row_tokens` tokens are filled one after the other from a buffer of the next documents: the longest document
that fits whole goes in; when none fits, the shortest one in the buffer is cropped to fill the row exactly and its
rest is dropped. So every token is seen with its document's beginning, at the price of the cropped tokens: 57 % at
sequence length 2048 on our corpus, whose books are cut in rows of some 5,700 tokens (the share is printed).

The layout is computed once, when first needed, from the document index alone, and stored beside the shards; row i is
the same ever after, so a resumed run reads what it would have read.
"""

import bisect
import errno
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from base.files import ROOM_FOR_TOKENS, disk_full_explained, locked, say, sha256_of, write_json
from data.tokens import Stream, TokenSet

# nanochat's buffer size; a larger one crops less and mixes documents of distant parts of the stream.
BUFFER_DOCUMENTS = 1000


def load_layout(tokens: TokenSet, split: str, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64 [n + 1], pieces int64 [m, 2]): row i is pieces[rows[i]:rows[i + 1]], each (first token, length).

    Computes and stores the layout on first use. Raises RuntimeError when a stored one is damaged.
    """
    name = f"packed-{split}-{row_tokens}"
    folder = tokens.path / name
    if not folder.is_dir():
        try:
            _make(tokens, split, row_tokens, folder)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            folder = _own_folder(tokens.manifest["splits"][split]["documents_sha256"]) / name
            say(f"{tokens.path} can't be written, so its packed rows are kept in {folder}")
            _make(tokens, split, row_tokens, folder)
    try:
        info = json.loads((folder / "info.json").read_text())
        damaged = [name for name in ("rows", "pieces") if sha256_of(folder / f"{name}.bin") != info[f"{name}_sha256"]]
        documents = info["documents_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{folder} is damaged ({error!r}): delete it; it is made again") from error
    if damaged:
        raise RuntimeError(f"{folder / damaged[0]}.bin is damaged: delete {folder}; it is made again")
    if documents != tokens.manifest["splits"][split]["documents_sha256"]:
        raise RuntimeError(f"{folder} belongs to other documents: delete it; it is made again")
    rows = np.asarray(np.memmap(folder / "rows.bin", "<i8", "r"))
    if len(rows) == 1:  # not one row: there is no empty memory map
        return rows, np.zeros((0, 2), "<i8")
    return rows, np.asarray(np.memmap(folder / "pieces.bin", "<i8", "r", shape=(int(rows[-1]), 2)))


def _make(tokens: TokenSet, split: str, row_tokens: int, folder: Path) -> None:
    """Compute and store the layout in `folder`, if no other process has."""
    with disk_full_explained(folder.parent, ROOM_FOR_TOKENS), locked(folder.parent / ".lock-packing"):
        if not folder.is_dir():
            _store(tokens.split(split), row_tokens, folder)


def _own_folder(documents: str) -> Path:
    """This user's folder for layouts of these documents, where temporary files lie: for token folders that many read
    and few may write. Raises RuntimeError if somebody else has it."""
    mine = Path(tempfile.gettempdir()) / f"nibble-packed-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if mine.is_symlink() or mine.stat().st_uid != os.getuid():
        raise RuntimeError(f"{mine} belongs to somebody else: set TMPDIR to a folder of yours")
    folder = mine / documents[:16]
    folder.mkdir(exist_ok=True)
    return folder


def pack(documents: Iterator[tuple[int, int]], row_tokens: int) -> Iterator[list[tuple[int, int]]]:
    """Documents (first token, tokens) in order -> full rows of pieces (first token, length).

    A last short row is dropped. Among documents of equal length the one that came first is taken.
    """
    buffer: list[tuple[int, int, int]] = []  # (length, order, first token), sorted
    arrivals = enumerate(documents)
    _fill(buffer, arrivals)
    while buffer:
        row: list[tuple[int, int]] = []
        room = row_tokens
        while room and buffer:
            fits = bisect.bisect_right(buffer, (room, float("inf"), 0)) - 1
            if fits >= 0:
                fits = bisect.bisect_left(buffer, (buffer[fits][0], -1, 0))  # the first of that length
            length, _, start = buffer.pop(max(fits, 0))  # none fits: the shortest, cropped
            length = min(length, room)
            row.append((start, length))
            room -= length
            _fill(buffer, arrivals)
        if room == 0:
            yield row


def _fill(buffer: list[tuple[int, int, int]], arrivals: Iterator[tuple[int, tuple[int, int]]]) -> None:
    while len(buffer) < BUFFER_DOCUMENTS:
        item = next(arrivals, None)
        if item is None:
            return
        order, (start, length) = item
        bisect.insort(buffer, (length, order, start))


def _store(stream: Stream, row_tokens: int, folder: Path) -> None:
    work = folder.with_name(f".{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    rows, pieces = 0, 0
    with open(work / "rows.bin", "wb") as row_file, open(work / "pieces.bin", "wb") as piece_file:
        row_file.write(np.int64(0).tobytes())
        for row in pack(_documents(stream), row_tokens):
            piece_file.write(np.array(row, "<i8").tobytes())
            rows, pieces = rows + 1, pieces + len(row)
            row_file.write(np.array([pieces], "<i8").tobytes())
    kept = rows * row_tokens / stream.length
    info = {"row_tokens": row_tokens, "rows": rows, "pieces": pieces, "tokens_kept": kept, "buffer": BUFFER_DOCUMENTS}
    for name in ("rows", "pieces"):
        info[f"{name}_sha256"] = sha256_of(work / f"{name}.bin")
    info["documents_sha256"] = stream.tokens.manifest["splits"][stream.name]["documents_sha256"]
    write_json(work / "info.json", info)
    work.rename(folder)
    say(
        f"packed {stream.name} into {rows:,} rows of {row_tokens} tokens; "
        f"{100 * (1 - kept):.1f} % of the tokens cropped away"
    )


def _documents(stream: Stream) -> Iterator[tuple[int, int]]:
    """(first token, tokens) of each document, from the memory-mapped index, in pieces."""
    starts = stream.documents[:, 0]
    waiting: deque[int] = deque()
    for begin in range(0, len(starts), 1 << 16):
        waiting.extend(starts[begin : begin + (1 << 16)].tolist())
        while len(waiting) > 1:
            start = waiting.popleft()
            yield start, waiting[0] - start
    if waiting:
        yield waiting[0], stream.length - waiting[0]
