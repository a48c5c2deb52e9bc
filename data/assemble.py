"""Put finished parts together: shards of equal length, an index of documents, and the manifest with all checksums."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from base.files import atomic_write, json_hash, sha256_of
from data.parts import BAD_ROWS, BYTES, GROUP, INEXACT, IS_VAL, LOSSY, TEXT, TOKENS, load_part
from data.tokenizer import TextTokenizer, dtype_for

FORMAT = 1
_WRITE_BYTES = 1 << 22


def assemble(
    folder: Path,
    parts: dict[str, list[Path]],
    tokenizer: TextTokenizer,
    shard_tokens: int,
    has_val_files: bool,
    drop_copies: bool = False,
) -> dict[str, Any]:
    """Write train-*.bin, val-*.bin, their document indices and the bytes of tokens into `folder`; returns the manifest.

    Train rows with the text of a validation row are counted, and left out if `drop_copies`. Raises ValueError when a
    side is empty or when a document of val_files is also a train document (same source and id; rows without an id are
    not compared).
    """
    val = _Documents(parts["val" if has_val_files else "train"], None if has_val_files else True)
    splits: dict[str, Any] = {"val": _write_split(folder, "val", val, tokenizer, shard_tokens)}
    if splits["val"]["inexact_documents"]:
        splits["val"] |= _write_sizes(folder, val, tokenizer)
    train = _Documents(parts["train"], None if has_val_files else False, val.groups(), val.texts(), drop_copies)
    splits["train"] = _write_split(folder, "train", train, tokenizer, shard_tokens)
    splits["train"] |= {"copies_of_val": train.copies, "copies_of_val_bytes": train.copied_bytes}
    splits["train"]["copies_dropped"] = drop_copies
    _check_split(splits, train.shared, len(val.groups()))
    with atomic_write(folder / "token_bytes.npy") as handle:
        np.save(handle, tokenizer.token_bytes)
    manifest = {
        "format": FORMAT,
        "dtype": dtype_for(tokenizer.vocab_size).name,
        "tokenizer": {
            "hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            "bos": tokenizer.bos,
            "bos_id": tokenizer.bos_id,
            "prefix_bytes": tokenizer.prefix_bytes,
            "token_bytes_sha256": sha256_of(folder / "token_bytes.npy"),
        },
        "splits": splits,
        "bad_rows": {role: sum(map(bad_rows, paths)) for role, paths in parts.items()},
    }
    manifest["fingerprint"] = content_fingerprint(manifest)
    return manifest


def content_fingerprint(manifest: dict[str, Any]) -> str:
    """Names the contents, whatever source, machine or shard length they came from: tokens, documents and tokenizer."""
    splits = {name: [s["stream_sha256"], s["documents_sha256"]] for name, s in manifest["splits"].items()}
    return json_hash([manifest["tokenizer"]["hash"], manifest["dtype"], splits])


def bad_rows(path: Path) -> int:
    return int(_loaded(path, ("totals",))["totals"][BAD_ROWS])


def _loaded(path: Path, *names: tuple[str, ...]) -> dict[str, np.ndarray]:
    part = load_part(path, *names)
    if part is None:
        raise RuntimeError(f"{path} is broken: delete it and run the same command again")
    return part


class EmptySideError(ValueError):
    """No document for train, or none for val."""


class _Documents:
    """The documents of one side, part by part; `wanted` selects them by their validation flag (None: all).

    Of val all names are kept, of groups and of texts; train, which can have a hundred million, is compared with them.
    """

    def __init__(
        self,
        paths: list[Path],
        wanted: bool | None,
        val_groups: np.ndarray | None = None,
        val_texts: np.ndarray | None = None,
        drop_copies: bool = False,
    ):
        self.paths, self.wanted, self.drop_copies = paths, wanted, drop_copies
        self.val_groups, self.val_texts = val_groups, val_texts
        self.names: list[np.ndarray] = []  # [n, 2]: group and text
        self.shared = self.copies = self.copied_bytes = 0

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, documents) of each part."""
        for path in self.paths:
            part = _loaded(path)
            tokens, documents = part["tokens"], part["documents"]
            if self.wanted is not None:
                tokens, documents = _kept(tokens, documents, documents[:, IS_VAL] == self.wanted)
            if self.val_groups is None:
                self.names.append(documents[:, [GROUP, TEXT]])
            else:
                tokens, documents = self._compared(tokens, documents)
            yield tokens, documents

    def sizes(self, tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
        """Bytes of text that each token of the validation documents stands for, part by part."""
        for path in self.paths:
            part = _loaded(path)
            tokens, documents = _kept(part["tokens"], part["documents"], part["documents"][:, IS_VAL] == 1)
            yield part["sizes"] if len(part["sizes"]) else _table_sizes(tokens, documents, tokenizer)

    def groups(self) -> np.ndarray:
        """Sorted names of the documents, each once."""
        return self._sorted(0)

    def texts(self) -> np.ndarray:
        """Sorted names of the texts, each once."""
        return self._sorted(1)

    def _sorted(self, column: int) -> np.ndarray:
        return np.unique(np.concatenate([names[:, column] for names in self.names] or [np.zeros(0, np.int64)]))

    def _compared(self, tokens: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count what is also in val; the documents without copies of it, where they are to be dropped."""
        is_copy = _is_among(documents[:, TEXT], self.val_texts)
        self.copies += int(is_copy.sum())
        self.copied_bytes += int(documents[is_copy, BYTES].sum())
        if self.drop_copies:
            tokens, documents = _kept(tokens, documents, ~is_copy)
        self.shared += int(_is_among(documents[:, GROUP], self.val_groups).sum())
        return tokens, documents


def _kept(tokens: np.ndarray, documents: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tokens[np.repeat(mask, documents[:, TOKENS])], documents[mask]


def _table_sizes(tokens: np.ndarray, documents: np.ndarray, tokenizer: TextTokenizer) -> np.ndarray:
    cuts = np.cumsum(documents[:, TOKENS])[:-1]
    return np.concatenate([tokenizer.table_sizes(ids) for ids in np.split(tokens, cuts)]).astype("<u4")


def _is_among(values: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Which of `values` are among the sorted `names`, bool. np.isin would sort the names again for every part:
    0.2 s for half a million, hours over the 112,000 parts of 450 GB of text."""
    if not len(names):
        return np.zeros(len(values), bool)
    nearest = np.searchsorted(names, values).clip(max=len(names) - 1)
    return names[nearest] == values


def _write_sizes(folder: Path, val: _Documents, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Write the bytes of each validation token, where the tokenizer's table doesn't know them; returns the entries."""
    path = folder / "val-token-bytes.bin"
    with atomic_write(path) as handle:
        for sizes in val.sizes(tokenizer):
            handle.write(sizes.astype("<u4").tobytes())
    return {"token_bytes": {"file": path.name, "sha256": sha256_of(path)}}


def _write_split(
    folder: Path, split: str, parts: _Documents, tokenizer: TextTokenizer, shard_tokens: int
) -> dict[str, Any]:
    """Write the shards and the document index of one side; returns its entry in the manifest."""
    totals = {"tokens": 0, "documents": 0, "bytes": 0, "inexact_documents": 0, "lossy_documents": 0}
    index_path = folder / f"{split}-documents.bin"
    shards = _Shards(folder, split, shard_tokens * dtype_for(tokenizer.vocab_size).itemsize)
    with atomic_write(index_path) as index, shards:
        for tokens, documents in parts:
            shards.write(tokens.tobytes())
            rows = np.empty((len(documents), 3), "<i8")  # first token, bytes of text, group
            rows[:, 0] = totals["tokens"] + np.cumsum(documents[:, TOKENS]) - documents[:, TOKENS]
            rows[:, 1], rows[:, 2] = documents[:, BYTES], documents[:, GROUP]
            index.write(rows.tobytes())
            totals["tokens"] += len(tokens)
            totals["documents"] += len(documents)
            totals["bytes"] += int(documents[:, BYTES].sum())
            totals["inexact_documents"] += int(documents[:, INEXACT].sum())
            totals["lossy_documents"] += int(documents[:, LOSSY].sum())
    checksums = {"stream_sha256": shards.stream_sha256, "documents_sha256": sha256_of(index_path)}
    return {**totals, "shards": shards.entries, **checksums}


def _check_split(splits: dict[str, Any], shared: int, val_groups: int) -> None:
    for split, other in (("train", "val"), ("val", "train")):
        if splits[split]["documents"] == 0:
            raise EmptySideError(f"the {split} side has no document ({splits[other]['documents']} are {other})")
    if shared:
        raise ValueError(
            f"{shared} rows of the train files belong to one of the {val_groups} validation documents (same source and "
            "id): remove them from data.files or data.val_files; if ids begin anew in each file and name no document, "
            "type data.id_key=null"
        )


class _Shards:
    """Cuts a stream of bytes into files of at most `limit` bytes; keeps a checksum of each and of the whole."""

    def __init__(self, folder: Path, split: str, limit: int):
        self.folder, self.split, self.limit = folder, split, limit
        self.entries: list[dict[str, Any]] = []
        self._whole = hashlib.sha256()
        self._open = ExitStack()
        self._room = 0

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self._open.__exit__(kind, error, trace)
        if kind is None and self.entries:
            self.entries[-1]["sha256"] = self._shard.hexdigest()

    @property
    def stream_sha256(self) -> str:
        return self._whole.hexdigest()

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            if self._room == 0:
                self._next()
            piece = view[: min(self._room, _WRITE_BYTES)]
            self._handle.write(piece)
            self._shard.update(piece)
            self._whole.update(piece)
            self.entries[-1]["size"] += len(piece)
            self._room -= len(piece)
            view = view[len(piece) :]

    def _next(self) -> None:
        if self.entries:
            self.entries[-1]["sha256"] = self._shard.hexdigest()
        self._open.close()
        name = f"{self.split}-{len(self.entries):05d}.bin"
        self._handle = self._open.enter_context(atomic_write(self.folder / name))
        self.entries.append({"file": name, "size": 0})
        self._shard, self._room = hashlib.sha256(), self.limit
