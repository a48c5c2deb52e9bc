"""From files to a token folder: contents, split, repeatability, and nothing lost by a kill."""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import wait_until

import data.parts
import data.prepare
import data.tail
from data.evalset import EvalSet
from data.open import open_source
from data.prepare import ensure, prepare, prepare_command
from data.spec import DataSpec
from data.tokenizer import TextTokenizer
from data.tokens import TokenSet

# Prepares argv[1] into argv[2] in parts of 6,000 characters, with argv[3] workers.
DRIVER = """
import sys
import data.parts
from data.prepare import prepare
from data.spec import DataSpec
data.parts.PART_CHARACTERS = 6000
if __name__ == "__main__":
    spec = DataSpec(files=sys.argv[1], vocab_size=300, val_fraction=0.1, shard_tokens=20_000, workers=int(sys.argv[3]))
    print(prepare(spec, sys.argv[2]))
"""


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of each file; without layouts and locks that other tests may have put there."""
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def decoded(folder: Path, split: str) -> list[str]:
    """The texts of a split, from its tokens."""
    tokens, tokenizer = TokenSet(folder), TextTokenizer(folder / "tokenizer.json")
    stream = tokens.split(split)
    everything = np.empty(stream.length, np.int64)
    stream.read(0, everything)
    starts = [*stream.documents[:, 0].tolist(), stream.length]
    pieces = [everything[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert all(piece[0] == tokens.bos_id and tokens.bos_id not in piece[1:] for piece in pieces)
    return [tokenizer.tokenizer.decode(piece[1:]) for piece in pieces]


def test_tokens_are_the_text_and_sides_are_disjoint(folder, make_rows):
    rows = make_rows(80)
    texts = {split: decoded(folder, split) for split in ("train", "val")}
    assert sorted(texts["train"] + texts["val"]) == sorted(row["text"] for row in rows)
    of_text = {row["text"]: (row["source"], row["id"]) for row in rows}
    sides = {split: {of_text[text] for text in texts[split]} for split in texts}
    assert sides["val"] and not sides["train"] & sides["val"]
    # Order is kept: the train texts are the rows without the val ones.
    assert texts["train"] == [row["text"] for row in rows if (row["source"], row["id"]) in sides["train"]]


def test_the_manifest_counts_what_is_there(folder, make_rows):
    manifest = TokenSet(folder).manifest
    sizes = [len(text.encode()) for text in decoded(folder, "val")]
    split = manifest["splits"]["val"]
    assert (split["documents"], split["bytes"], split["inexact_documents"]) == (len(sizes), sum(sizes), 0)
    assert split["tokens"] * 2 == sum(shard["size"] for shard in split["shards"])
    train = manifest["splits"]["train"]["shards"]
    assert len(train) > 5 and {shard["size"] for shard in train[:-1]} == {6000}
    assert TokenSet(folder).split("val").documents[:, 1].tolist() == sizes


def test_the_same_text_gives_the_same_folder_on_any_number_of_workers(spec, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data.parts, "PART_CHARACTERS", 10_000)
    again = prepare(dataclasses.replace(spec, workers=2), tmp_path)
    assert again.name == folder.name and contents(again) == contents(folder)


def test_many_files_of_less_than_a_part_are_tokenized_by_processes(tmp_path, make_rows, jsonl, monkeypatch):
    monkeypatch.setattr(data.parts, "PART_CHARACTERS", 20_000)
    started = []
    start_pool = data.parts._Pool._start
    monkeypatch.setattr(data.parts._Pool, "_start", lambda pool: [started.append(1), start_pool(pool)][1])
    for i in range(6):
        jsonl(tmp_path / f"{i}.jsonl", make_rows(12, first=12 * i))
    spec = DataSpec(files=f"{tmp_path}/*.jsonl", vocab_size=300, val_fraction=0.2, workers=2)
    many = prepare(spec, tmp_path / "many")
    assert started == [1]
    assert contents(many) == contents(prepare(dataclasses.replace(spec, workers=1), tmp_path / "alone"))
    prepare(dataclasses.replace(spec, files=f"{tmp_path}/0.jsonl"), tmp_path / "one")
    assert started == [1]


def test_documents_of_both_sides_are_counted():
    names = np.unique(np.random.default_rng(0).integers(0, 2**62, 485_000))  # val_fraction of FineWeb-Edu's 97M
    groups = np.concatenate([names[[0, 7, -1]], np.random.default_rng(1).integers(0, 2**62, 900), [2**63 - 1, 0]])
    assert data.assemble._is_among(groups, names).sum() == np.isin(groups, names).sum() == 3


def test_a_rerun_changes_nothing_and_compares_checksums(spec, folder):
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert prepare(spec, folder.parent) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    shard = folder / "train-00002.bin"
    good = shard.read_bytes()
    try:
        shard.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        with pytest.raises(RuntimeError, match=r"train-00002\.bin differs from its checksum.*delete the folder"):
            prepare(spec, folder.parent)
    finally:
        shard.write_bytes(good)


def test_a_finished_folder_needs_no_writing(spec, tmp_path, monkeypatch):
    made = prepare(spec, tmp_path)
    (tmp_path / "fingerprints.json").unlink()

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("data.prepare.locked", refuse)
    monkeypatch.setattr("base.fingerprints.write_json", refuse)
    monkeypatch.setattr("base.fingerprints.os.access", lambda path, mode: False)
    assert prepare(spec, tmp_path) == ensure(spec, tmp_path) == made


def test_another_source_or_option_gives_another_folder(spec, folder, tmp_path, make_rows, jsonl):
    changed = jsonl(tmp_path / "text.jsonl", make_rows(81))
    assert ensure(dataclasses.replace(spec, files=str(changed)), tmp_path).name != folder.name
    for option in ({"val_fraction": 0.2}, {"split_seed": 1}, {"shard_tokens": 5000}, {"max_documents": 50}):
        assert ensure(dataclasses.replace(spec, **option), tmp_path).name != folder.name, option


def test_the_keys_of_a_row_are_part_of_the_folders_name(tmp_path):
    rows = [{"text": f"one text {i}", "body": f"another {i}", "id": i, "name": i // 2} for i in range(60)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DataSpec(files=f"{tmp_path}/t.jsonl", vocab_size=260, val_fraction=0.3, workers=1)
    specs = [spec, *(dataclasses.replace(spec, **key) for key in ({"text_key": "body"}, {"id_key": "name"}))]
    assert len({prepare(s, tmp_path / "out") for s in specs}) == 3


def test_a_tokenizer_with_a_space_prefix_counts_the_texts_own_bytes(tmp_path, make_rows, jsonl, llama_like):
    """As Llama-2's, the published runs': a byte less for each text, in preparation and in bits per byte."""
    file = jsonl(tmp_path / "t.jsonl", make_rows(30))
    spec = DataSpec(files=str(file), tokenizer=str(llama_like), val_fraction=0.3, workers=1)
    tokens = TokenSet(prepare(spec, tmp_path / "out"))
    splits = tokens.manifest["splits"]
    assert [splits[side]["inexact_documents"] for side in ("train", "val")] == [0, 0]
    assert EvalSet(tokens, 64, None).segments.bytes.sum() == splits["val"]["bytes"]


def test_contents_have_one_fingerprint_however_they_are_cut(spec, folder, tmp_path):
    other = TokenSet(ensure(dataclasses.replace(spec, shard_tokens=5000), tmp_path))
    assert other.fingerprint == TokenSet(folder).fingerprint
    other = TokenSet(ensure(dataclasses.replace(spec, split_seed=1), tmp_path))
    assert other.fingerprint != TokenSet(folder).fingerprint


def test_val_files_override_the_split(tmp_path, make_rows, jsonl):
    train, val = jsonl(tmp_path / "t.jsonl", make_rows(40)), jsonl(tmp_path / "v.jsonl", make_rows(8, first=100))
    spec = DataSpec(files=str(train), val_files=str(val), vocab_size=300, workers=1)
    folder = prepare(spec, tmp_path / "out")
    assert decoded(folder, "train") == [row["text"] for row in make_rows(40)]
    assert decoded(folder, "val") == [row["text"] for row in make_rows(8, first=100)]


def test_a_document_on_both_sides_is_an_error(tmp_path, make_rows, jsonl):
    train, val = jsonl(tmp_path / "t.jsonl", make_rows(40)), jsonl(tmp_path / "v.jsonl", make_rows(8, first=39))
    with pytest.raises(ValueError, match=r"1 rows of the train files belong to one of the 8 validation documents"):
        prepare(DataSpec(files=str(train), val_files=str(val), vocab_size=300, workers=1), tmp_path / "out")


def test_a_file_on_both_sides_is_an_error_without_ids(tmp_path, make_rows, jsonl):
    texts = [{"text": row["text"]} for row in make_rows(40)]
    train, val = jsonl(tmp_path / "t.jsonl", texts), jsonl(tmp_path / "v.jsonl", texts)
    with pytest.raises(ValueError, match=r"v\.jsonl of data\.val_files has the contents of t\.jsonl of data\.files"):
        prepare(DataSpec(files=str(train), val_files=str(val), vocab_size=300, workers=1), tmp_path / "out")


def test_copies_of_validation_text_are_counted_and_dropped_on_request(tmp_path, make_rows, jsonl, capsys):
    """Under other ids, without ids, with other spaces around them; also where the split is ours."""
    rows = make_rows(40)
    texts = [row["text"] for row in rows]
    copies = [{"text": texts[3], "id": "new"}, {"text": f"{texts[7]}\n"}, {"text": texts[3]}]
    train = jsonl(tmp_path / "t.jsonl", rows[12:] + copies)
    val = jsonl(tmp_path / "v.jsonl", rows[:12])
    spec = DataSpec(files=str(train), val_files=str(val), vocab_size=300, workers=1)
    keep, drop = (prepare(dataclasses.replace(spec, val_copies=how), tmp_path / "out") for how in ("keep", "drop"))
    counted = [TokenSet(folder).manifest["splits"]["train"] for folder in (keep, drop)]
    size = sum(len(row["text"].encode()) for row in copies)
    assert [(c["copies_of_val"], c["copies_of_val_bytes"]) for c in counted] == [(3, size), (3, size)]
    assert decoded(keep, "train") == texts[12:] + [row["text"] for row in copies]
    assert decoded(drop, "train") == texts[12:] and decoded(drop, "val") == texts[:12]
    said = capsys.readouterr().err
    assert "3 train rows" in said and "data.val_copies=drop" in said and "were left out" in said
    file = jsonl(tmp_path / "twice.jsonl", [{"text": text} for text in texts + texts])
    alone = DataSpec(files=str(file), vocab_size=300, val_fraction=0.2, workers=1)
    assert TokenSet(prepare(alone, tmp_path / "out")).manifest["splits"]["train"]["copies_of_val"] > 3


def test_bad_rows_are_counted_through_a_kill(tmp_path, make_rows, jsonl, capsys, monkeypatch):
    lines = [json.dumps(row) if i % 9 else "{" for i, row in enumerate(make_rows(80))]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    spec = DataSpec(files=f"{tmp_path}/t.jsonl", vocab_size=300, val_fraction=0.2, workers=1, bad_rows="skip")
    with pytest.raises(ValueError, match=r"line 1: not JSON .*data\.bad_rows=skip"):
        prepare(dataclasses.replace(spec, bad_rows="error"), tmp_path / "out")
    straight = prepare(spec, tmp_path / "straight")
    said = capsys.readouterr().err
    bad = sum(line == "{" for line in lines)
    assert f"{bad} rows of the train text could not be read" in said and said.count("left out: ") == 5
    assert TokenSet(straight).manifest["bad_rows"] == {"train": bad}
    monkeypatch.setattr(data.parts, "PART_CHARACTERS", 6000)
    tokenize, done = data.parts.tokenize_part, []

    def killed(part, tokenizer):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(part.path)
        return tokenize(part, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(data.parts, "tokenize_part", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(spec, tmp_path / "killed")
    resumed = prepare(spec, tmp_path / "killed")
    assert contents(resumed) == contents(straight) and len(done) == 4


def test_ids_that_begin_anew_in_each_file_are_named_with_the_way_out(tmp_path, make_rows, jsonl, capsys):
    def numbered(name, first, count):
        rows = make_rows(count, first=first)
        return str(jsonl(tmp_path / name, [{"text": row["text"], "id": i} for i, row in enumerate(rows)]))

    files = [numbered("a.jsonl", 0, 20), numbered("b.jsonl", 30, 20)]
    spec = DataSpec(files=files, val_files=numbered("v.jsonl", 60, 9), vocab_size=300, workers=1)
    with pytest.raises(ValueError, match=r"same source and id.*data\.id_key=null"):
        prepare(spec, tmp_path / "out")
    assert "data.id_key=null" in capsys.readouterr().err
    prepare(dataclasses.replace(spec, id_key=None), tmp_path / "out")
    assert "id_key" not in capsys.readouterr().err


def test_a_text_given_twice_is_an_error(tmp_path, make_rows, jsonl):
    """Rows without ids are named by their number: the two copies of one would lie in train and in val."""
    jsonl(tmp_path / "a.jsonl", make_rows(20))
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    for files, second in (([f"{tmp_path}/a.jsonl", f"{tmp_path}/a*"], "a"), ([f"{tmp_path}/*.jsonl"], "b")):
        with pytest.raises(ValueError, match=rf"data\.files has the contents of a\.jsonl twice.* as {second}\.jsonl"):
            prepare(DataSpec(files=files, id_key=None), tmp_path / "out")


def test_a_source_altered_while_it_is_read_gives_no_folder(tmp_path, make_rows, jsonl, monkeypatch):
    file = jsonl(tmp_path / "a.jsonl", make_rows(40))
    tokenize = data.prepare.tokenize_source

    def altered(*arguments):
        parts = tokenize(*arguments)
        with open(file, "a") as handle:
            handle.write('{"text": "one more"}\n')
        return parts

    monkeypatch.setattr(data.prepare, "tokenize_source", altered)
    spec = DataSpec(files=str(file), vocab_size=300, val_fraction=0.2, workers=1)
    with pytest.raises(RuntimeError, match=r"a\.jsonl was altered while it was read: run the same command again"):
        prepare(spec, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if "text-300" in path.name and path.is_dir()]
    monkeypatch.undo()
    assert TokenSet(prepare(spec, tmp_path / "out")).manifest["splits"]["train"]["documents"] > 20


def test_the_papers_rule_is_datasets_train_test_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    from data.split import paper_val_documents

    for count in (1, 1999, 2000, 2001, 50_001):
        numbers = datasets.Dataset.from_dict({"n": range(count)}) if count > 1 else None
        if numbers:
            test = numbers.train_test_split(test_size=0.0005, seed=2357)["test"]["n"]
            assert paper_val_documents(count, 2357).tolist() == list(test), count
        else:
            assert paper_val_documents(count, 2357).tolist() == [0]


@pytest.mark.parametrize("id_key", [None, "id"])
def test_the_papers_rule_takes_whole_documents(tmp_path, jsonl, id_key):
    """3,000 rows: as documents of their own, or two rows to a document, of which the drawn ones go to val whole."""
    from data.split import paper_val_documents

    rows = [{"text": f"text number {i}", "source": "s", "id": str(i // 2)} for i in range(3000)]
    spec = DataSpec(files=str(jsonl(tmp_path / "t.jsonl", rows)), id_key=id_key, val_rule="paper", vocab_size=260)
    folder = prepare(dataclasses.replace(spec, workers=1), tmp_path / "out")
    if id_key is None:
        drawn = sorted(paper_val_documents(3000, 2357).tolist())
    else:
        drawn = [
            row for document in sorted(paper_val_documents(1500, 2357)) for row in (2 * document, 2 * document + 1)
        ]
    assert decoded(folder, "val") == [f"text number {i}" for i in drawn]


def test_a_row_limit_takes_the_first_rows_and_opens_no_further_file(tmp_path, make_rows, jsonl):
    rows = make_rows(40)
    jsonl(tmp_path / "1.jsonl", rows[:30])
    jsonl(tmp_path / "2.jsonl", rows[30:40])
    (tmp_path / "3.jsonl").write_text("not JSON")
    for limit in (25, 40):
        spec = DataSpec(files=f"{tmp_path}/*.jsonl", vocab_size=300, val_fraction=0.2, workers=1, max_documents=limit)
        folder = prepare(spec, tmp_path / "out")
        texts = decoded(folder, "train") + decoded(folder, "val")
        assert sorted(texts) == sorted(row["text"] for row in rows[:limit])


def test_empty_texts_are_dropped_and_half_characters_replaced(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"text": ""}\n{"text": "a \\ud83d b"}\n' + '{"text": "some text, some text"}\n' * 40
    )
    spec = DataSpec(files=f"{tmp_path}/t.jsonl", vocab_size=258, val_fraction=0.3, workers=1)
    folder = prepare(spec, tmp_path / "out")
    texts = decoded(folder, "train") + decoded(folder, "val")
    assert len(texts) == 41 and "a ? b" in texts


def test_an_empty_side_is_an_error(tmp_path, jsonl, make_rows):
    source = jsonl(tmp_path / "t.jsonl", make_rows(4))
    spec = DataSpec(files=str(source), vocab_size=280, val_fraction=1e-9, workers=1)
    with pytest.raises(ValueError, match=r"the val side has no document \(5 are train\).*data\.val_files") as caught:
        prepare(spec, tmp_path / "out")
    fraction = float(re.search(r"type data\.val_fraction=([\d.]+)", str(caught.value))[1])  # can be typed
    with pytest.raises(ValueError, match="the val side has no document"):
        prepare(dataclasses.replace(spec, val_fraction=fraction - 0.002), tmp_path / "out")
    assert decoded(prepare(dataclasses.replace(spec, val_fraction=fraction), tmp_path / "out"), "val")


def test_an_empty_train_file_is_an_error_before_a_tokenizer_is_trained_on_it(tmp_path, jsonl, make_rows):
    empty, val = jsonl(tmp_path / "t.jsonl", [{"text": ""}]), jsonl(tmp_path / "v.jsonl", make_rows(4))
    spec = DataSpec(files=str(empty), val_files=str(val), vocab_size=280, workers=1)
    with pytest.raises(ValueError, match=r"the train side has no text"):
        prepare(spec, tmp_path / "out")


def test_wide_vocabularies_take_four_bytes(tmp_path, jsonl, make_rows):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for row in make_rows(5) for word in re.split(r"(\s)", row["text"])} | {"[UNK]"})
    vocab = {"<s>": 0, **{word: 70_000 + i for i, word in enumerate(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "wide.json"))
    source = jsonl(tmp_path / "t.jsonl", make_rows(20))
    spec = DataSpec(files=str(source), tokenizer=str(tmp_path / "wide.json"), val_fraction=0.2, workers=1)
    tokens = TokenSet(prepare(spec, tmp_path / "out"), verify=True)
    assert tokens.dtype == np.uint32 and tokens.vocab_size == 70_000 + len(words)
    out = np.empty(50, np.int64)
    tokens.split("train").read(0, out)
    assert out[0] == 0 and out[1:].max() >= 70_000
    assert tokens.manifest["splits"]["train"]["inexact_documents"] > 0  # unknown words lose their bytes: it is said


def test_large_sources_ask_for_the_command(spec, tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.SMALL_SOURCE_BYTES", 10)
    with pytest.raises(FileNotFoundError) as caught:
        ensure(spec, tmp_path)
    command = str(caught.value).splitlines()[-1].strip()
    wanted = [f"data.files={spec.files}", "data.vocab_size=400", f"paths.data={tmp_path}"]
    assert command.startswith("python scripts/prepare_data.py data=text ") and all(w in command for w in wanted)


def test_the_command_packs_for_the_runs_sequence_length(spec, tmp_path, monkeypatch):
    monkeypatch.setattr("data.prepare.SMALL_SOURCE_BYTES", 10)
    with pytest.raises(FileNotFoundError, match=r"data\.packing=bos_bestfit .*batch\.seq_len=2048 paths\.data="):
        ensure(dataclasses.replace(spec, packing="bos_bestfit"), tmp_path, 2048)
    with pytest.raises(FileNotFoundError) as caught:
        ensure(spec, tmp_path, 2048)
    assert "seq_len" not in str(caught.value)  # a stream of tokens is cut to any length


@pytest.mark.parametrize(
    "name",
    ["\u00e9.jsonl", "null", "1e3", "a b,c.jsonl", "it's.jsonl", "a[1].jsonl", "b\\.jsonl", "c\\", 'd"e', "f{g}"],
)
def test_the_command_to_type_can_be_typed(name):
    from launcher.compose import compose

    words = shlex.split(prepare_command(DataSpec(files=name, val_files=[name]), Path("/tmp") / name))[2:]
    config = compose(words).config
    assert (config.data.files, config.data.val_files, config.paths.data) == (name, [name], f"/tmp/{name}")


def test_a_given_folder_is_taken_as_it_is(folder, tmp_path):
    assert ensure(DataSpec(path=str(folder)), tmp_path) == folder
    with pytest.raises(FileNotFoundError, match=r"data\.path=.*no manifest\.json"):
        ensure(DataSpec(path=str(tmp_path)), tmp_path)


def test_preparing_a_given_folder_compares_its_checksums(folder, tmp_path, capsys):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert prepare(DataSpec(path=str(copy)), tmp_path) == copy and "all checksums agree" in capsys.readouterr().err
    data = bytearray((copy / "train-00003.bin").read_bytes())
    data[5] ^= 1
    (copy / "train-00003.bin").write_bytes(data)
    with pytest.raises(RuntimeError, match=r"train-00003\.bin differs from its checksum"):
        prepare(DataSpec(path=str(copy)), tmp_path)


def test_a_full_disk_is_explained_and_leaves_no_debris(spec, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("base.files.os.fsync", full)
        with pytest.raises(RuntimeError, match=r"the disk that holds .* is full .*set paths\.data.*finished parts"):
            prepare(dataclasses.replace(spec, tokenizer=None), tmp_path)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert TokenSet(prepare(spec, tmp_path), verify=True)


@pytest.mark.parametrize("word", ["data.fils=x", "data.files=/nowhere/*.jsonl"])
def test_a_wrong_command_ends_with_code_2(word):
    script = Path(data.parts.__file__).parents[1] / "scripts" / "prepare_data.py"
    command = [sys.executable, str(script), "data=text", "data.files=a.txt", word]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def start(source: Path, root: Path, workers: int) -> subprocess.Popen:
    script = root.parent / "driver.py"
    script.write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(Path(data.parts.__file__).parents[1])}
    command = [sys.executable, str(script), str(source), str(root), str(workers)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def finished_parts(root: Path) -> list[Path]:
    return sorted(root.glob(".text-*/parts/train-*.npz"))


def workers_of(pid: int) -> list[int]:
    result = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False)
    return [int(word) for word in result.stdout.split()]


def test_kill_9_loses_no_finished_part(tmp_path, make_rows, jsonl, monkeypatch):
    # Without ids a row's side of the split hangs on its number, which a resume must get right.
    source = jsonl(tmp_path / "t.jsonl", [{"text": row["text"]} for row in make_rows(900)])
    root = tmp_path / "killed"
    process = start(source, root, 2)
    while len(finished_parts(root)) < 4:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    children = workers_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Orphans would wait for work forever.
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    done = {path.name for path in finished_parts(root)}
    assert len(done) >= 4 and not list(root.glob("text-*"))
    resumed, written, looked_at = prepare_here(source, root, monkeypatch)
    straight, all_parts, _ = prepare_here(source, tmp_path / "straight", monkeypatch)
    assert "train-000000-000000.npz" not in looked_at  # rows of the finished beginning are not even parsed
    assert contents(resumed) == contents(straight)
    assert not written & done and written | done == all_parts and len(all_parts) > 20


def prepare_here(source: Path, root: Path, monkeypatch) -> tuple[Path, set[str], set[str]]:
    """What DRIVER does, in this process; returns the folder and the names of the parts written and of those read."""
    written, looked_at = set(), set()
    atomic_write, tokenize_part = data.parts.atomic_write, data.parts.tokenize_part

    def recorded(path: Path):
        written.add(path.name)
        return atomic_write(path)

    def watched(part, tokenizer):
        looked_at.add(part.path.name)
        return tokenize_part(part, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(data.parts, "PART_CHARACTERS", 6000)
        patch.setattr(data.parts, "atomic_write", recorded)
        patch.setattr(data.parts, "tokenize_part", watched)
        spec = DataSpec(files=str(source), vocab_size=300, val_fraction=0.1, shard_tokens=20_000, workers=1)
        return prepare(spec, root), written, looked_at


def test_two_at_once_do_the_work_once(tmp_path, make_rows, jsonl):
    source = jsonl(tmp_path / "t.jsonl", make_rows(60))
    both = [start(source, tmp_path / "out", 1) for _ in range(2)]
    folders = {p.communicate(timeout=300)[0].strip() for p in both}
    assert [p.returncode for p in both] == [0, 0] and len(folders) == 1
    assert TokenSet(folders.pop(), verify=True)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "ids", "one line.txt"])
def test_a_text_that_is_one_document_is_cut(tmp_path, make_rows, jsonl, monkeypatch, name):
    """A book: a text file, one row, or several rows of one id; its end, from a line end on, is validation."""
    monkeypatch.setattr("data.sources.TXT_ROW_CHARACTERS", 3000)
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [row["text"].replace(". ", ".\n") for row in make_rows(12)]
    text = " ".join(rows).replace("\n" if "line" in name else "\0", " ")
    if name == "ids":
        jsonl(folder / "b.jsonl", [{"text": row, "id": "x"} for row in rows[:5]])
        jsonl(folder / "c.jsonl", [{"text": row, "id": "x"} for row in rows[5:]])
        text = "".join(rows)
    elif name == "a.jsonl":
        jsonl(folder / name, [{"text": text}])
    else:
        (folder / name).write_text(text, encoding="utf-8")
    spec = DataSpec(files=f"{folder}/*", vocab_size=300, val_fraction=0.2, workers=1)
    folder = prepare(spec, tmp_path / "out")
    train, val = ("".join(decoded(folder, side)) for side in ("train", "val"))
    assert train + val == text and abs(len(val.encode()) / len(text.encode()) - 0.2) < 0.03
    assert train.endswith(" " if "line" in name else "\n")
    assert len(np.unique(TokenSet(folder).split("val").documents[:, 2])) == 1
    source = data.tail.cut_of(open_source(spec, tmp_path / "out"), 0.2)
    assert list(source.rows(0, 1)) == list(source.rows(0, 0))[1:]  # what a resumed preparation asks for


def test_a_text_is_cut_between_characters():
    for text in ("é" * 9, "a" * 9, "ab cd", "数\n数", "a\n\n"):
        for at in range(1, len(text.encode())):
            parts = data.tail.cut(text, at)
            assert "".join(parts) == text and parts[0]
    assert data.tail.cut("one\ntwo\nthree", 5) == ("one\ntwo\n", "three") and data.tail.cut("ab", 1) == ("a", "b")


def test_every_path_is_written_out(tmp_path, make_rows, jsonl, byte_level, monkeypatch):
    """~ and $NAME, in each option that names a file or a folder; no folder called "~" is left."""
    from launcher.compose import compose

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "t.jsonl", make_rows(12))
    jsonl(tmp_path / "v.jsonl", make_rows(4, first=50))
    shutil.copy(byte_level, tmp_path / "tokenizer.json")
    texts = ["data.files=$SCRATCH/t.jsonl", 'data.val_files="~/v.jsonl"', 'data.tokenizer="~/tokenizer.json"']
    config = compose(["data=text", *texts, 'paths.runs="~/runs"', "paths.data=$SCRATCH/tokens"]).config
    assert (config.paths.runs, config.paths.data) == (f"{tmp_path}/runs", f"{tmp_path}/tokens")
    folder = prepare(dataclasses.replace(config.data, workers=1), config.paths.data)
    assert (
        folder.parent == tmp_path / "tokens" and ensure(DataSpec(path=f"$SCRATCH/tokens/{folder.name}"), "x") == folder
    )
    local = DataSpec(source="hub", hub_path="json", hub_data_files="~/t.jsonl")
    assert open_source(local, tmp_path / "tokens").fingerprint()["files"][0]["file"] == "t.jsonl"
    (tmp_path / "set").mkdir()
    shutil.copy(tmp_path / "t.jsonl", tmp_path / "set")
    folder = DataSpec(source="hub", hub_path="~/set")
    assert open_source(folder, tmp_path / "tokens").fingerprint()["loader"] == "folder"
    assert not any("~" in path.name or "$" in path.name for path in tmp_path.rglob("*"))
