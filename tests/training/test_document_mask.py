"""batch.document_mask: what a token sees, that evaluation and a reopened run see the same, and who refuses it."""

import json
from pathlib import Path

import pytest
import torch

from launcher.compose import stored
from models.llama import Llama, LlamaConfig
from training.ranks.distributed import setup
from training.reopen import reopen

BOS = 0
FIRST, SECOND, OTHER = ([BOS, *torch.randint(1, 50, (n,)).tolist()] for n in (9, 13, 9))
QUICK = ["steps=3", "evaluate.every=null", "checkpoint.every=null"]


@pytest.fixture(params=[None, 1], ids=["heads", "grouped"])
def model(request):
    config = LlamaConfig(layers=2, width=64, heads=2, hidden=64, vocab_size=50, max_seq_len=64, kv_heads=request.param)
    built = Llama(config, compute_dtype=torch.float32)
    built.init_weights(0)
    for parameter in built.parameters():  # larger, so that attention counts
        parameter.data.mul_(3.0)
    return built.eval()


@torch.no_grad()
def logits(model, *documents: list[int]) -> torch.Tensor:
    """[T, V] of one row."""
    return model(torch.tensor([[token for document in documents for token in document]]))[0]


def test_a_token_sees_its_own_document_alone(model):
    seen = logits(model, FIRST, SECOND)[-len(SECOND) :], logits(model, OTHER, SECOND)[-len(SECOND) :]
    assert (seen[0] - seen[1]).abs().max() > 1e-2
    model.document_start = BOS
    alone = logits(model, SECOND)
    behind, other = (logits(model, first, SECOND)[-len(SECOND) :] for first in (FIRST, OTHER))
    assert torch.equal(behind, other)
    assert (behind - alone).abs().max() < 1e-5  # RoPE's angles are rounded at other positions
    assert torch.equal(logits(model, FIRST, SECOND)[: len(FIRST)], logits(model, FIRST, OTHER)[: len(FIRST)])
    cut = logits(model, FIRST[4:], SECOND)  # a row that begins within a document
    assert (cut[: len(FIRST) - 4] - logits(model, FIRST[4:])).abs().max() < 1e-5


def test_one_document_a_row_gives_what_no_mask_gives(model):
    plain = logits(model, SECOND)
    model.document_start = BOS
    assert (logits(model, SECOND) - plain).abs().max() < 1e-5


def test_training_and_evaluation_are_masked_and_a_reopened_run_is_again(run, rows):
    _, plain = run(*QUICK, name="plain")
    _, masked = run(*QUICK, "batch.document_mask=true", "recompute=true", name="masked")
    first, other = (rows(folder, "train")[0] for folder in (plain, masked))
    assert first["samples"] == other["samples"] and first["grad_norm"] != other["grad_norm"]
    described = json.loads((masked / "run.json").read_text())
    assert described["numerics"]["batch.document_mask"] is True
    assert "batch.document_mask" not in json.loads((plain / "run.json").read_text())["numerics"]
    for folder, is_masked in ((plain, False), (masked, True)):
        info = json.loads((folder / "run.json").read_text())
        bos = json.loads(Path(info["data_path"], "manifest.json").read_text())["tokenizer"]["bos_id"]
        model = reopen(stored(folder / "config.yaml"), info, 3, setup()).model
        assert model.document_start == (bos if is_masked else None)


@pytest.mark.parametrize("model", ["nanochat_560m", "ngpt_30m"])
def test_models_that_cannot_take_it_say_why_before_any_work(run, tmp_path, model):
    words = [f"model={model}", "batch.document_mask=true", "batch.seq_len=64", "batch.micro=null"]
    words += ["optim=muon", "optim.lr=null"] if model.startswith("nano") else []
    with pytest.raises(ValueError, match=rf"batch\.document_mask=true.*model={model}"):
        run(*words, "model.layers=2", "model.width=128", "model.heads=2", "model.hidden=128")
    assert not (tmp_path / "runs").exists()
