"""Bits per byte divide by the text's own bytes, whatever the tokenizer does to the text; what isn't exact says so."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.evalset import EvalSet
from data.prepare import prepare
from data.spec import DataSpec
from data.token_text import true_sizes
from data.tokenizer import TextTokenizer
from data.tokens import TokenSet

SEQ = 16


def word_piece():
    """Lower case, unknown words, spaces left out: loses text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    return tokenizer, trainer, "[CLS]"


def sentencepiece():
    """As converters make them: the pieces of single bytes are special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256))]
    return tokenizer, trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False), "<s>"


def unigram_nfkc():
    """Normal forms: full-width letters become one byte each."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    return tokenizer, trainer, "<s>"


def added_tokens():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    return tokenizer, trainer, "<s>"


TEXT = ["The Dog sees \uff21\uff22 é数 😀 and\tthe  other dog.\n", "Ça va? Naïve café, é é.", "A dog; the DOG &c."]


@pytest.mark.parametrize(
    ("make", "is_exact"), [(word_piece, False), (sentencepiece, True), (unigram_nfkc, False), (added_tokens, True)]
)
def test_bytes_are_those_of_the_text_or_marked(make, is_exact, tmp_path, jsonl):
    tokenizer, trainer, bos = make()
    tokenizer.train_from_iterator(["the dog sees the other dog and va caf naive"] * 4, trainer)
    if make is added_tokens:
        tokenizer.add_tokens(["é", "数"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = [{"text": f"{TEXT[i % 3]} number {i} {'the dog ' * (i % 4)}"} for i in range(40)]
    spec = DataSpec(
        files=str(jsonl(tmp_path / "t.jsonl", rows[:30])),
        val_files=str(jsonl(tmp_path / "v.jsonl", rows[30:])),
        tokenizer=str(tmp_path / "tokenizer.json"),
        workers=1,
        bos=bos,
    )
    tokens = TokenSet(prepare(spec, tmp_path / "out"), verify=True)
    evaluation = EvalSet(tokens, SEQ, None)
    size = sum(len(row["text"].encode()) for row in rows[30:])
    assert evaluation.segments.bytes.sum() == tokens.manifest["splits"]["val"]["bytes"] == size
    assert evaluation.segments.is_text.sum() and not evaluation.segments.bytes[~evaluation.segments.is_text].any()
    summary = evaluation.summary(np.ones(len(evaluation.segments.bytes)))
    assert ("bpb_approximate" not in summary) == is_exact
    assert tokens.split("val").bytes_are_exact == is_exact


def lossy_spec(tmp_path, jsonl) -> DataSpec:
    tokenizer, trainer, bos = word_piece()
    tokenizer.train_from_iterator(["the dog sees the other dog"] * 4, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = [{"text": f"The dog {'SEES the other ' * (5 + i)}dog"} for i in range(20)]
    file = jsonl(tmp_path / "t.jsonl", rows)
    return DataSpec(files=str(file), tokenizer=f"{tmp_path}/tokenizer.json", bos=bos, val_fraction=0.4, workers=1)


def test_each_document_has_its_own_bytes_and_a_segment_its_share(tmp_path, jsonl):
    tokens = TokenSet(prepare(lossy_spec(tmp_path, jsonl), tmp_path / "out"))
    part = EvalSet(tokens, SEQ, None).segments
    sums = np.bincount(part.document, part.bytes).astype(int)
    assert sums.tolist() == tokens.split("val").documents[:, 1].tolist() and len(sums) > 4
    whole = part.is_text & (part.tokens == SEQ)
    share = part.bytes[whole] / part.tokens[whole]
    assert whole.sum() > 5 and share.min() > 2 and share.max() < 6  # words of 3 to 5 letters and a space


def test_a_folder_made_before_is_read_by_the_table_and_marked(tmp_path, jsonl, folder):
    assert TokenSet(folder).split("val").bytes_are_exact
    copy = Path(shutil.copytree(folder, tmp_path / "old"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["splits"]["val"]["lossy_documents"]
    manifest["splits"]["val"]["inexact_documents"] = 3
    (copy / "manifest.json").write_text(json.dumps(manifest))
    old = EvalSet(TokenSet(copy), SEQ, None)
    assert old.segments.bytes.tolist() == EvalSet(TokenSet(folder), SEQ, None).segments.bytes.tolist()
    assert old.summary(np.ones(len(old.segments.bytes)))["bpb_approximate"] is True


def test_damaged_bytes_of_tokens_are_found(tmp_path, jsonl):
    folder = prepare(lossy_spec(tmp_path, jsonl), tmp_path / "out")
    path = folder / "val-token-bytes.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(RuntimeError, match=r"val-token-bytes\.bin differs"):
        TokenSet(folder, verify=True)


def test_sizes_follow_the_ends_of_tokens():
    """Ends that repeat, go back, or stop before the text does."""
    assert true_sizes("aé数😀b ", [1, 2, 2, 3, 1, 4, 5]).tolist() == [1, 2, 0, 3, 0, 4, 2]
    assert true_sizes("", []).tolist() == [] and true_sizes("é", [9]).tolist() == [2]


def test_the_table_knows_every_kind_of_piece(byte_level, tmp_path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(byte_level))
    tokenizer.add_tokens(["数", "\u0120x"])  # as text, not in the vocabulary's characters
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = TextTokenizer(tmp_path / "tokenizer.json")
    sizes = {name: int(found.token_bytes[found.vocab[name]]) for name in ("数", "\u0120x", "\u0120ba", "<|bos|>")}
    assert sizes == {"数": 3, "\u0120x": 3, "\u0120ba": 3, "<|bos|>": 0}
