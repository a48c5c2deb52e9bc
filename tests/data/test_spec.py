"""Every data YAML composes to a valid DataSpec; wrong values are refused; overrides() gives the same spec again."""

import shlex

import pytest

from data.spec import DataSpec
from launcher.compose import compose

NEEDS = {"text": ["data.files=a.txt"], "hub": ["data.hub_path=org/name"]}


@pytest.mark.parametrize("name", ["pydocs", "text", "c4", "fineweb_edu", "hub"])
def test_yaml_composes(name):
    spec = compose([f"data={name}", *NEEDS.get(name, [])]).config.data
    spec.check()
    assert spec.name == name and spec.source == {"text": "files", "pydocs": "pydocs"}.get(name, "hub")


def test_the_files_of_a_hub_data_set_can_be_here_already():
    assert compose(["data=c4", "data.source=files", "data.files=c4/*.json.gz"]).config.data.hub_path == "allenai/c4"


def test_c4_and_fineweb_are_the_published_protocols():
    c4, fineweb = (compose([f"data={name}"]).config.data for name in ("c4", "fineweb_edu"))
    assert (c4.hub_path, c4.hub_name, c4.val_rule, c4.split_seed, c4.vocab_size) == (
        "allenai/c4",
        "en",
        "paper",
        2357,
        32000,
    )
    assert (fineweb.vocab_size, fineweb.packing, fineweb.hub_path) == (
        65536,
        "bos_bestfit",
        "HuggingFaceFW/fineweb-edu",
    )


@pytest.mark.parametrize(
    "spec",
    [
        DataSpec(
            files="corpus/train-*.jsonl.zst",
            val_files=["a b.jsonl", "c.jsonl"],
            bos="<s>",
            tokenizer="t.json",
            id_key=None,
        ),
        DataSpec(files="a.txt", val_sets={"web": "a b/c", "code-2": "$d"}),
        DataSpec(source="hub", hub_path="org/name", hub_streaming=False, val_fraction=0.25, name="it's"),
    ],
)
def test_overrides_give_the_same_spec_through_shell_and_hydra(spec):
    words = shlex.split(" ".join(spec.overrides()))
    assert compose(words).config.data == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "web"}, r"data\.source='web' is none of files, hub, pydocs"),
        ({"val_rule": "half"}, r"data\.val_rule='half' is none of hash, paper"),
        ({"packing": "tight"}, r"data\.packing='tight' is none of stream, bos_bestfit"),
        ({"files": None}, r"data\.files is empty: give a path"),
        ({"source": "hub", "files": None}, r"data\.hub_path is empty"),
        ({"source": "pydocs"}, r"data\.files is given, but data\.source=pydocs doesn't read it; add data=text"),
        (
            {"source": "pydocs", "files": None, "val_files": "v.txt"},
            r"data\.val_files is given.*add data=text data\.files",
        ),
        ({"source": "pydocs", "files": None, "hub_path": "a/b"}, r"data\.hub_path is given.*add data=hub"),
        ({"source": "hub", "hub_path": "a/b"}, r"data\.files is given.*add data\.source=files"),
        ({"bos": "<s>"}, r"data\.bos=<s> has no effect without a tokenizer; add data\.tokenizer"),
        ({"bad_rows": "warn"}, r"data\.bad_rows='warn' is none of error, skip"),
        ({"val_copies": "yes"}, r"data\.val_copies='yes' is none of keep, drop"),
        ({"vocab_size": 256}, r"data\.vocab_size=256: a byte-level BPE needs 257"),
        ({"val_fraction": 1.0}, r"data\.val_fraction=1\.0 must lie between 0 and 1"),
        ({"shard_tokens": 0}, r"data\.shard_tokens=0 must be 1 or more"),
        ({"workers": -1}, r"data\.workers=-1 must be 0 or more"),
    ],
)
def test_wrong_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DataSpec(**{"files": "a.txt", **change}).check()
