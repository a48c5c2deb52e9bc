"""Put finished parts together: shards of equal length, an index of documents, and the manifest with all checksums."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from base.files import atomic_write, json_hash, sha256_of
from data.parts import BYTES, GROUP, INEXACT, IS_VAL, TOKENS, load_part
from data.tokenizer import TextTokenizer, dtype_for

FORMAT = 1
_WRITE_BYTES = 1 << 22


def assemble(
    folder: Path, parts: dict[str, list[Path]], tokenizer: TextTokenizer, shard_tokens: int, has_val_files: bool
) -> dict[str, Any]:
    """Write train-*.bin, val-*.bin, their document indices and token_bytes.npy into `folder`; returns the manifest.

    Raises ValueError when a side is empty or when a document of val_files is also a train document (same
    source and id; rows without an id are not compared).
    """
    splits: dict[str, Any] = {}
    val_groups = np.zeros(0, np.int64)
    for split in ("val", "train"):
        role = split if has_val_files else "train"
        documents = _Documents(parts[role], None if has_val_files else split == "val", val_groups)
        splits[split] = _write_split(folder, split, documents, tokenizer, shard_tokens)
        if split == "val":
            val_groups = np.unique(np.concatenate(documents.groups)) if documents.groups else val_groups
    _check_split(splits, documents.shared, len(val_groups))
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
    }
    manifest["fingerprint"] = content_fingerprint(manifest)
    return manifest


def content_fingerprint(manifest: dict[str, Any]) -> str:
    """Names the contents, whatever source, machine or shard length they came from: tokens, documents and tokenizer."""
    splits = {name: [s["stream_sha256"], s["documents_sha256"]] for name, s in manifest["splits"].items()}
    return json_hash([manifest["tokenizer"]["hash"], manifest["dtype"], splits])


class _Documents:
    """The documents of one side, part by part; `wanted` selects them by their validation flag (None: all).

    Keeps the groups only while there are none to compare with, for val: train can have a hundred million.
    """

    def __init__(self, paths: list[Path], wanted: bool | None, val_groups: np.ndarray):
        self.paths, self.wanted, self.val_groups = paths, wanted, val_groups
        self.groups: list[np.ndarray] = []
        self.shared = 0

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, documents [n, 5]) of each part."""
        for path in self.paths:
            part = load_part(path)
            if part is None:
                raise RuntimeError(f"{path} is broken: delete it and run the same command again")
            tokens, documents = part["tokens"], part["documents"]
            if self.wanted is not None:
                mask = documents[:, IS_VAL] == self.wanted
                tokens, documents = tokens[np.repeat(mask, documents[:, TOKENS])], documents[mask]
            if len(self.val_groups):
                self.shared += _count_in(documents[:, GROUP], self.val_groups)
            else:
                self.groups.append(documents[:, GROUP])
            yield tokens, documents


def _count_in(values: np.ndarray, names: np.ndarray) -> int:
    """How many of `values` are among the sorted `names`. np.isin would sort the names again for every part: 0.2 s for
    half a million, hours over the 112,000 parts of 450 GB of text."""
    nearest = np.searchsorted(names, values).clip(max=len(names) - 1)
    return int((names[nearest] == values).sum())


def _write_split(
    folder: Path, split: str, parts: _Documents, tokenizer: TextTokenizer, shard_tokens: int
) -> dict[str, Any]:
    """Write the shards and the document index of one side; returns its entry in the manifest."""
    totals = {"tokens": 0, "documents": 0, "bytes": 0, "inexact_documents": 0}
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
    checksums = {"stream_sha256": shards.stream_sha256, "documents_sha256": sha256_of(index_path)}
    return {**totals, "shards": shards.entries, **checksums}


def _check_split(splits: dict[str, Any], shared: int, val_groups: int) -> None:
    for split, other in (("train", "val"), ("val", "train")):
        if splits[split]["documents"] == 0:
            raise ValueError(
                f"the {split} side has no document ({splits[other]['documents']} are {other}): give "
                "data.val_files=..., another data.val_fraction, or more text"
            )
    if shared:
        raise ValueError(
            f"{shared} rows of the train files belong to one of the {val_groups} validation documents (same source and "
            "id): remove them from data.files or data.val_files"
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
