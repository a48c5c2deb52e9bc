"""Byte-level BPE training, and what the rest needs to know of any tokenizer.json: hash, BOS, bytes per token."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from base.files import atomic_write, expanded, json_hash, say
from data.quoted import ODD_TEXT, control_ids, unknown_id, without_pieces
from data.token_text import is_byte_level, table, true_sizes

TRAINED_BOS = "<|bos|>"
_BOS_NAMES = (TRAINED_BOS, "<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[BOS]")
LONG_RUN = 1000
_LONG_RUN = re.compile(rf"\S{{{LONG_RUN}}}|\s{{{LONG_RUN}}}")
# Texts go to the tokenizer in groups of about this many characters: its results take some 100 bytes per token.
_BATCH_CHARACTERS = 1 << 18


class _CannotEncodeError(ValueError):
    """Text that the tokenizer has no tokens for."""


class TextTokenizer:
    """A tokenizer.json made ready for corpora: no truncation, no special tokens added or recognized in text.

    vocab_size is the largest id + 1; token_bytes uint16 [vocab_size] counts the UTF-8 bytes that each token stands for
    (special tokens: 0); prefix_bytes is 1 where the tokenizer puts a space before each text (Llama-2's does).
    Raises ValueError when the file is no tokenizer.json, has no BOS token, or gives the BOS for ordinary text.
    """

    def __init__(self, path: Path, bos: str | None = None):
        from tokenizers import Tokenizer

        self.path = path
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} can't be read as a tokenizer.json: {error}") from error
        _prepare(self.tokenizer)
        self.vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocab.values()) + 1
        special = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        self.bos = _find_bos(set(special.values()), bos, path)
        self.bos_id = self.vocab[self.bos]
        self._unknown_id = unknown_id(self._description, self.vocab)
        self._control = np.zeros(self.vocab_size, bool)
        self._control[list(control_ids(special, self._unknown_id, self.bos_id))] = True
        for text in (self.bos, f"a {self.bos} b", ODD_TEXT):
            with suppress(_CannotEncodeError):
                self.ids(text)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the tokenizer.json, independent of its spacing and order of keys."""
        return json_hash(json.loads(self.path.read_text(encoding="utf-8")))

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, uint16 [vocab_size]."""
        counts = np.zeros(self.vocab_size, np.uint16)
        for index, text in self._table.items():
            counts[index] = len(text)
        return counts

    @cached_property
    def prefix_bytes(self) -> int:
        """Bytes of a space that the tokenizer puts before every text, 0 or 1."""
        ids = self.tokenizer.encode("a", add_special_tokens=False).ids
        return int(b"".join(self._table.get(i, b"") for i in ids) == b" a")

    def encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        """One int64 array of token ids per text, BOS first and nowhere else."""
        start, size = 0, 0
        for end, text in enumerate(texts, 1):
            size += len(text)
            if size >= _BATCH_CHARACTERS or end == len(texts):
                group = texts[start:end]
                for one, item in zip(group, self._encoded(self.tokenizer.encode_batch_fast, group), strict=True):
                    ids = np.array([self.bos_id, *item.ids], np.int64)
                    quotes = self._control[ids[1:]].any()
                    yield np.array([self.bos_id, *self.ids(one)], np.int64) if quotes else ids
                start, size = end, 0

    def ids(self, text: str) -> list[int]:
        """The token ids of one text, without a BOS."""
        (item,) = self._encoded(self.tokenizer.encode_batch_fast, [text])
        return self._checked(text, item).ids

    def is_exact(self, text: str, ids: np.ndarray) -> bool:
        """Do the table's bytes of `ids` (BOS first), without the space in front, add up to those of the text?"""
        return int(self.token_bytes[ids].sum()) - self.prefix_bytes == len(text.encode())

    def is_lossless(self, text: str, ids: np.ndarray) -> bool:
        """Do the tokens (BOS first) spell the text, whether or not a space was put in front of it?"""
        spelled = b"".join(self._table.get(i, b"") for i in ids.tolist())
        return spelled.lstrip(b" ") == text.encode().lstrip(b" ")

    @cached_property
    def spells_text(self) -> bool:
        """Do tokens stand for the same bytes whatever the text? Of byte-level tokenizers and those that fall back to
        bytes, unless they normalize text; what others lose can't be seen in ids."""
        model, normalizer = self._description["model"], self._description.get("normalizer")
        reversible = is_byte_level(self._description) or bool(model.get("byte_fallback"))
        return reversible and all(step["type"] in ("Prepend", "Replace") for step in _steps(normalizer))

    def table_sizes(self, ids: np.ndarray) -> np.ndarray:
        """Bytes of an exact text that each of its tokens (BOS first) stands for, int64 [tokens]."""
        sizes = self.token_bytes[ids].astype(np.int64)
        sizes[1:2] = np.maximum(sizes[1:2] - self.prefix_bytes, 0)
        return sizes

    def true_sizes(self, text: str) -> np.ndarray:
        """Bytes of the text that each token of encode([text]) stands for, int64 [tokens]; 0 for its BOS."""
        (item,) = self._encoded(self.tokenizer.encode_batch, [text])
        ends = [end for _, end in self._checked(text, item, with_positions=True).offsets]
        return np.concatenate([[0], true_sizes(text, ends)])

    @cached_property
    def _description(self) -> dict[str, Any]:
        return json.loads(self.tokenizer.to_str())

    @cached_property
    def _table(self) -> dict[int, bytes]:
        return table(self._description, self.vocab)

    @cached_property
    def _without_control(self) -> Any:
        """The tokenizer for texts that quote a control token: no piece of its model is one."""
        from tokenizers import Tokenizer

        ids = set(np.flatnonzero(self._control).tolist()) - {self._unknown_id}
        try:
            made = Tokenizer.from_str(without_pieces(self._description, ids))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(self._unfit(f"the pieces of its special tokens can't be taken out: {error}")) from error
        return _prepare(made)

    def _encoded(self, encode: Callable[..., Any], texts: list[str]) -> Any:
        try:
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # such as an unknown word where there is no unknown token
            reason = f"{self.path} can't encode this text: {error}; give another data.tokenizer"
            raise _CannotEncodeError(reason) from error

    def _checked(self, text: str, item: Any, with_positions: bool = False) -> Any:
        """`item`, or the encoding without control tokens where it holds one."""
        if not self._control[item.ids].any():
            return item
        inner = self._without_control
        (item,) = self._encoded(inner.encode_batch if with_positions else inner.encode_batch_fast, [text])
        if self.bos_id in item.ids:
            raise ValueError(self._unfit("its BOS is also what it gives for text that it doesn't know"))
        return item

    def _unfit(self, reason: str) -> str:
        return (
            f"{self.path} gives its BOS {self.bos!r} for text, where it would begin a document: {reason}; name another "
            "special token with data.bos=..., or give another data.tokenizer"
        )


def _prepare(tokenizer: Any) -> Any:
    """Set a `tokenizers` object up for whole documents; returns it."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Otherwise a document that quotes "<|bos|>" would contain a document boundary.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [] if normalizer is None else normalizer.get("normalizers", [normalizer])


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
    file = Path(expanded(path, "data.tokenizer"))
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
