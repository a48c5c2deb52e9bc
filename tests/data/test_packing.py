"""Best-fit packing: full rows that start at documents, the largest that fits first, the shortest cropped."""

import contextlib
import errno
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data import packing
from data.loader import Loader
from data.packing import BUFFER_DOCUMENTS, load_layout, pack
from data.tokens import TokenSet

ROW = 65


def documents(*lengths: int) -> list[tuple[int, int]]:
    """(first token, tokens) of documents that lie back to back."""
    return list(zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True))


def test_the_buffer_is_the_published_one():
    assert BUFFER_DOCUMENTS == 1000  # docs/published.md#5-nanochat-protocol: another one crops other documents


def test_by_hand():
    """Rows of 10: 7 is the largest that fits, then 3; then 6, and as nothing fits the 4 left, 5 is cropped; then 12."""
    lengths = (5, 7, 12, 3, 6)
    starts = dict(zip(lengths, (start for start, _ in documents(*lengths)), strict=True))
    rows = list(pack(iter(documents(*lengths)), 10))
    assert rows[0] == [(starts[7], 7), (starts[3], 3)]
    assert rows[1] == [(starts[6], 6), (starts[5], 4)]
    assert rows[2] == [(starts[12], 10)]
    assert len(rows) == 3


def test_equal_lengths_keep_their_order_and_a_short_last_row_is_dropped():
    rows = list(pack(iter(documents(4, 4, 4)), 8))
    assert rows == [[(0, 4), (4, 4)]]


def test_only_the_buffer_is_looked_at(monkeypatch):
    monkeypatch.setattr("data.packing.BUFFER_DOCUMENTS", 2)
    # The 8 at the end would fill the row, but the buffer holds only the next two documents.
    rows = list(pack(iter(documents(3, 4, 5, 8)), 8))
    assert rows[0][0] == (3, 4)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """The folder without layouts that other tests stored in it."""
    return Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("packed-*", ".lock*")))


def test_rows_are_full_and_hold_beginnings_of_different_documents(tokens):
    rows, pieces = load_layout(tokens, "train", ROW)
    index = tokens.split("train").documents[:, 0].tolist()
    lengths = dict(zip(index, np.diff([*index, tokens.split("train").length]).tolist(), strict=True))
    assert len(set(pieces[:, 0].tolist())) == len(pieces)  # no document twice
    for begin, end in itertools.pairwise(rows):
        row = pieces[begin:end]
        assert row[:, 1].sum() == ROW
        assert all(length == lengths[start] for start, length in row[:-1].tolist())  # only the last may be cropped
        assert row[-1, 1] <= lengths[int(row[-1, 0])]


def test_the_loader_reads_the_layout(tokens):
    """Each epoch is every row once; a sample is its pieces' tokens; portions agree."""
    loader = Loader(tokens, "train", ROW - 1, seed=1, packing="bos_bestfit")
    n = loader.samples_per_epoch
    rows, pieces = load_layout(tokens, "train", ROW)
    stream = np.empty(tokens.split("train").length, np.int64)
    tokens.split("train").read(0, stream)
    batch = loader.samples(0, 2 * n)
    assert (batch[:, 0] == tokens.bos_id).all()
    expected = [np.concatenate([stream[s : s + k] for s, k in pieces[a:b]]) for a, b in itertools.pairwise(rows)]
    where = loader._locate(0, 2 * n)[:, 0]
    assert sorted(where[:n].tolist()) == sorted(where[n:].tolist()) == list(range(n))
    for sample, index in zip(batch, where, strict=True):
        assert sample.tolist() == expected[index].tolist()
    assert torch.equal(torch.cat([loader.samples(i, 1) for i in range(2 * n)]), batch)
    assert loader.sample_hashes(0, 4, 1) != Loader(tokens, "train", ROW - 1, seed=1).sample_hashes(0, 4, 1)


def test_the_layout_is_repeatable_and_says_what_it_crops(tokens, copy):
    load_layout(TokenSet(copy), "train", ROW)
    load_layout(tokens, "train", ROW)
    names = ("rows.bin", "pieces.bin", "info.json")
    one, other = (folder / f"packed-train-{ROW}" for folder in (copy, tokens.path))
    assert [(one / name).read_bytes() for name in names] == [(other / name).read_bytes() for name in names]
    info = json.loads((one / "info.json").read_text())
    assert info["tokens_kept"] == pytest.approx(info["rows"] * ROW / tokens.split("train").length)


def test_a_damaged_layout_is_refused(copy):
    load_layout(TokenSet(copy), "val", ROW)
    pieces = copy / f"packed-val-{ROW}" / "pieces.bin"
    data = bytearray(pieces.read_bytes())
    data[8] ^= 1
    pieces.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"pieces\.bin is damaged: delete .*packed-val-65"):
        load_layout(TokenSet(copy), "val", ROW)


@pytest.mark.parametrize("info", ["{", "{}", "[]", None])
def test_a_layout_whose_description_is_damaged_is_refused(copy, info):
    load_layout(TokenSet(copy), "val", ROW)
    path = copy / f"packed-val-{ROW}" / "info.json"
    path.unlink() if info is None else path.write_text(info)
    with pytest.raises(RuntimeError, match=r"packed-val-65 is damaged \(.*\): delete it; it is made again"):
        load_layout(TokenSet(copy), "val", ROW)


def test_too_little_text_for_one_row_is_an_error(tokens):
    length = tokens.split("val").length
    with pytest.raises(ValueError, match=rf"has {length} tokens and one sequence needs {length + 1}"):
        Loader(tokens, "val", length, seed=0, packing="bos_bestfit")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_packed_elsewhere(folder, tmp_path, monkeypatch, capsys, code):
    copy = Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("packed-*", ".*")))
    opened = packing.locked

    @contextlib.contextmanager
    def read_only(path):
        if path.is_relative_to(copy):
            raise OSError(code, "read-only", str(path))
        with opened(path):
            yield

    monkeypatch.setattr(packing, "locked", read_only)
    monkeypatch.setattr(packing.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    before = sorted(copy.rglob("*"))
    wanted = [array.tolist() for array in load_layout(TokenSet(folder), "train", 65)]
    assert [array.tolist() for array in load_layout(TokenSet(copy), "train", 65)] == wanted
    assert "can't be written" in capsys.readouterr().err and sorted(copy.rglob("*")) == before
    monkeypatch.setattr(packing, "_store", None)  # kept: the next run makes nothing
    assert [array.tolist() for array in load_layout(TokenSet(copy), "train", 65)] == wanted
