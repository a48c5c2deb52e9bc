"""Every file format gives the same rows, and a bad file is named with its line."""

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

from data import pydocs
from data.open import open_source
from data.pydocs import PydocsSource, module_text
from data.sources import FileSource, file_fingerprints
from data.spec import DataSpec


def read(spec: DataSpec, root, skip: int = 0) -> list[tuple]:
    source = open_source(spec, root)
    return [tuple(row)[:3] for unit in range(source.units) for row in source.rows(unit, skip)]


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
    with pytest.raises(ValueError, match=rf"{name}, line 5001: not UTF-8 \(byte 0xe9, 14 bytes into the line"):
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


def test_installed_packages_are_not_even_looked_at(tmp_path, monkeypatch):
    """A hundred times as many files; every start of a run lists the modules."""
    for name in ("b.py", "a/c.py", "a/test/d.py", "site-packages/torch/e.py", "a-b/f.py", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(pydocs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    looked, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: looked.append(Path(folder).name) or scandir(folder))
    assert [p.relative_to(tmp_path).as_posix() for p in PydocsSource().paths] == ["a/c.py", "a-b/f.py", "b.py"]
    assert "a" in looked and "site-packages" not in looked and "test" not in looked


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


def test_empty_lines_are_no_rows_and_numbers_stay_those_of_the_file(tmp_path, make_rows):
    rows = make_rows(6)
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "", " \t\r", *lines[1:], "", ""]))
    assert read(DataSpec(files=f"{tmp_path}/a.jsonl"), tmp_path) == expected(rows)
    assert read(DataSpec(files=f"{tmp_path}/a.jsonl"), tmp_path, skip=2) == expected(rows[2:])
    (tmp_path / "b.jsonl").write_text("\n\n" + lines[0] + "\n\n{")
    with pytest.raises(ValueError, match=r"b\.jsonl, line 5: not JSON .*cut off"):
        read(DataSpec(files=f"{tmp_path}/b.jsonl"), tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "json.gz", "txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    data = "\ufeff".encode() + b'{"text": "one"}\n'
    data = data + data if suffix != "txt" else data  # two files that were put into one
    (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(data) if "gz" in suffix else data)
    texts = [row[0] for row in read(DataSpec(files=f"{tmp_path}/a.{suffix}"), tmp_path)]
    assert texts == (['{"text": "one"}\n'] if suffix == "txt" else ["one", "one"])


def test_a_text_file_with_a_byte_order_mark_gets_a_folder_of_its_own(tmp_path):
    """Its mark was text once, and a folder's name stands for one text."""
    for name, data in (("a.txt", b"one"), ("b.txt", "\ufeffone".encode())):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("\ufeffone".encode()))
    source = FileSource([f"{tmp_path}/*.txt*"], DataSpec(), tmp_path / "root", "files")
    assert ["byte_order_mark" in entry for entry in source.fingerprint()] == [False, True, True]


@pytest.mark.parametrize("change", ["in place", "another file"])
def test_a_changed_file_of_equal_size_and_time_is_another_text(tmp_path, change):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one")
    before = file_fingerprints([path], tmp_path / "cache")
    stat = path.stat()
    if change == "in place":
        path.write_bytes(b"two")
    else:
        (tmp_path / "b.txt").write_bytes(b"two")
        (tmp_path / "b.txt").rename(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert file_fingerprints([path], tmp_path / "cache") != before


def test_utf_16_is_named_with_the_command_that_converts_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "one"}\n'.encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not UTF-8 .*iconv -f UTF-16 -t UTF-8"):
        read(DataSpec(files=f"{tmp_path}/a.jsonl"), tmp_path)


@pytest.mark.parametrize("text", ['[{"text": "one"}]', '[\n{"text": "one"}\n]', '{\n"text": "one"\n}'])
def test_a_file_that_is_one_json_value_is_told_the_way_out(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json, line 1: .*one object a line is needed: jq"):
        read(DataSpec(files=f"{tmp_path}/a.json"), tmp_path)


def test_a_folder_is_told_from_a_file_of_unknown_type(tmp_path):
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match=r"sub is a folder; name its files, such as '.*sub/\*\.jsonl'"):
        open_source(DataSpec(files=f"{tmp_path}/sub"), tmp_path)


def not_utf8(tmp_path, row: int):
    """A Parquet file of 1,500 rows, one of which holds a byte that is no UTF-8."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = [b"good"] * 1500
    values[row - 1] = b"caf\xe9"
    column = pa.Array.from_buffers(pa.string(), 1500, pa.array(values, pa.binary()).buffers())
    pq.write_table(pa.table({"text": column, "other": ["x"] * 1500}), tmp_path / "a.parquet")
    return DataSpec(files=f"{tmp_path}/a.parquet")


def test_a_value_of_parquet_that_is_not_utf8_is_named_with_file_row_and_column(tmp_path):
    spec = not_utf8(tmp_path, 1203)
    with pytest.raises(ValueError, match=r"a\.parquet, row 1203: the value of text is not UTF-8 \(byte 0xe9"):
        read(spec, tmp_path)
    assert len(read(spec, tmp_path, skip=1203)) == 297  # rows that were read before don't matter


def test_bad_rows_are_left_out_and_keep_their_number(tmp_path):
    """So that a resumed preparation takes the same rows. Reasons are kept; a damaged file is still an error."""
    lines = [
        b'{"text": "a"}',
        b"{",
        b'{"text": null}',
        b'{"body": "x"}',
        b'{"text": "caf\xe9"}',
        b"[1]",
        b'{"text": "b"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    spec = DataSpec(files=f"{tmp_path}/a.jsonl", bad_rows="skip")
    rows = list(open_source(spec, tmp_path).rows(0, 0))
    assert [row.text for row in rows] == ["a", "", "", "", "", "", "b"]
    assert [bool(row.bad) for row in rows] == [False, True, True, True, True, True, False]
    assert "line 5: not UTF-8" in rows[4].bad
    assert [row.text for row in open_source(spec, tmp_path).rows(0, 6)] == ["b"]
    spec = not_utf8(tmp_path, 7)
    spec.bad_rows = "skip"
    assert [bool(row.bad) for row in open_source(spec, tmp_path).rows(0, 0)].index(True) == 6
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 900)[:30])
    with pytest.raises(ValueError, match="cut off"):
        read(DataSpec(files=f"{tmp_path}/b.jsonl.gz", bad_rows="skip"), tmp_path)


def test_what_is_there_twice_is_not_chosen_silently(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "text", "n": {"text": 1}}\n{"text": "a", "text": "b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: the key text is there twice"):
        read(DataSpec(files=f"{tmp_path}/a.jsonl"), tmp_path)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: 2 columns are called text; rename"):
        read(DataSpec(files=f"{tmp_path}/a.parquet"), tmp_path)


@pytest.mark.parametrize("key", ["a.b", "te\txt", "t\u00e9xt", "x[0]", "\x1b[2J"])
def test_a_key_may_be_any_name(tmp_path, key):
    """A dot names no nested field, and an escape isn't written to a terminal."""
    (tmp_path / "a.jsonl").write_text(json.dumps({key: "one", "id": "i"}) + "\n")
    as_parquet([{key: "one", "id": "i", "a": {"b": "two"}}], tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        assert read(DataSpec(files=f"{tmp_path}/{name}", text_key=key), tmp_path) == [("one", "", "i")]
        with pytest.raises(ValueError, match="text_key=none") as caught:
            read(DataSpec(files=f"{tmp_path}/{name}", text_key="none"), tmp_path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "b*.jsonl", "c?[!x].jsonl", "d\x1b[31m\n.jsonl", "e\\.jsonl", "f[ab]/g.jsonl"]
)
def test_a_path_that_exists_is_that_path(tmp_path, name, make_rows, jsonl):
    rows = make_rows(4)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    jsonl(tmp_path / name, rows[:3])
    jsonl(tmp_path / "a1.jsonl", rows[3:])
    assert read(DataSpec(files=f"{tmp_path}/{name}"), tmp_path) == expected(rows[:3])
    (tmp_path / name).write_text("{\n")
    with pytest.raises(ValueError, match="line 1") as caught:
        read(DataSpec(files=f"{tmp_path}/{name}"), tmp_path)
    assert str(caught.value).isprintable()


def test_a_glob_below_a_folder_with_brackets_is_a_glob(tmp_path, make_rows, jsonl):
    rows = make_rows(8)
    for folder, part in (("f[1]", rows[:5]), ("f1", rows[5:])):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "x.jsonl", part)
    assert read(DataSpec(files=f"{tmp_path}/f[1]/*.jsonl"), tmp_path) == expected(rows[:5])
    assert read(DataSpec(files=f"{tmp_path}/f[0-9]/*.jsonl"), tmp_path) == expected(rows[5:])


@pytest.mark.parametrize("value", ['""', '"  "', "NaN", "null"])
def test_an_empty_id_is_none(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x", "id": {value}, "source": {value}}}\n')
    assert read(DataSpec(files=f"{tmp_path}/a.jsonl"), tmp_path) == [("x", "", None)]
    as_parquet([json.loads(f'{{"text": "x", "id": {value}}}'), {"text": "y", "id": None}], tmp_path / "b.parquet")
    assert [row[2] for row in read(DataSpec(files=f"{tmp_path}/b.parquet"), tmp_path)] == [None, None]
