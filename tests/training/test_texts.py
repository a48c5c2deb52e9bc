"""Runs on texts and tokenizers of all kinds: losses of text are marked, exports have their BOS, mixtures resume."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from data.prepare import prepare
from data.spec import DataSpec
from data.tokenizer import TextTokenizer
from data.tokens import TokenSet


def script(name: str) -> dict:
    """What a script defines."""
    return runpy.run_path(str(Path(__file__).parents[2] / "scripts" / name))


def word_level(folder: Path, texts: list[str], bos: str) -> Path:
    """Whole words, spaces left out."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for text in texts for word in text.split()})
    vocab = {word: i for i, word in enumerate(["[UNK]", bos, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_run_marks_approximate_bits_and_its_odd_bos_is_exported(run, tmp_path, text_file, capsys):
    transformers = pytest.importorskip("transformers")
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    path, bos = word_level(tmp_path, texts, "<b os:$A>"), "<b os:$A>"
    code, folder = run(f"data.tokenizer={path}", f'data.bos="{bos}"', "steps=2", "evaluate.every=1")
    assert code == 0 and "~" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["bpb_approximate"] for row in rows if row["kind"] == "eval"] == [True, True]
    assert json.loads((folder / "result.json").read_text())["final_bpb_approximate"] is True
    evaluation = np.load(folder / "eval" / "2.npz")
    assert abs(evaluation["bytes"].sum() / evaluation["tokens"].sum() - len(texts[0]) / 200) < 0.1
    script("export_hf.py")["export"](folder, tmp_path / "exported", None, "float32", 5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer.bos_token == bos
    assert [i for i, number in enumerate(tokenizer(texts[0]).input_ids) if number == 1] == [0]


@pytest.mark.parametrize("bos", ["<s>", "<b os>", "a:b", "$A", "B:1 $B"])
def test_any_bos_can_be_exported(tmp_path, bos):
    from tokenizers import Tokenizer

    path = word_level(tmp_path, ["one two"], bos)
    (tmp_path / "out").mkdir()
    script("export_hf.py")["export_tokenizer"](TextTokenizer(path, bos), tmp_path / "out", 64)
    exported = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert exported.encode("one two").ids == [1, 2, 3] and exported.encode("one", "two").ids == [1, 2, 1, 3]


def test_copies_of_validation_text_are_shown_and_recorded(run, tmp_path, text_file, capsys):
    rows = text_file.read_text().splitlines()
    (tmp_path / "v.jsonl").write_text("\n".join(rows[:9]))
    twice = [json.dumps({"text": json.loads(row)["text"]}) for row in rows[:2]]
    (tmp_path / "t.jsonl").write_text("\n".join(rows[9:] + twice))
    files = [f"data.files={tmp_path}/t.jsonl", f"data.val_files={tmp_path}/v.jsonl", "steps=1"]
    _, folder = run(*files)
    assert "(2 train rows are copies of validation rows)" in capsys.readouterr().out
    assert json.loads((folder / "run.json").read_text())["copies_of_val"] == 2
    _, folder = run(*files, "data.val_copies=drop", name="dropped")
    assert "are copies" not in capsys.readouterr().out
    assert "copies_of_val" not in json.loads((folder / "run.json").read_text())


def test_a_mixture_goes_on_as_if_it_had_not_stopped(run, stop_after, mix, mixed_folders):
    _, straight = run(*mix, name="straight")
    with stop_after(6):
        run(*mix, name="stopped")
    _, stopped = run(*mix, name="stopped")
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (straight, stopped)
    ]
    trained = [{r["step"]: (r["samples"], r["loss"]) for r in part if r["kind"] == "train"} for part in rows]
    assert trained[0] == trained[1] and len(trained[0]) == 10
    info = json.loads((straight / "run.json").read_text())
    assert info["mixture"].startswith("75 % t0-") and info["data_fingerprint"] != TokenSet(mixed_folders[0]).fingerprint


def test_named_texts_are_scored_beside_the_validation_text(run, tmp_path, text_file, token_folder, capsys):
    """With the losses that a run has whose own validation text they are; rows, results and screen have their names."""
    lines = text_file.read_text().splitlines()
    _, alone = run(name="alone")
    own = Path(json.loads((alone / "run.json").read_text())["data_path"])
    (tmp_path / "o.jsonl").write_text("\n".join(lines[:20]))
    spec = DataSpec(files=f"{tmp_path}/o.jsonl", tokenizer=f"{own}/tokenizer.json", val_fraction=0.3, workers=1)
    other = prepare(spec, tmp_path / "other")
    sets = f"data.val_sets={{own: {own}, other: {other}}}"
    _, folder = run(sets, "evaluate.tokens=128", name="named")
    text = capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evals = [row for row in rows if row["kind"] == "eval"]
    assert [row["loss/own"] == row["loss"] and row["se/own"] == row["se"] for row in evals] == [True, True]
    assert all(row["loss/other"] != row["loss"] for row in evals) and "  other: " in text
    result = json.loads((folder / "result.json").read_text())
    assert (
        result["final_loss/own"]
        == result["final_loss"]
        == json.loads((alone / "result.json").read_text())["final_loss"]
    )
    assert result["final_bpb/other"] > 0
    whole, first = (np.load(folder / "eval" / "other" / f"{step}.npz")["tokens"].sum() for step in (10, 5))
    assert whole == TokenSet(other).split("val").length - 1 and first == 128
    info, plain = (json.loads((one / "run.json").read_text()) for one in (folder, alone))
    assert info["val_sets"]["other"] == TokenSet(other).fingerprint and info["hash"] == plain["hash"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data.val_sets={a: nowhere}", r"data\.val_sets\.a=nowhere is no token folder"),
        ("data.val_sets=[nowhere]", r"needed are names and folders"),
        ("data.val_sets={1: nowhere}", r"the name '1' must begin with a letter"),
        ("data.val_sets={a: FOLDER}", r"data\.val_sets\.a: .* has another tokenizer"),
    ],
)
def test_named_texts_that_cannot_be_scored_are_refused_before_training(run, tmp_path, text_file, words, message):
    if "FOLDER" in words:
        spec = DataSpec(files=str(text_file), vocab_size=280, val_fraction=0.3, workers=1)
        words = words.replace("FOLDER", str(prepare(spec, tmp_path / "other")))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(words)
