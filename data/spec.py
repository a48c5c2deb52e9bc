"""What text a run reads and how it becomes tokens: plain fields that a Hydra schema can embed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from shlex import quote
from typing import Any

from base.files import expanded

# What Hydra's grammar takes without quotation marks.
_PLAIN = re.compile(r"[\w/.*?@%$+-]+", re.ASCII)
_BEFORE_QUOTE = re.compile(r'(\\*)("|\Z)')
_WORDS = ("null", "true", "false", "nan", "inf")
SOURCES = ("files", "hub", "pydocs", "tokens")
VAL_RULES = ("hash", "paper")
PACKINGS = ("stream", "bos_bestfit")
BAD_ROWS = ("error", "skip")
VAL_COPIES = ("keep", "drop")
# 25M tokens of two bytes: no shard is over 50 MB, so that shards travel in small pieces.
SHARD_TOKENS = 25_000_000
# The published runs cut 0.05 % of the C4 train documents with this seed
# (docs/published.md#1-scaling-protocol-llama-on-c4).
PAPER_VAL_FRACTION = 0.0005
PAPER_SPLIT_SEED = 2357


@dataclass
class DataSpec:
    """Source, tokenizer, split and layout of a token set. `check()` raises ValueError with the remedy.

    Everything but `path`, `packing`, `workers` and `verify` decides the contents of the token folder and is part of the
    folder's name. Sizes are in bytes of UTF-8 text or in tokens, as the name says.
    """

    name: str = "text"  # label, first part of the folder's name
    path: str | None = None  # an already prepared token folder; nothing else is looked at then
    mix: Any = None  # prepared token folders to train on together; the first one's validation text counts
    weights: Any = None  # the share of each, adding up to 1
    val_sets: Any = None  # further texts to evaluate on: a mapping of names to prepared token folders
    source: str = "files"  # files | hub | pydocs | tokens (files of token ids: data/ids.py)

    files: Any = None  # path, glob, or list of them: .txt .jsonl .json .parquet, the text ones also .gz .zst
    val_files: Any = None  # same; overrides the split: all documents of `files` are then train
    text_key: str = "text"
    source_key: str | None = "source"  # documents are grouped by (source, id) before the split
    id_key: str | None = "id"  # null: each row is its own document

    hub_path: str | None = None  # `datasets` name, local dataset folder, or packaged loader (json, parquet, text)
    hub_name: str | None = None  # configuration of the data set, such as en
    hub_split: str = "train"
    hub_revision: str | None = None  # branch, tag or commit; resolved to a commit
    hub_data_files: Any = None
    hub_streaming: bool = True
    max_documents: int = 0  # take only the first so many rows; 0 takes all
    bad_rows: str = "error"  # rows that can't be read: error | skip (left out, counted)
    val_copies: str = "keep"  # train rows with the text of a validation row: keep (counted) | drop (left out)

    tokenizer: str | None = None  # a tokenizer.json; null trains a byte-level BPE
    vocab_size: int = 32_000  # of the trained BPE, BOS included
    tokenizer_train_bytes: int = 40_000_000  # from the first train documents
    bos: str | None = None  # BOS token of a given tokenizer; null looks for the usual names

    val_rule: str = "hash"  # hash: seeded hash of each document | paper: 0.05 % of the documents, seed 2357
    val_fraction: float = 0.005  # of the documents, for the hash rule
    split_seed: int = PAPER_SPLIT_SEED
    shard_tokens: int = SHARD_TOKENS

    packing: str = "stream"  # stream: windows of the token stream | bos_bestfit: rows that start at a BOS
    workers: int = 0  # processes that tokenize; 0: one per core
    verify: bool = False  # compare every shard's sha256 when a run starts (sizes are always compared)

    def check(self) -> None:
        """Raise ValueError for a wrong value; says what was given, what is possible and what to type."""
        _one_of("data.source", self.source, SOURCES)
        _one_of("data.val_rule", self.val_rule, VAL_RULES)
        _one_of("data.packing", self.packing, PACKINGS)
        _one_of("data.bad_rows", self.bad_rows, BAD_ROWS)
        _one_of("data.val_copies", self.val_copies, VAL_COPIES)
        if self.mix:
            self._check_mixture()
            return
        if self.weights is not None:
            raise ValueError("data.weights is given without data.mix, the folders that they weigh")
        if not self.path:
            self._check_unread()
        if self.source == "tokens" and not self.path and self.tokenizer is None:
            raise ValueError("data.source=tokens needs data.tokenizer=..., the tokenizer.json that made the ids")
        if self.source in ("files", "tokens") and not self.path and not as_list(self.files):
            raise ValueError(
                "data.files is empty: give a path or a glob, such as data.files='corpus/train-*.jsonl.zst'"
            )
        if self.source == "hub" and not self.hub_path:
            raise ValueError("data.hub_path is empty: give a data set's name, such as data.hub_path=allenai/c4")
        if self.tokenizer is None and self.vocab_size < 257:
            raise ValueError(
                f"data.vocab_size={self.vocab_size}: a byte-level BPE needs 257 or more (256 bytes and BOS)"
            )
        if self.tokenizer is None and self.bos and not self.path:
            raise ValueError(
                f"data.bos={self.bos} has no effect without a tokenizer; add data.tokenizer=..., or leave data.bos out"
            )
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction={self.val_fraction} must lie between 0 and 1")
        for name, least in (("tokenizer_train_bytes", 1), ("shard_tokens", 1), ("workers", 0), ("max_documents", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)} must be {least} or more")

    def _check_unread(self) -> None:
        """Raise ValueError for text that this source doesn't read: a run would train on other text without a word.

        hub_* beside source=files stays: data=c4 with files that are here already.
        """
        remedies = {"files": "data.source=files"} if self.source == "hub" else {}
        if self.source == "pydocs":
            remedies = {"files": "data=text", "val_files": "data=text data.files=..."}
            remedies |= {f.name: "data=hub" for f in fields(self) if f.name.startswith("hub_")}
        default = DataSpec()
        for name, remedy in remedies.items():
            if getattr(self, name) != getattr(default, name):
                raise ValueError(f"data.{name} is given, but data.source={self.source} doesn't read it; add {remedy}")

    def _check_mixture(self) -> None:
        folders, weights = as_list(self.mix), self.weights
        default = DataSpec()
        for name in ("path", "files", "val_files", "hub_path"):
            if getattr(self, name) != getattr(default, name):
                raise ValueError(
                    f"data.{name} is given beside data.mix, which takes prepared folders only; leave it out"
                )
        if len(folders) < 2:
            raise ValueError(f"data.mix={self.mix} needs two token folders or more; one alone is data.path=...")
        is_list = isinstance(weights, list | tuple) and all(isinstance(w, int | float) for w in weights)
        if not is_list or len(weights) != len(folders):
            example = ",".join([f"{1 / len(folders):.3g}"] * len(folders))
            raise ValueError(
                f"data.weights={weights}: needed is one number for each of the {len(folders)} folders of data.mix, "
                f"such as data.weights=[{example}]"
            )

    def mixed_folders(self) -> list[str]:
        """The folders of data.mix."""
        return [expanded(name, "data.mix") for name in as_list(self.mix)]

    def overrides(self) -> list[str]:
        """Command-line overrides, quoted for a shell, that give this spec; data=text sets this class's defaults."""
        default = DataSpec()
        changed = [f.name for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)]
        return ["data=text", *(quote(f"data.{name}={hydra_value(getattr(self, name))}") for name in changed)]


def as_list(value: Any) -> list[str]:
    """None, one string, or a list of strings -> list of strings."""
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) else [str(v) for v in value]


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is none of {', '.join(choices)}")


def hydra_value(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{hydra_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return value if _reads_as_text(value) else f'"{_BEFORE_QUOTE.sub(_escaped, value)}"'
    return "[" + ",".join(hydra_value(v) for v in value) + "]"


def _escaped(found: re.Match[str]) -> str:
    """Backslashes are doubled before a quotation mark, the closing one too, and nowhere else."""
    slashes, mark = found.groups()
    return 2 * slashes + ('\\"' if mark else "")


def _reads_as_text(value: str) -> bool:
    """Without quotation marks, and as no number or null."""
    try:
        float(value)
        return False
    except ValueError:
        return bool(_PLAIN.fullmatch(value)) and value.lower() not in _WORDS
