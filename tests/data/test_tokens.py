"""A damaged or unfit token folder is refused with the file's name and what to do."""

import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data.tokens
from data.loader import Loader
from data.tokens import TokenSet


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["train-00003.bin", "val-00000.bin", "train-documents.bin"])
def test_truncation_is_seen_at_once(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(RuntimeError, match=rf"{name} has {len(data) - 1} bytes, the manifest says {len(data)}.*delete"):
        TokenSet(copy)


@pytest.mark.parametrize("name", ["train-00003.bin", "val-documents.bin"])
def test_a_flipped_bit_is_seen_by_verify(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    TokenSet(copy)  # the size is right
    with pytest.raises(RuntimeError, match=rf"{name} differs from its checksum.*prepare it again"):
        TokenSet(copy, verify=True)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_another_tokenizer_is_seen_by_verify(copy, content):
    file = copy / "tokenizer.json"
    file.write_text(content) if content else file.unlink()
    TokenSet(copy)  # training needs none
    with pytest.raises(RuntimeError, match=r"tokenizer\.json is missing or not the one that made the tokens"):
        TokenSet(copy, verify=True)


def test_a_damaged_byte_table_is_always_seen(copy):
    data = bytearray((copy / "token_bytes.npy").read_bytes())
    data[-1] ^= 1
    (copy / "token_bytes.npy").write_bytes(data)
    with pytest.raises(RuntimeError, match=r"token_bytes\.npy differs"):
        TokenSet(copy)


def test_missing_files_are_named(copy):
    (copy / "train-00001.bin").unlink()
    with pytest.raises(RuntimeError, match=r"train-00001\.bin is missing.*prepare_data"):
        TokenSet(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json.*prepare_data"):
        TokenSet(copy)


def test_a_damaged_manifest_or_another_format_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(RuntimeError, match="format 99, needed: 1"):
        TokenSet(copy)
    for text in ('{"format": 1,', '{"format": 1}', "{}", "[]", "7", json.dumps({**manifest, "splits": []})):
        (copy / "manifest.json").write_text(text)
        with pytest.raises(RuntimeError, match=r"manifest\.json is damaged"):
            TokenSet(copy)


def test_an_impossible_token_is_named_with_its_shard(copy):
    shard = copy / "train-00002.bin"
    values = np.fromfile(shard, "<u2")
    values[17] = 400  # the vocabulary ends at 399
    values.tofile(shard)
    loader = Loader(TokenSet(copy), "train", 64, seed=0)
    with pytest.raises(RuntimeError, match=r"train-00002\.bin holds token 400, the vocabulary has 400 entries"):
        loader.samples(0, loader.samples_per_epoch)


def test_reading_crosses_shards(tokens, folder):
    """3,000 tokens a shard: a read over three of them equals the files put together."""
    whole = np.concatenate([np.fromfile(file, "<u2") for file in sorted(folder.glob("train-0*.bin"))])
    stream = tokens.split("train")
    assert stream.length == len(whole)
    for start, length in ((0, 10), (2999, 2), (2990, 6020), (3000, 3000), (len(whole) - 5, 5)):
        out = np.empty(length, np.int64)
        stream.read(start, out)
        assert out.tolist() == whole[start : start + length].tolist(), start


def test_unknown_splits_are_named(tokens):
    with pytest.raises(ValueError, match=r"no split 'test'; it has val, train"):
        tokens.split("test")


def test_more_shards_than_open_files_are_allowed(folder):
    """A soft limit below the number of shards is raised; a hard one is an error that says what to do."""
    code = "import resource, sys; from data.tokens import TokenSet; import data.tokens as t; t.SPARE_FILES = 8; "
    code += "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3]))); "
    code += "print(TokenSet(sys.argv[1]).split('train').length)"
    root = Path(data.tokens.__file__).parents[1]

    def opened(soft: int, hard: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, str(folder), str(soft), str(hard)]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    assert opened(12, 4096).stdout.strip() == str(TokenSet(folder).split("train").length)
    assert "token shards need" in (error := opened(12, 12).stderr) and "data.shard_tokens" in error


@pytest.mark.parametrize(("split", "advice"), [("train", [mmap.MADV_RANDOM]), ("val", [])])
def test_training_reads_without_read_ahead(folder, monkeypatch, split, advice):
    given = []

    class Map(mmap.mmap):
        def madvise(self, option):
            given.append(option)
            super().madvise(option)

    monkeypatch.setattr(data.tokens.mmap, "mmap", Map)
    assert TokenSet(folder).split(split).length and sorted(set(given)) == advice


def test_a_shard_that_changes_with_its_size_and_time_is_noticed(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tokens = TokenSet(copy)
    shard = copy / "train-00001.bin"
    shard.chmod(0o600)  # as a backup may touch it: ctime alone is new
    tokens.check_unchanged()
    stat, data = shard.stat(), shard.read_bytes()
    shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(RuntimeError, match=r"train-00001\.bin was altered"):
        tokens.check_unchanged()
