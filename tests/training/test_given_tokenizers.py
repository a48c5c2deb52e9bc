"""Runs with tokenizers that others made: what they lose is marked, and what is trained can be exported."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(params=["<b os>", "a:b", "$A", "<s>"])
def words(request, tmp_path, text_file) -> tuple[Path, str]:
    """Whole words, spaces left out; and its BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    vocab = {word: i for i, word in enumerate(["[UNK]", request.param, *sorted({w for t in texts for w in t.split()})])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([request.param])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json", request.param


def test_a_run_marks_approximate_bits_and_its_bos_is_exported(run, words, tmp_path, text_file, capsys):
    transformers = pytest.importorskip("transformers")
    path, bos = words
    code, folder = run(f"data.tokenizer={path}", f'data.bos="{bos}"', "steps=2", "evaluate.every=1")
    assert code == 0 and "~" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["bpb_approximate"] for row in rows if row["kind"] == "eval"] == [True, True]
    assert json.loads((folder / "result.json").read_text())["final_bpb_approximate"] is True
    evaluation = np.load(folder / "eval" / "2.npz")
    texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
    assert abs(evaluation["bytes"].sum() / evaluation["tokens"].sum() - len(texts[0]) / 200) < 0.1
    runpy.run_path(str(SCRIPTS / "export_hf.py"))["export"](folder, tmp_path / "exported", None, torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer.bos_token == bos and tokenizer(texts[0]).input_ids[0] == 1
    assert 1 not in tokenizer(texts[0]).input_ids[1:]


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
