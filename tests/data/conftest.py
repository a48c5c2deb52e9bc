"""Small deterministic text, files of it, and one prepared token folder."""

import json
import random
from pathlib import Path

import pytest

from data.prepare import prepare
from data.spec import DataSpec
from data.tokens import TokenSet

SYLLABLES = ["ba", "ko", "ti", "rum", "sel", "ve", "nor", "da", "pli", "gan", "ho", "ix", "tra", "mu", "len"]


def text_of(seed: int, words: int) -> str:
    """Pseudo-words with punctuation, paragraphs and a few characters of two, three and four bytes."""
    rng = random.Random(seed)
    pieces = []
    for i in range(words):
        pieces.append("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))))
        pieces.append(rng.choice([" ", " ", " ", ", ", ". ", "\n\n", " é ", " 数 ", " 😀 "]) if i % 7 == 0 else " ")
    return "".join(pieces)


def rows_of(count: int, words: int = 120, first: int = 0) -> list[dict[str, str]]:
    """Rows as in the corpus; every fifth document has two rows. Lengths vary by a factor of three."""
    rows = []
    for i in range(first, first + count):
        rows.append({"text": text_of(i, words // 2 + (i * 37) % words), "source": f"s{i % 3}", "id": f"doc-{i}"})
        if i % 5 == 0:
            rows.append({"text": text_of(10_000 + i, words), "source": f"s{i % 3}", "id": f"doc-{i}"})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_rows():
    return rows_of


@pytest.fixture(scope="session")
def jsonl():
    return write_jsonl


@pytest.fixture(scope="session")
def source_file(tmp_path_factory) -> Path:
    """96 rows of 80 documents, about 80 kB."""
    return write_jsonl(tmp_path_factory.mktemp("source") / "text.jsonl", rows_of(80))


@pytest.fixture(scope="session")
def spec(source_file) -> DataSpec:
    """12 shards, a tenth of the documents in val."""
    return DataSpec(files=str(source_file), vocab_size=400, val_fraction=0.1, shard_tokens=3000, workers=1)


@pytest.fixture(scope="session")
def folder(spec, tmp_path_factory) -> Path:
    return prepare(spec, tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def tokens(folder) -> TokenSet:
    return TokenSet(folder, verify=True)


@pytest.fixture(scope="session")
def llama_like(tmp_path_factory) -> Path:
    """As Llama-2's: a space in front of the text, spaces as U+2581, unknown characters as bytes, its own BOS rule."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    for token in ("\u2581", "a", "b", "c", "\u2581a", "\u2581ab", "ab", "\u00e9"):
        vocab[token] = len(vocab)
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    path = tmp_path_factory.mktemp("llama") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> Path:
    """A byte-level BPE of a few merges, as given text: not trained, so no version of the library changes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<|bos|>": 0, **{c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}}
    merges = [("b", "a"), ("k", "o"), ("t", "i"), ("\u0120", "ba"), ("\u00c3", "\u00a9")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>"])
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
