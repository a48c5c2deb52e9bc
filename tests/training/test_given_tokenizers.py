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
