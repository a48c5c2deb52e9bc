"""The `datasets` source on local data, through the code that reads the hub: packaged loaders, folders, save_to_disk."""

import dataclasses
import gzip
import itertools

import pytest

from data.open import open_source
from data.prepare import ensure, prepare
from data.spec import DataSpec
from data.tokens import TokenSet

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """`datasets` keeps converted copies in its cache; not in the home folder of whoever runs the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def rows(make_rows):
    return make_rows(40)


def read(spec: DataSpec, root) -> list[tuple]:
    source = open_source(spec, root)
    return [tuple(row)[:3] for unit in range(source.units) for row in source.rows(unit, 0)]


def expected(rows):
    return [(row["text"], row["source"], row["id"]) for row in rows]


@pytest.mark.parametrize("streaming", [True, False])
def test_json_files_of_several_shards(tmp_path, rows, jsonl, streaming):
    files = [str(jsonl(tmp_path / f"{i}.jsonl", rows[i * 16 : (i + 1) * 16])) for i in range(3)]
    spec = DataSpec(source="hub", hub_path="json", hub_data_files=files, hub_streaming=streaming)
    assert read(spec, tmp_path) == expected(rows)
    source = open_source(spec, tmp_path)
    if streaming:
        assert source.units == 3
        assert [tuple(row)[:3] for row in source.rows(1, 5)] == expected(rows[21:32])


def test_a_folder_of_parquet_files(tmp_path, rows):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows[:20]).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    datasets.Dataset.from_list(rows[20:]).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    assert read(DataSpec(source="hub", hub_path=str(folder)), tmp_path) == expected(rows)


def test_a_saved_dataset(tmp_path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    assert read(DataSpec(source="hub", hub_path=str(tmp_path / "set")), tmp_path) == expected(rows)


def test_prepared_tokens_equal_those_of_the_same_files(tmp_path, rows, jsonl, monkeypatch):
    monkeypatch.setattr("data.parts.PART_CHARACTERS", 5000)
    file = str(jsonl(tmp_path / "t.jsonl", rows))
    local = DataSpec(files=file, vocab_size=300, val_fraction=0.2, workers=1)
    hub = dataclasses.replace(local, files=None, source="hub", hub_path="json", hub_data_files=file)
    one, other = (TokenSet(prepare(spec, tmp_path / "out")) for spec in (local, hub))
    assert one.fingerprint == other.fingerprint and one.path != other.path


def test_the_papers_rule_and_a_row_limit_on_a_streamed_set(tmp_path, jsonl):
    from data.split import paper_val_documents

    rows = [{"text": f"text number {i}"} for i in range(2500)]
    file = str(jsonl(tmp_path / "t.jsonl", rows))
    spec = DataSpec(source="hub", hub_path="json", hub_data_files=file, id_key=None, source_key=None, vocab_size=260)
    spec = dataclasses.replace(spec, val_rule="paper", max_documents=2100, workers=1)
    tokens = TokenSet(prepare(spec, tmp_path / "out"))
    splits = tokens.manifest["splits"]
    assert (splits["val"]["documents"], splits["train"]["documents"]) == (2, 2098)
    assert len(paper_val_documents(2100, 2357)) == 2


def test_changed_files_change_the_fingerprint(tmp_path, rows, jsonl):
    spec = DataSpec(source="hub", hub_path="json", hub_data_files=str(tmp_path / "*.jsonl"))
    prints = []
    for last in (30, 31):
        jsonl(tmp_path / "t.jsonl", rows[:last])
        prints.append(open_source(spec, tmp_path).fingerprint())
    assert prints[0] != prints[1]


def test_the_loader_and_the_files_it_takes_of_a_folder_are_part_of_the_fingerprint(tmp_path, rows, jsonl):
    folder = tmp_path / "set"
    folder.mkdir()
    file = str(jsonl(folder / "a.jsonl", rows[:20]))
    jsonl(folder / "b.jsonl", rows[20:])
    local = DataSpec(source="hub", hub_data_files=file)
    kinds = [dataclasses.replace(local, hub_path=loader) for loader in ("json", "text")]
    chosen = [
        DataSpec(source="hub", hub_path=str(folder), hub_data_files=name) for name in ("a.jsonl", "b.jsonl", None)
    ]
    prints = [open_source(spec, tmp_path).fingerprint() for spec in (*kinds, *chosen)]
    assert all(one != other for one, other in itertools.combinations(prints, 2))
    assert read(chosen[1], tmp_path) == expected(rows[20:])


@pytest.mark.parametrize("field", [{"hub_split": "test"}, {"hub_data_files": "a.arrow"}, {"hub_name": "en"}])
def test_a_saved_dataset_takes_no_choice_of_parts(tmp_path, rows, field):
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"is one split that save_to_disk wrote, read as it is: leave out"):
        read(DataSpec(source="hub", hub_path=str(tmp_path / "set"), **field), tmp_path)


def test_a_cut_off_first_file_is_one_clear_error(tmp_path, rows, jsonl):
    packed = gzip.compress(jsonl(tmp_path / "a.jsonl", rows).read_bytes())
    (tmp_path / "b.json.gz").write_bytes(packed[: len(packed) // 2])
    spec = DataSpec(source="hub", hub_path="json", hub_data_files=f"{tmp_path}/b.json.gz")
    with pytest.raises(ValueError, match=r"datasets could not open data\.hub_path=json .*EOFError"):
        read(spec, tmp_path)


def test_a_missing_set_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"datasets could not open data\.hub_path=nobody/nothing"):
        read(DataSpec(source="hub", hub_path="nobody/nothing"), tmp_path)


def test_without_a_network_the_commit_must_be_given(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    spec = DataSpec(source="hub", hub_path="org/name", workers=1)
    with pytest.raises(RuntimeError, match=r"which commit org/name is at .*no route.*data\.path=.*data\.hub_revision="):
        ensure(spec, tmp_path)
    # With the commit, neither the hub nor the data set is touched to see that tokens are missing.
    with pytest.raises(
        FileNotFoundError, match=r"large \(on the hub\).*\n.*prepare_data\.py data=text data\.source=hub"
    ):
        ensure(dataclasses.replace(spec, hub_revision="0" * 40), tmp_path)


def test_a_broken_connection_says_that_it_can_go_on(tmp_path, rows, jsonl, monkeypatch):
    file = str(jsonl(tmp_path / "t.jsonl", rows))
    source = open_source(DataSpec(source="hub", hub_path="json", hub_data_files=file), tmp_path)

    def broken(_):
        yield from rows[:3]
        raise TimeoutError("the hub went away")

    monkeypatch.setattr("data.hub._load", lambda spec: type("Set", (), {"num_shards": 1, "__iter__": broken})())
    received = []
    with pytest.raises(
        RuntimeError,
        match=r"reading json failed \(TimeoutError: the hub went away\); where it was the network, run the",
    ):
        received += [received.append(row) for row in source.rows(0, 0)]
    assert [tuple(row)[:3] for row in received] == expected(rows[:3])


def test_wrong_text_key_names_the_columns(tmp_path, rows, jsonl):
    file = str(jsonl(tmp_path / "t.jsonl", rows))
    spec = DataSpec(source="hub", hub_path="json", hub_data_files=file, text_key="body")
    with pytest.raises(ValueError, match=r"data\.text_key=body; the row's keys are text, source, id"):
        read(spec, tmp_path)


def mixed(tmp_path, kind: str, second: dict) -> list[str]:
    """Two files of a data set; the second one's rows are `second`."""
    files = []
    for name, row in (("a", {"text": "one", "n": 1}), ("b", second)):
        files.append(f"{tmp_path}/{name}.{kind}")
        whole = datasets.Dataset.from_list([row] * 3)
        whole.to_parquet(files[-1]) if kind == "parquet" else whole.to_json(files[-1])
    return files


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize(
    ("second", "what"),
    [
        ({"text": "two", "n": "x"}, r"column n is string in .*b\.\w+ and int64 in .*a\."),
        ({"text": "two", "m": 1}, r"column m is int64 in .*b\.\w+ and missing in .*a\."),
    ],
)
def test_files_of_mixed_columns_name_the_file_and_the_column(tmp_path, kind, second, what, streaming):
    files = mixed(tmp_path, kind, second)
    spec = DataSpec(source="hub", hub_path=kind, hub_data_files=files, hub_streaming=streaming)
    with pytest.raises(ValueError, match=what) as caught:
        read(spec, tmp_path)
    assert "network" not in str(caught.value) and "\n" not in str(caught.value)
    if kind == "json":  # the way out that the message names
        assert len(read(DataSpec(files=files), tmp_path)) == 6


@pytest.mark.parametrize("streaming", [True, False])
def test_a_damaged_file_of_a_set_is_named_without_a_network(tmp_path, streaming):
    files = mixed(tmp_path, "parquet", {"text": "two", "n": 1})
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-9])
    spec = DataSpec(source="hub", hub_path="parquet", hub_data_files=files, hub_streaming=streaming)
    with pytest.raises(ValueError, match=r"b\.parquet is cut off or damaged") as caught:
        read(spec, tmp_path)
    assert "network" not in str(caught.value)


def test_bad_rows_of_a_data_set_can_be_left_out(tmp_path, rows, jsonl):
    bad = [{**row, "text": None if i == 2 else row["text"]} for i, row in enumerate(rows)]
    file = str(jsonl(tmp_path / "t.jsonl", bad))
    spec = DataSpec(source="hub", hub_path="json", hub_data_files=file)
    with pytest.raises(ValueError, match=r"t\.jsonl, row 3: no text .*found null .*data\.bad_rows=skip"):
        read(spec, tmp_path)
    found = read(dataclasses.replace(spec, bad_rows="skip"), tmp_path)
    assert [row[0] for row in found] == [row["text"] or "" for row in bad]


def test_a_file_whose_name_is_a_glob_is_that_file(tmp_path, rows, jsonl):
    for name, part in (("t[1].jsonl", rows[:5]), ("t1.jsonl", rows[5:])):
        jsonl(tmp_path / name, part)
    spec = DataSpec(source="hub", hub_path="json", hub_data_files=f"{tmp_path}/t[1].jsonl")
    assert read(spec, tmp_path) == expected(rows[:5])
