"""Corpora that are read as before keep their folder's name and their fingerprint: kept runs are named after both.

The kept corpus is too large to be tokenized here, so its name is held by what enters it (sizes and SHA-256 of its
files), and the reading and tokenizing of text by two small corpora of fixed text and tokenizers.
"""

from pathlib import Path

import pytest

from base import fingerprints
from data.assemble import content_fingerprint
from data.prepare import _wanted, prepare
from data.spec import DataSpec
from data.tokens import TokenSet

# name: (bytes, SHA-256), of the corpus that configs/data/corpus.yaml reads
CORPUS = {
    "train-00.jsonl.zst": (33731023, "126ba390dee3d62b90648392c5055a0f463651bc209571bead53bce3b6deca54"),
    "train-01.jsonl.zst": (33856902, "345de6e397045f6557e23437f4e4097d14dc36aecb401b46639348acad0ce8b4"),
    "train-02.jsonl.zst": (33789038, "85d57292a63dbb8310f8015b00988207a43537dea6f76c93574cf250f2bfe9b1"),
    "train-03.jsonl.zst": (33733544, "d0670c881b3ef03825dc76095e1185f524484406cfdd7ff8ccf40c681846412a"),
    "train-04.jsonl.zst": (35207843, "e449907ec271f3e8848d96211802cf483e37ddbfa2c5f1bb4fc85a11488f986a"),
    "val.jsonl.zst": (2855937, "1b860acbc1e2243e2b0201900b7f048c0a1419351446caa41268145d27ad7c70"),
}


def test_the_kept_corpus_keeps_its_folder(tmp_path, monkeypatch):
    for name, (size, _) in CORPUS.items():
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    monkeypatch.setattr(fingerprints, "sha256_of", lambda path: CORPUS[path.name][1])
    spec = DataSpec(name="corpus", files=f"{tmp_path}/train-*.jsonl.zst", val_files=f"{tmp_path}/val.jsonl.zst")
    assert _wanted(spec, tmp_path / "out").folder.name == "corpus-32000-22504204dca6"


def test_the_kept_corpus_keeps_its_fingerprint():
    """Of what its preparation gave: tokenizer, and tokens and document index of each side."""
    val = {
        "stream_sha256": "d8db2277225574c22b0759ed71c7d2a5af5d349e34eeab8774ae55a1576ab25e",
        "documents_sha256": "0d512d15db695e63b09bf4f44155a1fb6f50435f394625abf743b8194817eab4",
    }
    train = {
        "stream_sha256": "e92cc4ac12091e95fba9ee7793c5c51454fd151dc3abc862259bf9b1f400a622",
        "documents_sha256": "84ded4977da43ebcf1b8c5a3f378444963f1e717d81b339e02ae2628d9ef2d61",
    }
    manifest = {
        "dtype": "uint16",
        "tokenizer": {"hash": "3dd3604d26a2d2aa0ade3d7f52d395134dfa2e0a9422f30efead0fdd66d02886"},
        "splits": {"val": val, "train": train},
    }
    kept = "531a0bf1a0122cf99e87ae7a04202729b51a56f20d63ecde2dedc3ae89115203"
    assert content_fingerprint(manifest) == kept


@pytest.mark.parametrize(
    ("kind", "fingerprint"),
    [
        ("byte_level", "632ec713186b699bd981e10bc3c849b3abc2c2ea199528a93b6b687c88d58f7c"),
        ("llama_like", "80f3b6f301ce1dfd155dc4133110539f7093e3ba2fb42206666f89952426b092"),
    ],
)
def test_a_small_corpus_keeps_its_fingerprint(tmp_path, make_rows, jsonl, request, kind, fingerprint):
    tokenizer: Path = request.getfixturevalue(kind)
    file = jsonl(tmp_path / "t.jsonl", make_rows(30))
    (tmp_path / "a.txt").write_bytes("one\r\n\ntwo \x85 three é 数\n".encode())
    spec = DataSpec(files=[str(file), f"{tmp_path}/a.txt"], tokenizer=str(tokenizer), val_fraction=0.3, workers=1)
    manifest = TokenSet(prepare(spec, tmp_path / "out")).manifest
    manifest["tokenizer"]["hash"] = "how the library's version writes tokenizer.json is another matter"
    assert content_fingerprint(manifest) == fingerprint
