"""Byte-level BPE training, and what the rest needs to know of any tokenizer.json: hash, BOS, bytes per token."""

import json
import os
import re
import time
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from base.files import atomic_write, json_hash, say

TRAINED_BOS = "<|bos|>"
_BOS_NAMES = (TRAINED_BOS, "<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[BOS]")
_METASPACE = "\u2581"
LONG_RUN = 1000
_LONG_RUN = re.compile(rf"\S{{{LONG_RUN}}}|\s{{{LONG_RUN}}}")
# Texts go to the tokenizer in groups of about this many characters: its results take some 100 bytes per token.
_BATCH_CHARACTERS = 1 << 18


class TextTokenizer:
    """A tokenizer.json made ready for corpora: no truncation, no special tokens added or recognized in text.

    vocab_size is the largest id + 1; token_bytes uint16 [vocab_size] counts the UTF-8 bytes that each token stands for
    (special tokens: 0); prefix_bytes is 1 where the tokenizer puts a space before each text (Llama-2's does).
    Raises ValueError when the file is no tokenizer.json or has no BOS token.
    """

    def __init__(self, path: Path, bos: str | None = None):
        from tokenizers import Tokenizer

        self.path = path
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} can't be read as a tokenizer.json: {error}") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # Otherwise a document that quotes "<|bos|>" would contain a document boundary.
        self.tokenizer.encode_special_tokens = True
        self.vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocab.values()) + 1
        special = {token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special}
        self.bos = _find_bos(special, bos, path)
        self.bos_id = self.vocab[self.bos]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the tokenizer.json, independent of its spacing and order of keys."""
        return json_hash(json.loads(self.path.read_text(encoding="utf-8")))

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, uint16 [vocab_size]."""
        special = {i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        byte_level = _is_byte_level(json.loads(self.tokenizer.to_str()))
        counts = np.zeros(self.vocab_size, np.uint16)
        for token, index in self.vocab.items():
            if index not in special:
                # In a byte-level vocabulary each character stands for one byte.
                counts[index] = len(token) if byte_level else _metaspace_bytes(token)
        return counts

    @cached_property
    def prefix_bytes(self) -> int:
        """Bytes of a space that the tokenizer puts before every text, 0 or 1."""
        ids = self.tokenizer.encode("a", add_special_tokens=False).ids
        return max(int(self.token_bytes[ids].sum()) - 1, 0)

    def encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        """One int64 array of token ids per text, BOS first."""
        start, size = 0, 0
        for end, text in enumerate(texts, 1):
            size += len(text)
            if size >= _BATCH_CHARACTERS or end == len(texts):
                for item in self.tokenizer.encode_batch_fast(texts[start:end], add_special_tokens=False):
                    yield np.array([self.bos_id, *item.ids], np.int64)
                start, size = end, 0


def dtype_for(vocab_size: int) -> np.dtype:
    """uint16 while every id fits, else uint32; little-endian on disk."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def train_bpe(texts: Iterator[str], vocab_size: int, train_bytes: int, path: Path) -> None:
    """Train a byte-level BPE on the first `train_bytes` bytes of `texts` and write it to `path`, atomically.

    BOS is token 0, then the 256 bytes, then merges; the same texts give the same file on any number of cores.
    Raises ValueError when there is no text, or too little to find so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = filter(None, texts)
    first = next(texts, None)
    if first is None:
        raise ValueError("the train side has no text: give data.files with some, or a smaller data.val_fraction")
    begin = time.monotonic()
    say(f"training a byte-level BPE of {vocab_size} entries on up to {train_bytes / 1e6:.1f} MB of text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[TRAINED_BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(chain([first], texts), train_bytes), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise ValueError(
            f"the text gives a BPE of only {found} entries, data.vocab_size={vocab_size} were asked for: "
            f"type data.vocab_size={found} or less, or give more text"
        )
    with atomic_write(path) as handle:
        handle.write(tokenizer.to_str(pretty=False).encode())
    say(f"trained the BPE in {time.monotonic() - begin:.1f} s: {path}")


def tokenizer_file(path: str) -> Path:
    """A tokenizer.json, or the one in a folder. Raises ValueError if there is none."""
    file = Path(os.path.expanduser(path))
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"data.tokenizer={path}: no such file (needed: a tokenizer.json of the `tokenizers` library)")
    return file


def _first_bytes(texts: Iterator[str], limit: int) -> Iterator[str]:
    total = 0
    for text in texts:
        yield from _pieces(text)
        total += len(text.encode())
        if total >= limit:
            return


def _pieces(text: str) -> Iterator[str]:
    """`text`, cut after every LONG_RUN characters without a boundary: the trainer is quadratic in them (a row of
    200,000 spaces takes it 20 s)."""
    begin = 0
    for match in _LONG_RUN.finditer(text):
        yield text[begin : match.end()]
        begin = match.end()
    if begin < len(text):
        yield text[begin:]


def _find_bos(special: set[str], bos: str | None, path: Path) -> str:
    names = (bos,) if bos else _BOS_NAMES
    for name in names:
        if name in special:
            return name
    known = ", ".join(sorted(special)[:8]) or "none"
    raise ValueError(
        f"{path} has no BOS token (looked for {', '.join(names)} among its special tokens: {known}): name one of these "
        "with data.bos=...; text may contain any other"
    )


def _is_byte_level(description: dict[str, Any]) -> bool:
    decoder = description.get("decoder") or {}
    return any(d.get("type") == "ByteLevel" for d in [decoder, *decoder.get("decoders", [])])


def _metaspace_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # a single byte, by its number
        return 1
    return len(token.replace(_METASPACE, " ").encode())
