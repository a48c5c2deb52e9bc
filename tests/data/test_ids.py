"""Files of token ids give the documents that the same text gives, whoever wrote them; wrong ones are named."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from data.prepare import prepare
from data.spec import DataSpec
from data.tokens import TokenSet


@pytest.fixture(scope="module")
def text(tmp_path_factory, make_rows, jsonl, byte_level):
    """(folder prepared from text, spec, {side: its documents as arrays of ids})."""
    root = tmp_path_factory.mktemp("text")
    rows = make_rows(24)
    for row in rows:
        del row["id"]
    files = {"files": jsonl(root / "t.jsonl", rows[:20]), "val_files": jsonl(root / "v.jsonl", rows[20:])}
    spec = DataSpec(**{key: str(path) for key, path in files.items()}, tokenizer=str(byte_level), workers=1)
    tokens = TokenSet(prepare(spec, root / "out"))
    return tokens, spec, {side: pieces(tokens, side) for side in ("train", "val")}


def stream_of(tokens: TokenSet, side: str) -> np.ndarray:
    out = np.empty(tokens.split(side).length, np.int64)
    tokens.split(side).read(0, out)
    return out


def pieces(tokens: TokenSet, side: str) -> list[np.ndarray]:
    return np.split(stream_of(tokens, side), tokens.split(side).documents[1:, 0])


def nanogpt(folder: Path, side: str, documents: list[np.ndarray], dtype: str = "<u2") -> None:
    """Documents end with the token; there is none in front."""
    np.concatenate([np.append(ids[1:], 0) for ids in documents]).astype(dtype).tofile(folder / f"{side}.bin")


def nanogpt_wide(folder: Path, side: str, documents: list[np.ndarray]) -> None:
    nanogpt(folder, side, documents, "<u4")


def llmc(folder: Path, side: str, documents: list[np.ndarray], magic: int = 20240520, dtype: str = "<u2") -> None:
    """Documents begin with the token and go on in the next shard."""
    stream = np.concatenate(documents)
    for i, shard in enumerate(np.array_split(stream, 3)):
        header = np.zeros(256, "<i4")
        header[:3] = magic, 1, len(shard)
        (folder / f"{side}_{i:06d}.bin").write_bytes(header.tobytes() + shard.astype(dtype).tobytes())


def llmc_wide(folder: Path, side: str, documents: list[np.ndarray]) -> None:
    llmc(folder, side, documents, 20240801, "<u4")


def arrays(folder: Path, side: str, documents: list[np.ndarray]) -> None:
    for i, shard in enumerate(np.array_split(np.concatenate(documents), 2)):
        np.save(folder / f"{side}_{i}.npy", shard.astype(np.uint16))


def parquet_documents(folder: Path, side: str, documents: list[np.ndarray]) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    lists = [ids[i % 2 :].tolist() for i, ids in enumerate(documents)]  # with a BOS, and without
    pq.write_table(pa.table({"input_ids": lists, "attention_mask": lists}), folder / f"{side}.parquet")


def dataset_blocks(folder: Path, side: str, documents: list[np.ndarray]) -> None:
    """What `run_clm`'s grouping leaves: blocks of equal length, saved to disk; an end that fills no block is lost."""
    datasets = pytest.importorskip("datasets")
    stream = np.concatenate(documents)
    blocks = [stream[i : i + 50].tolist() for i in range(0, len(stream), 50)]
    blocks[-1] += [0] * (50 - len(blocks[-1]))  # documents without text
    datasets.Dataset.from_dict({"input_ids": blocks}).save_to_disk(folder / side)
    (folder / side / next((folder / side).glob("*.arrow")).name).rename(folder / f"{side}.arrow")


WRITERS = [nanogpt, nanogpt_wide, llmc, llmc_wide, arrays, parquet_documents, dataset_blocks]


@pytest.mark.parametrize("write", WRITERS)
def test_ids_give_the_documents_of_their_text(write, text, tmp_path, monkeypatch):
    monkeypatch.setattr("data.ids.CHUNK", 700)  # chunks end within documents
    tokens, spec, documents = text
    for side in ("train", "val"):
        write(tmp_path, side, documents[side])
    ids = dataclasses.replace(spec, source="tokens", files=f"{tmp_path}/train[._]*", val_files=f"{tmp_path}/val[._]*")
    found = TokenSet(prepare(ids, tmp_path / "out"), verify=True)
    for side in ("train", "val"):
        assert stream_of(found, side).tolist() == stream_of(tokens, side).tolist()
        assert found.split(side).documents[:, :2].tolist() == tokens.split(side).documents[:, :2].tolist()
    assert found.split("val").bytes_are_exact and found.path.name != tokens.path.name


def test_ids_are_split_by_document_and_copies_are_counted(text, tmp_path):
    _, spec, documents = text
    nanogpt(tmp_path, "all", documents["train"] * 2)
    ids = dataclasses.replace(spec, source="tokens", files=f"{tmp_path}/all.bin", val_files=None, val_fraction=0.3)
    found = TokenSet(prepare(ids, tmp_path / "out"))
    sides = [pieces(found, side) for side in ("train", "val")]
    assert sum(map(len, sides)) == 2 * len(documents["train"]) and sides[1]
    assert found.manifest["splits"]["train"]["copies_of_val"] > 3


def test_a_stream_without_bos_is_one_document(text, tmp_path):
    """As nanoGPT's Shakespeare."""
    _, spec, documents = text
    for side in ("train", "val"):
        np.concatenate([ids[1:] for ids in documents[side]]).astype("<u2").tofile(tmp_path / f"{side}.bin")
    ids = dataclasses.replace(spec, source="tokens", files=f"{tmp_path}/train.bin", val_files=f"{tmp_path}/val.bin")
    found = TokenSet(prepare(ids, tmp_path / "out"))
    assert [len(found.split(side).documents) for side in ("train", "val")] == [1, 1]
    assert stream_of(found, "val")[0] == found.bos_id


def test_a_killed_import_goes_on(text, tmp_path, monkeypatch):
    import data.parts

    tokens, spec, documents = text
    for side in ("train", "val"):
        llmc(tmp_path, side, documents[side])
    ids = dataclasses.replace(spec, source="tokens", files=f"{tmp_path}/train_*", val_files=f"{tmp_path}/val_*")
    monkeypatch.setattr(data.parts, "PART_CHARACTERS", 8000)
    make, made = data.parts.tokenize_part, itertools.count()

    def killed(part, tokenizer):
        if next(made) == 2:
            raise KeyboardInterrupt
        return make(part, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(data.parts, "tokenize_part", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(ids, tmp_path / "out")
    assert stream_of(TokenSet(prepare(ids, tmp_path / "out")), "train").tolist() == stream_of(tokens, "train").tolist()


def test_other_peoples_mistakes_are_named(text, tmp_path, monkeypatch):
    tokens, spec, documents = text
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    llmc(tmp_path, "cut", documents["train"])
    cut = tmp_path / "cut_000000.bin"
    cut.write_bytes(cut.read_bytes()[:-7])
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "empty.bin").touch()
    np.array([0, 5, 60_000], "<u2").tofile(tmp_path / "large.bin")
    np.save(tmp_path / "square.npy", np.zeros((3, 3), np.int64))
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "negative.npy", np.array([0, -1]))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"input_ids": [["a"]]}), tmp_path / "words.parquet")
    pq.write_table(pa.table({"input_ids": [1, 2]}), tmp_path / "flat.parquet")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "bad.arrow").write_bytes(b"nothing")
    cases = {
        "cut_000000.bin": r"header says [\d,]+ ids.*cut off",
        "odd.bin": "no ids of 2 bytes",
        "empty.bin": "no ids of 2 bytes",
        "large.bin": rf"id 60000 at position 2, but data\.tokenizer=.* has {tokens.vocab_size} entries",
        "negative.npy": "id -1 at position 1",
        "square.npy": r"an array \[3, 3\] of int64; needed: one row of integers",
        "object.npy": "damaged",
        "text.parquet": r"no column input_ids of ids; it has text: data\.text_key=",
        "words.parquet": r"column input_ids is list<.*string>; needed: lists of integers",
        "flat.parquet": r"column input_ids is int64; needed: lists of integers",
        "a.txt": r"no file of token ids; possible are \.bin",
        "bad.arrow": "damaged",
    }
    for name, message in cases.items():
        ids = dataclasses.replace(spec, source="tokens", files=f"{tmp_path}/{name}", val_files=None)
        with pytest.raises(ValueError, match=rf"{re.escape(name)}.*{message}") as caught:
            prepare(ids, tmp_path / "out")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"data\.source=tokens needs data\.tokenizer"):
        prepare(dataclasses.replace(spec, source="tokens", tokenizer=None), tmp_path / "out")
    monkeypatch.setattr("data.ids.MAX_DOCUMENT", 100)
    np.full(500, 7, "<u2").tofile(tmp_path / "long.bin")
    ids = dataclasses.replace(spec, source="tokens", files=f"{tmp_path}/long.bin", val_files=None)
    with pytest.raises(ValueError, match=r"long\.bin: 100 ids without a BOS \(id 0\): .*data\.bos="):
        prepare(ids, tmp_path / "out")


def test_a_tokenizer_that_loses_text_makes_bits_approximate(text, tmp_path, byte_level):
    _, spec, documents = text
    description = json.loads(byte_level.read_text())
    description["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "lower.json").write_text(json.dumps(description))
    for side in ("train", "val"):
        nanogpt(tmp_path, side, documents[side])
    ids = dataclasses.replace(
        spec,
        source="tokens",
        tokenizer=f"{tmp_path}/lower.json",
        files=f"{tmp_path}/train.bin",
        val_files=f"{tmp_path}/val.bin",
    )
    assert not TokenSet(prepare(ids, tmp_path / "out")).split("val").bytes_are_exact
