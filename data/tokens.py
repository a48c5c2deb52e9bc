"""A prepared token folder, memory-mapped and checked."""

import json
import mmap
import os
import resource
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from base.files import json_hash, sha256_of
from data.assemble import FORMAT

# Open files left for everything else: libraries, sockets of other ranks, checkpoints.
SPARE_FILES = 512
_REMEDY = "delete the folder and prepare it again with scripts/prepare_data.py"


class TokenSet:
    """The tokens of one folder: splits train and val as streams of token ids, each document led by a BOS.

    Opening compares the size of every file with the manifest; verify=True also every SHA-256.
    Raises FileNotFoundError for a missing folder, RuntimeError naming the file for a damaged one.
    """

    def __init__(self, path: Path | str, verify: bool = False):
        self.path = Path(path)
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path} is no token folder (no manifest.json): run scripts/prepare_data.py"
            ) from error
        except ValueError as error:
            raise RuntimeError(f"{self.path / 'manifest.json'} is damaged ({error}): {_REMEDY}") from error
        try:
            self._open(verify)
        except (KeyError, TypeError, AttributeError) as error:
            raise RuntimeError(f"{self.path / 'manifest.json'} is damaged ({error!r}): {_REMEDY}") from error
        self._stamps = {file: _stamp(file) for file in sorted(self.path.glob("*.bin"))}
        self._streams: dict[str, Stream] = {}

    def _open(self, verify: bool) -> None:
        if self.manifest["format"] != FORMAT:
            raise RuntimeError(f"{self.path} has format {self.manifest['format']}, needed: {FORMAT}; {_REMEDY}")
        self.fingerprint: str = self.manifest["fingerprint"]
        self.tokenizer_hash: str = self.manifest["tokenizer"]["hash"]
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
        self.bos_id: int = self.manifest["tokenizer"]["bos_id"]
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self._check_files(verify)

    def split(self, name: str) -> "Stream":
        """The stream of `train` or `val`."""
        if name not in self.manifest["splits"]:
            raise ValueError(f"{self.path} has no split {name!r}; it has {', '.join(self.manifest['splits'])}")
        if name not in self._streams:
            self._streams[name] = Stream(self, name)
        return self._streams[name]

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int64 [vocab_size]; special tokens 0."""
        return np.load(self.path / "token_bytes.npy").astype(np.int64)

    @property
    def train_tokens(self) -> int:
        """Tokens of training after which text is read again."""
        return self.split("train").length

    @property
    def label(self) -> str:
        """How the start screen calls it."""
        return self.path.name

    @property
    def copies_of_val(self) -> int:
        """Train rows whose text is also a validation row's; 0 in folders made before they were counted."""
        train = self.manifest["splits"]["train"]
        return 0 if train.get("copies_dropped") else train.get("copies_of_val", 0)

    def check_unchanged(self) -> None:
        """Raise RuntimeError, naming the file, if a shard was rewritten or cut since it was opened. Reads no
        tokens, unless a file was touched."""
        for file, stamp in self._stamps.items():
            now = _stamp(file) if file.exists() else None
            if now == stamp:
                continue
            # Contents can change within one tick of the clock, or get their old time back; a backup or chmod touches
            # ctime alone.
            if now and now[:2] == stamp[:2] and sha256_of(file) == self._sha256.get(file.name):
                self._stamps[file] = now
            else:
                raise RuntimeError(
                    f"{file} was altered while the run was reading it; steps since the last checkpoint may have seen "
                    "other tokens and aren't saved. Restore the file, or delete the folder and prepare it again with "
                    "scripts/prepare_data.py; then the same command resumes from the last checkpoint"
                )

    def _check_files(self, verify: bool) -> None:
        if verify:
            self._check_tokenizer()
        files = [(self.path / "token_bytes.npy", None, self.manifest["tokenizer"]["token_bytes_sha256"])]
        for name, split in self.manifest["splits"].items():
            files.append((self.path / f"{name}-documents.bin", 24 * split["documents"], split["documents_sha256"]))
            files += [(self.path / s["file"], s["size"], s["sha256"]) for s in split["shards"]]
            if own := split.get("token_bytes"):
                files.append((self.path / own["file"], 4 * split["tokens"], own["sha256"]))
        self._sha256 = {file.name: sha256 for file, _, sha256 in files}
        for file, size, sha256 in files:
            if not file.is_file():
                raise RuntimeError(f"{file} is missing: {_REMEDY}")
            if size is not None and file.stat().st_size != size:
                got = file.stat().st_size
                raise RuntimeError(f"{file} has {got} bytes, the manifest says {size} (cut off or altered): {_REMEDY}")
            # The small table is always compared: it has no size in the manifest.
            if (verify or size is None) and sha256_of(file) != sha256:
                raise RuntimeError(f"{file} differs from its checksum in the manifest (altered): {_REMEDY}")

    def _check_tokenizer(self) -> None:
        """Raise RuntimeError where the stored tokenizer.json isn't the one that made the tokens."""
        file = self.path / "tokenizer.json"
        try:
            unchanged = json_hash(json.loads(file.read_text(encoding="utf-8"))) == self.manifest["tokenizer"]["hash"]
        except (OSError, ValueError):
            unchanged = False
        if not unchanged:
            raise RuntimeError(f"{file} is missing or not the one that made the tokens: {_REMEDY}")


def _mapped(file: Path, dtype: np.dtype, in_order: bool) -> np.ndarray:
    """A file as a read-only array. Unless it is read `in_order`, without read-ahead: training takes a kilobyte from
    anywhere, and a batch of 512 cold samples read 589 MB (8 MiB of read-ahead) in 0.6 s instead of 2.6 MB in 0.08 s."""
    with open(file, "rb") as handle:
        memory = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    if not in_order:
        memory.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(memory, dtype)


def _allow_open_files(more: int) -> None:
    """Each mapped file stays open, and the usual limit is 1,024: 25.6B tokens in shards of 25M. Raises this process's
    limit where it may, and RuntimeError with the remedy where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + more + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RuntimeError(
            f"{more} token shards need {needed} open files, this machine allows {hard}: raise that (ulimit -Hn), "
            "or prepare the text again with a larger data.shard_tokens"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _stamp(file: Path) -> tuple[int, int, int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class Stream:
    """One split: `length` tokens over several shards, and its documents.

    documents int64 [n, 3]: first token (its BOS), bytes of text, group (rows of one document share it); memory-mapped.
    """

    def __init__(self, tokens: TokenSet, name: str):
        entry = tokens.manifest["splits"][name]
        self.tokens, self.name, self.length = tokens, name, int(entry["tokens"])
        self.files = [tokens.path / shard["file"] for shard in entry["shards"]]
        _allow_open_files(len(self.files))
        # Plain array views and a list: numpy's memmap class and searchsorted cost microseconds, a batch takes hundreds.
        self._shards = [_mapped(file, tokens.dtype, in_order=name == "val") for file in self.files]
        self._starts = list(accumulate((len(shard) for shard in self._shards), initial=0))
        shape = (int(entry["documents"]), 3)
        self.documents = np.asarray(np.memmap(tokens.path / f"{name}-documents.bin", "<i8", "r", shape=shape))
        own = entry.get("token_bytes")
        self._sizes = _mapped(tokens.path / own["file"], np.dtype("<u4"), in_order=True) if own else None
        # Tokens of an inexact document stand for other bytes than the table says; of a lossy one, for other text.
        self.bytes_are_exact = not entry["inexact_documents"] or (bool(own) and not entry["lossy_documents"])

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy tokens start .. start + len(out) into `out`, across shards; check() them afterwards."""
        shard = bisect_right(self._starts, start) - 1
        done = 0
        while done < len(out):
            begin = start + done - self._starts[shard]
            piece = self._shards[shard][begin : begin + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1

    def sizes(self, positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Bytes of text that the tokens `ids` at these positions stand for, int64; 0 for a BOS."""
        if self._sizes is not None:
            return self._sizes[positions].astype(np.int64)
        since_bos = positions - self.documents[self.rows(positions), 0]
        prefix = self.tokens.manifest["tokenizer"]["prefix_bytes"]
        return self.tokens.token_bytes[ids] - prefix * (since_bos == 1)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The row of the document index that each position lies in."""
        return np.searchsorted(self.documents[:, 0], positions, "right") - 1

    def check(self, tokens: np.ndarray) -> None:
        """Raise RuntimeError, naming the shard, if tokens that were read hold an id beyond the vocabulary."""
        if tokens.max() < self.tokens.vocab_size:
            return
        for file, shard in zip(self.files, self._shards, strict=True):
            if shard.max() >= self.tokens.vocab_size:
                raise RuntimeError(
                    f"{file} holds token {shard.max()}, the vocabulary has {self.tokens.vocab_size} entries "
                    f"(altered shard): {_REMEDY}"
                )
