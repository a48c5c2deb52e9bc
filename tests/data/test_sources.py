"""Every file format gives the same rows, and a bad file is named with its line."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from data.open import open_source
from data.pydocs import PydocsSource, module_text
from data.sources import FileSource, file_fingerprints
from data.spec import DataSpec


def read(spec: DataSpec, root, skip: int = 0) -> list[tuple]:
    source = open_source(spec, root)
    return [tuple(row) for unit in range(source.units) for row in source.rows(unit, skip)]


def expected(rows):
    return [(row["text"], row["source"], row["id"]) for row in rows]


def as_parquet(rows, path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)


def as_zstd(data: bytes, path, window_log: int):
    """Streamed, so that the frame announces the whole window: what `zstd --long=27` writes."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log)
    with open(path, "wb") as raw, zstandard.ZstdCompressor(compression_params=parameters).stream_writer(raw) as out:
        out.write(data)


def test_formats_give_the_same_rows(tmp_path, make_rows, jsonl):
    rows = make_rows(20)
    plain = jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(plain.read_bytes()))
    as_zstd(plain.read_bytes(), tmp_path / "c.jsonl.zst", 27)
    as_parquet(rows, tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json.gz", "c.jsonl.zst", "d.parquet"):
        spec = DataSpec(files=str(tmp_path / name))
        assert read(spec, tmp_path) == expected(rows), name
        assert read(spec, tmp_path, skip=9) == expected(rows[9:]), name


def test_zstd_files_of_several_frames_are_read_to_the_end(tmp_path, make_rows, jsonl):
    rows = make_rows(6)
    data = jsonl(tmp_path / "a.jsonl", rows).read_bytes()
    frames = [zstandard.ZstdCompressor().compress(part) for part in (data[:1000], data[1000:])]
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    assert read(DataSpec(files=str(tmp_path / "b.jsonl.zst")), tmp_path) == expected(rows)


def test_globs_are_sorted_and_lists_keep_their_order(tmp_path, make_rows, jsonl):
    rows = make_rows(9)
    for i, name in enumerate(("c", "a", "b")):
        jsonl(tmp_path / f"{name}.jsonl", rows[i * 3 : i * 3 + 3])
    assert read(DataSpec(files=f"{tmp_path}/*.jsonl"), tmp_path) == expected(rows[3:9] + rows[:3])
    listed = [f"{tmp_path}/c.jsonl", f"{tmp_path}/a.jsonl"]
    assert read(DataSpec(files=listed), tmp_path) == expected(rows[:6])


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\ntwo \x85 three\n".encode())
    (row,) = read(DataSpec(files=f"{tmp_path}/a.txt"), tmp_path)
    assert row[0] == "one\r\n\ntwo \x85 three\n" and row[2] == "a.txt"


def test_a_long_text_file_is_cut_at_line_ends_and_stays_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.TXT_ROW_CHARACTERS", 20)
    text = "".join(f"line {i}\n" for i in range(10))
    (tmp_path / "a.txt").write_text(text)
    rows = read(DataSpec(files=f"{tmp_path}/a.txt"), tmp_path)
    assert len(rows) > 2 and "".join(row[0] for row in rows) == text
    assert all(row[0].endswith("\n") for row in rows) and len({row[1:] for row in rows}) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut o', r"a\.jsonl, line 2: not JSON"),
        ('{"body": "x"}', r"a\.jsonl, line 2: no text under data\.text_key=text; the row's keys are body"),
        ('{"text": null}', r"a\.jsonl, line 2: no text under data\.text_key=text; found null"),
        ('{"text": 5}', r"a\.jsonl, line 2: no text under data\.text_key=text; found a value of type int"),
        ('["x"]', r"a\.jsonl, line 2: a list"),
        (f'{{"text": "x", "n": {"1" * 5000}}}', r"a\.jsonl, line 2: not JSON \(Exceeds the limit"),
        ("[" * 100_000, r"a\.jsonl, line 2: not JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read(DataSpec(files=f"{tmp_path}/a.jsonl"), tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "good"}\n' * 5000 + b'{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=rf"{name}, line 5001: not UTF-8 \(byte 0xe9, 14 bytes into the line\)"):
        read(DataSpec(files=f"{tmp_path}/{name}"), tmp_path)


@pytest.mark.parametrize("kept", [0.3, 0.999])
@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_a_cut_off_file_is_an_error_and_not_a_short_text(tmp_path, make_rows, jsonl, suffix, kept):
    data = jsonl(tmp_path / "a.jsonl", make_rows(40)).read_bytes()
    packed = gzip.compress(data) if suffix == "gz" else zstandard.ZstdCompressor().compress(data)
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(packed[: int(len(packed) * kept)])
    with pytest.raises(ValueError, match=rf"b\.jsonl\.{suffix}.*cut off"):
        read(DataSpec(files=f"{tmp_path}/b.jsonl.{suffix}"), tmp_path)


def test_a_damaged_zstd_file_is_an_error(tmp_path, make_rows, jsonl):
    data = jsonl(tmp_path / "a.jsonl", make_rows(40)).read_bytes()
    packed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(data))
    packed[-1] ^= 1
    (tmp_path / "b.jsonl.zst").write_bytes(packed)
    with pytest.raises(ValueError, match=r"b\.jsonl\.zst.*damaged"):
        read(DataSpec(files=f"{tmp_path}/b.jsonl.zst"), tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path, make_rows):
    path = tmp_path / "a.parquet"
    as_parquet(make_rows(40), path)
    whole = path.read_bytes()
    for data in (b"garbage", whole[:-9], whole[:60] + b"\xff" * 200 + whole[260:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.parquet: .*damaged\? \(\d+ rows were read\)"):
            read(DataSpec(files=str(path)), tmp_path)


def test_half_characters_become_question_marks_wherever_they_are(tmp_path):
    row = {"text": "a \ud800 b", "source": "\udfff", "id": "\ud800"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert read(DataSpec(files=f"{tmp_path}/a.jsonl"), tmp_path) == [("a ? b", "?", "?")]


def test_missing_files_and_unknown_types_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"data\.files: no file matches '.*nothing-\*\.jsonl'"):
        open_source(DataSpec(files=f"{tmp_path}/nothing-*.jsonl"), tmp_path)
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ValueError, match="unknown file type"):
        open_source(DataSpec(files=f"{tmp_path}/a.pdf"), tmp_path)


def test_a_damaged_cache_of_fingerprints_is_made_anew(tmp_path, make_rows, jsonl):
    source = jsonl(tmp_path / "a.jsonl", make_rows(3))
    fresh = file_fingerprints([source], tmp_path / "cache")
    for damage in ("", '{"a', "[1]"):
        (tmp_path / "cache" / "fingerprints.json").write_text(damage)
        assert file_fingerprints([source], tmp_path / "cache") == fresh


def test_fingerprints_follow_the_contents_not_the_place(tmp_path, make_rows, jsonl):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "a.jsonl", make_rows(3))
    prints = [FileSource([f"{tmp_path}/{n}/a.jsonl"], DataSpec(), tmp_path, "files").fingerprint() for n in "xy"]
    assert prints[0] == prints[1]
    jsonl(tmp_path / "y" / "a.jsonl", make_rows(3, first=1))
    assert FileSource([f"{tmp_path}/y/a.jsonl"], DataSpec(), tmp_path, "files").fingerprint() != prints[0]
    assert str(tmp_path) not in json.dumps(prints)


def test_python_documentation_topics_come_first(tmp_path):
    from pydoc_data.topics import topics

    source = PydocsSource()
    rows = source.rows(0, 0)
    first = [next(rows) for _ in range(len(topics))]
    assert [row.id for row in first] == sorted(topics) and sum(len(row.text) for row in first) > 300_000
    assert source.fingerprint() == PydocsSource().fingerprint()


def test_docstrings_come_in_source_order(tmp_path):
    """Not by name and not level by level, as a walk over the tree gives them."""
    path = tmp_path / "sample.py"
    path.write_text(
        '"""Top."""\nclass Z:\n    """Of Z."""\n    def y(self):\n        """Of y."""\n'
        'def b():\n    """Of b."""\ndef none():\n    pass\n'
    )
    assert module_text(path) == "sample\n\nTop.\n\nZ\n\nOf Z.\n\ny\n\nOf y.\n\nb\n\nOf b.\n"
    path.write_text("x = 1\n")
    assert module_text(path) == ""


def test_each_files_size_is_asked_for_once(tmp_path, monkeypatch, make_rows, jsonl):
    for i in range(20):
        jsonl(tmp_path / f"{i:02d}.jsonl", make_rows(1))
    asked = []
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **how: [asked.append(path.name), stat(path, **how)][1])
    source = FileSource([f"{tmp_path}/*.jsonl"], DataSpec(), tmp_path, "files")
    shares = []
    for unit in range(source.units):
        list(source.rows(unit, 0))
        shares.append(source.progress())
    assert len(asked) == 20 and shares == sorted(shares) and shares[-1] == 1


def test_a_parquet_file_without_the_column_tells_which_it_has(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"content": ["one"], "url": ["u"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no column data\.text_key=text; it has content, url"):
        read(DataSpec(files=f"{tmp_path}/a.parquet"), tmp_path)
