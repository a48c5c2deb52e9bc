"""The BPE is reproducible, BOS can't be smuggled in, and bytes per token add up to the text."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.tokenizer import LONG_RUN, TextTokenizer, _pieces, dtype_for, tokenizer_file, train_bpe

TRAIN = """
import sys
from pathlib import Path
from data.tokenizer import train_bpe
texts = Path(sys.argv[1]).read_text(encoding="utf-8").split("\\n\\n")
train_bpe(iter(texts), 400, 60_000, Path(sys.argv[2]))
"""
HARD = [
    "",
    "plain text",
    " leading",
    "tabs\tand\r\nlines\n\n\n",
    "naïve 数字 😀",
    "quotes <|bos|> inside",
    "\x00\x7f",
    "  ",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory, make_rows) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe((row["text"] for row in make_rows(40)), 400, 10**9, path)
    return path


def test_training_is_the_same_on_any_number_of_threads(tmp_path, make_rows):
    text = tmp_path / "text"
    text.write_text("\n\n".join(row["text"] for row in make_rows(60)), encoding="utf-8")
    results = []
    for threads in ("1", "2", "4"):
        out = tmp_path / f"{threads}.json"
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        subprocess.run([sys.executable, "-c", TRAIN, str(text), str(out)], check=True, env=environment)
        results.append(out.read_bytes())
    assert results[0] == results[1] == results[2]
    assert len(json.loads(results[0])["model"]["vocab"]) == 400


def test_only_the_first_bytes_are_used(tmp_path):
    def texts():
        yield from ["abcabc abcabc " * 50] * 3
        raise AssertionError("read past the limit")

    train_bpe(texts(), 260, 1500, tmp_path / "t.json")
    assert TextTokenizer(tmp_path / "t.json").vocab_size == 260


def test_long_runs_are_cut_for_training_and_nothing_is_lost():
    texts = ["a" * 2500 + " b " + "-" * 999, "x" + " " * 3000 + "y", "plain words\n", ""]
    pieces = [list(_pieces(text)) for text in texts]
    assert ["".join(part) for part in pieces] == texts and [len(part) for part in pieces] == [3, 4, 1, 0]
    assert all(len(run) <= LONG_RUN for part in pieces for piece in part for run in re.findall(r"\S+|\s+", piece))


def test_text_survives_and_has_no_bos_inside(bpe):
    tokenizer = TextTokenizer(bpe)
    assert (tokenizer.bos, tokenizer.bos_id, tokenizer.vocab_size, tokenizer.prefix_bytes) == ("<|bos|>", 0, 400, 0)
    for text, ids in zip(HARD, tokenizer.encode(HARD), strict=True):
        assert ids[0] == 0 and (ids[1:] != 0).all(), text
        assert tokenizer.tokenizer.decode(ids[1:].tolist(), skip_special_tokens=False) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode()), text


def test_many_texts_come_back_in_order_whatever_the_grouping(bpe, monkeypatch):
    tokenizer = TextTokenizer(bpe)
    texts = [f"text {i} " * (1 + i % 5) for i in range(50)]
    whole = [ids.tolist() for ids in tokenizer.encode(texts)]
    monkeypatch.setattr("data.tokenizer._BATCH_CHARACTERS", 30)
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == whole and len(whole) == 50


def test_a_given_tokenizer_with_a_space_prefix_counts_true_bytes(llama_like):
    tokenizer = TextTokenizer(llama_like)
    assert (tokenizer.bos, tokenizer.bos_id, tokenizer.vocab_size, tokenizer.prefix_bytes) == ("<s>", 1, 267, 1)
    for text in ("ab a", "é 数\n", "abc", "x </s> y"):
        (ids,) = tokenizer.encode([text])
        assert ids[0] == 1 and 1 not in ids[1:] and 2 not in ids[1:]
        assert tokenizer.token_bytes[ids].sum() - 1 == len(text.encode()), text


def test_bos_is_a_special_token_and_no_word_of_the_text(tmp_path, make_rows):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(special_tokens=["<bos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((row["text"] for row in make_rows(5)), trainer)
    tokenizer.add_tokens([AddedToken("<s>", special=False)])  # a tag of HTML
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = TextTokenizer(tmp_path / "tokenizer.json")
    (ids,) = found.encode(["price <s>10</s>"])
    assert found.bos == "<bos>" and (ids == found.bos_id).sum() == 1
    with pytest.raises(ValueError, match=r"no BOS token \(looked for <s> among its special tokens: <bos>\)"):
        TextTokenizer(tmp_path / "tokenizer.json", "<s>")


def unigram():
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", "\u2581", *"abcs<>/", "\u2581a"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, ["<unk>", "<s>", "</s>"]


def words(kind, **options):
    from tokenizers import Tokenizer, pre_tokenizers

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    tokenizer = Tokenizer(kind(vocab, unk_token="<unk>", **options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, ["<unk>", "<s>", "</s>"]


def word_level():
    from tokenizers import models

    return words(models.WordLevel)


def word_piece():
    from tokenizers import models

    return words(models.WordPiece, max_input_chars_per_word=50)


def bpe_with_merges(**options):
    """Merges make "<s>"; and "<s>x", of which it is a part."""
    from tokenizers import Tokenizer, models

    vocab = {"</s>": 0, **{c: i for i, c in enumerate("<s>xab /", 1)}, "s>": 9, "<s>": 10, "<s>x": 11}
    tokenizer = Tokenizer(models.BPE(vocab, [("s", ">"), ("<", "s>"), ("<s>", "x")], **options))
    return tokenizer, ["<s>", "</s>"]


def whole_words_first():
    from tokenizers import pre_tokenizers

    tokenizer, special = bpe_with_merges(ignore_merges=True)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, special


def normalized():
    from tokenizers import normalizers

    tokenizer, special = unigram()
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer, special


MODELS = [unigram, word_level, word_piece, bpe_with_merges, whole_words_first, normalized]
QUOTES = ["a <s> b", "<s>", "a<s>b</s>", "<s><s> <s>", "a \uff1cs\uff1e b", " <s>x", "</s> a"]


@pytest.mark.parametrize("make", MODELS)
def test_a_quoted_special_token_is_text_whatever_the_model(make, tmp_path):
    tokenizer, special = make()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = TextTokenizer(tmp_path / "tokenizer.json")
    end = found.vocab["</s>"]
    for text, ids in zip(QUOTES, found.encode(QUOTES), strict=True):
        assert ids[0] == found.bos_id and not {found.bos_id, end} & set(ids[1:].tolist()), text
        assert found.true_sizes(text).shape == ids.shape
    (plain,) = found.encode(["a b a"])  # what quotes nothing is encoded as the library does
    assert plain[1:].tolist() == tokenizer.encode("a b a", add_special_tokens=False).ids


@pytest.mark.parametrize("make", [unigram, word_level, word_piece])
def test_a_bos_that_is_also_the_unknown_token_is_refused(make, tmp_path):
    tokenizer, special = make()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"gives its BOS '<unk>' for text.*data\.bos="):
        TextTokenizer(tmp_path / "tokenizer.json", "<unk>")


def test_a_byte_level_bos_that_no_text_gives_may_be_the_unknown_token_too(byte_level, tmp_path):
    """As GPT-2's files say of <|endoftext|>."""
    description = json.loads(byte_level.read_text())
    description["model"]["unk_token"] = "<|bos|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    for text, ids in zip(HARD, TextTokenizer(tmp_path / "tokenizer.json").encode(HARD), strict=True):
        assert (ids[1:] != 0).all(), text


def test_a_tokenizer_that_truncates_is_stopped_from_it(bpe, tmp_path):
    description = json.loads(bpe.read_text())
    description["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (ids,) = TextTokenizer(tmp_path / "tokenizer.json").encode(["kano " * 50])
    assert TextTokenizer(bpe).token_bytes[ids].sum() == 250


def test_hash_ignores_spacing_but_not_contents(bpe, tmp_path):
    description = json.loads(bpe.read_text())
    (tmp_path / "spaced.json").write_text(json.dumps(description, indent=3))
    description["model"]["merges"] = description["model"]["merges"][:-1]
    (tmp_path / "other.json").write_text(json.dumps(description))
    assert TextTokenizer(tmp_path / "spaced.json").hash == TextTokenizer(bpe).hash
    assert TextTokenizer(tmp_path / "other.json").hash != TextTokenizer(bpe).hash


def test_ids_are_two_bytes_while_they_fit():
    assert dtype_for(65_536) == np.uint16 and dtype_for(65_537) == np.uint32


def test_errors_say_what_to_type(bpe, tmp_path):
    with pytest.raises(ValueError, match=r"gives a BPE of only \d+ entries.*data\.vocab_size=\d+ or less"):
        train_bpe(iter(["abc abc"]), 5000, 100, tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()
    with pytest.raises(ValueError, match=r"no BOS token \(looked for <nothing> among.*data\.bos="):
        TextTokenizer(bpe, "<nothing>")
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*no such file"):
        tokenizer_file(str(tmp_path))
