"""Tokenize a source in parts of a few megabytes on all cores.

A part is one file: consecutive rows of one unit with their tokens. Which rows form a part depends on the source only,
so finished parts survive a kill and the rest is made exactly as it would have been.
"""

import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from base.files import atomic_write, say, shown
from data.progress import Progress
from data.sources import Row, Source
from data.split import group_of, ids_name, text_name
from data.tokenizer import TextTokenizer, dtype_for

PART_CHARACTERS = 4 << 20
CHARACTERS_PER_ID = 4  # of English; parts of ids are then as large as parts of text
# Columns of a part's `documents`: tokens with BOS, bytes of text, name of the document's group, 1 if validation, 1 if
# the table's bytes of its tokens don't add up to those of its text, 1 if they don't spell it (asked of inexact
# validation documents only), name of its text.
TOKENS, BYTES, GROUP, IS_VAL, INEXACT, LOSSY, TEXT = range(7)
ROWS, IS_LAST, BAD_ROWS = range(3)  # of a part's `totals`
SHOWN_BAD_ROWS = 5
_worker_tokenizer: list[TextTokenizer] = []  # filled once per worker process


@dataclass
class Part:
    """Rows of one unit on their way to a worker; `rows` counts those without text too, which are dropped, and
    `bad_rows` those left out because they can't be read."""

    path: Path
    texts: list[str | np.ndarray] = field(default_factory=list)  # arrays: ids, BOS first
    groups: list[int] = field(default_factory=list)
    is_val: list[bool] = field(default_factory=list)
    rows: int = 0
    bad_rows: int = 0
    characters: int = 0
    is_last: bool = False


def tokenize_source(
    source: Source,
    role: str,
    is_val: Callable[[int, int], bool],
    tokenizer: TextTokenizer,
    folder: Path,
    workers: int,
    max_rows: int = 0,
) -> list[Path]:
    """Write all parts of `source` that are not there yet; returns their paths in order.

    At most 2 * workers parts are in memory. Raises RuntimeError when a worker process dies (most often: out of memory).
    """
    parts: list[Path] = []
    with Progress(f"tokenizing {role}", source.progress) as progress, _Pool(tokenizer, workers) as pool:
        for part in read_parts(source, role, is_val, folder, max_rows, parts):
            pool.submit(part, progress)
        pool.finish(progress)
    return parts


def read_parts(
    source: Source, role: str, is_val: Callable[[int, int], bool], folder: Path, max_rows: int, parts: list[Path]
) -> Iterator[Part]:
    """Yield the parts that are still to be made; append the path of every part, made or not, to `parts`."""
    ordinal, bad_rows = 0, 0
    first_rows: set[int] = set()  # names of the documents that units begin with
    for unit in range(source.units):
        if max_rows and ordinal == max_rows:
            return
        index, skip, finished = _finished(folder, role, unit)
        parts += [_part_path(folder, role, unit, i) for i in range(index)]
        ordinal += skip
        if finished:
            continue
        part = Part(_part_path(folder, role, unit, index))
        for row in source.rows(unit, skip):
            if max_rows and ordinal == max_rows:
                break
            if (
                part.characters >= PART_CHARACTERS
            ):  # a full part is closed by the next row, so that the last one is known
                parts.append(part.path)
                yield part
                index += 1
                part = Part(_part_path(folder, role, unit, index))
            group = group_of(row, role, ordinal)
            if row.bad and (bad_rows := bad_rows + 1) <= SHOWN_BAD_ROWS:
                say(f"left out: {row.bad}" + (" (more are only counted)" if bad_rows == SHOWN_BAD_ROWS else ""))
            if part.rows == index == 0 and row.id is not None:
                _warn_of_repeated_ids(row, group, first_rows)
            _add(part, row, group, is_val, ordinal)
            ordinal += 1
        part.is_last = True
        parts.append(part.path)
        yield part


def _warn_of_repeated_ids(row: Row, group: int, first_rows: set[int]) -> None:
    """Say, once, that two files begin with the same document: line numbers are no ids."""
    if group in first_rows and -1 not in first_rows:
        first_rows.add(-1)
        say(
            f"two files begin with the id {shown(row.id)!r}: their rows of equal ids are taken for one document; if "
            "these ids begin anew in each file, type data.id_key=null"
        )
    first_rows.add(group)


def _add(part: Part, row: Row, group: int, is_val: Callable[[int, int], bool], ordinal: int) -> None:
    part.rows += 1
    part.bad_rows += bool(row.bad)
    part.characters += len(row.text) if row.ids is None else CHARACTERS_PER_ID * len(row.ids)
    if row.text or row.ids is not None:
        part.texts.append(row.text if row.ids is None else row.ids)
        part.groups.append(group)
        part.is_val.append(is_val(group, ordinal))


def load_part(
    path: Path, names: tuple[str, ...] = ("tokens", "sizes", "documents", "totals")
) -> dict[str, np.ndarray] | None:
    """A finished part's arrays, or None if it is missing or broken; only what is named is read.

    tokens [t]; sizes: uint32, bytes of text of each token of the validation documents, empty where the
    tokenizer's table has them right; documents int64 [n, 7]; totals [3].
    """
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def tokenize_part(part: Part, tokenizer: TextTokenizer) -> int:
    """Write one part atomically; returns the bytes of text in it."""
    if load_part(part.path, ("totals",)) is not None:  # made before a kill, after a part that was not
        return 0
    documents = np.zeros((len(part.texts), 7), np.int64)
    documents[:, GROUP], documents[:, IS_VAL] = part.groups, part.is_val
    tokens = []
    are_ids = bool(part.texts) and not isinstance(part.texts[0], str)
    for row, (text, ids) in enumerate(
        zip(part.texts, part.texts if are_ids else tokenizer.encode(part.texts), strict=True)
    ):
        documents[row, TOKENS] = len(ids)
        if are_ids:
            documents[row, BYTES], documents[row, TEXT] = tokenizer.table_sizes(ids).sum(), ids_name(ids)
            documents[row, INEXACT] = documents[row, LOSSY] = not tokenizer.spells_text
        else:
            documents[row, BYTES], documents[row, TEXT] = len(text.encode()), text_name(text)
            documents[row, INEXACT] = not tokenizer.is_exact(text, ids)
        tokens.append(ids.astype(dtype_for(tokenizer.vocab_size)))
    sizes = _true_sizes(part.texts, tokens, documents, tokenizer)
    stream = np.concatenate(tokens) if tokens else np.zeros(0, dtype_for(tokenizer.vocab_size))
    with atomic_write(part.path) as handle:
        totals = np.array([part.rows, part.is_last, part.bad_rows])
        np.savez(handle, tokens=stream, sizes=sizes, documents=documents, totals=totals)
    return int(documents[:, BYTES].sum())


def _true_sizes(
    texts: list[str], tokens: list[np.ndarray], documents: np.ndarray, tokenizer: TextTokenizer
) -> np.ndarray:
    """`sizes` of a part; fills in the LOSSY column."""
    val = np.flatnonzero(documents[:, IS_VAL])
    if not documents[val, INEXACT].any():
        return np.zeros(0, "<u4")
    pieces = []
    for row in val:
        if documents[row, INEXACT] and isinstance(texts[row], str):
            documents[row, LOSSY] = not tokenizer.is_lossless(texts[row], tokens[row])
            pieces.append(tokenizer.true_sizes(texts[row]))
        else:
            pieces.append(tokenizer.table_sizes(tokens[row]))
    return np.concatenate(pieces).astype("<u4")


def _part_path(folder: Path, role: str, unit: int, index: int) -> Path:
    return folder / f"{role}-{unit:06d}-{index:06d}.npz"


def _finished(folder: Path, role: str, unit: int) -> tuple[int, int, bool]:
    """(parts finished without a gap, rows in them, is the unit complete?)"""
    index = rows = 0
    while (arrays := load_part(_part_path(folder, role, unit, index), ("totals",))) is not None:
        index += 1
        rows += int(arrays["totals"][ROWS])
        if arrays["totals"][IS_LAST]:
            return index, rows, True
    return index, rows, False


class _Pool:
    """Worker processes with a bounded queue. One worker means none: the parent does the work."""

    def __init__(self, tokenizer: TextTokenizer, workers: int):
        self.tokenizer = tokenizer
        self.workers = workers or len(os.sched_getaffinity(0))
        self.pending: set[Future[int]] = set()
        self.done_here = 0  # characters
        self.executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        if self.executor:
            self.executor.shutdown(cancel_futures=True)

    def submit(self, part: Part, progress: Progress) -> None:
        # One part's worth of text is not worth starting processes; many files of less than a part each are.
        is_small = part.is_last and self.executor is None and self.done_here < PART_CHARACTERS
        if self.workers == 1 or is_small:
            self.done_here += part.characters
            progress.add(tokenize_part(part, self.tokenizer))
            return
        self.executor = self.executor or self._start()
        self.pending.add(self.executor.submit(_work, part))
        if len(self.pending) >= 2 * self.workers:
            self._collect(progress)

    def finish(self, progress: Progress) -> None:
        while self.pending:
            self._collect(progress)

    def _start(self) -> ProcessPoolExecutor:
        # spawn: the parent may have threads (rayon's, or a trainer's) that a fork would leave half alive.
        arguments = (str(self.tokenizer.path), self.tokenizer.bos, os.getpid())
        return ProcessPoolExecutor(self.workers, get_context("spawn"), _start_worker, arguments)

    def _collect(self, progress: Progress) -> None:
        done, self.pending = wait(self.pending, return_when=FIRST_COMPLETED)
        for future in done:
            try:
                progress.add(future.result())
            except BrokenProcessPool as error:
                raise RuntimeError(
                    f"one of {self.workers} tokenizing processes was killed, most often for lack of memory: "
                    "try fewer with data.workers=...; finished parts are kept"
                ) from error


def _start_worker(tokenizer: str, bos: str, parent: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread in each process: the processes are the parallelism
    _worker_tokenizer.append(TextTokenizer(Path(tokenizer), bos))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would wait for work forever."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(part: Part) -> int:
    return tokenize_part(part, _worker_tokenizer[0])
