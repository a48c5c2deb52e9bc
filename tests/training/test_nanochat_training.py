"""The nanochat model through the trainer's parts: one compiled graph, with a recipe, and its rows of nats."""

import torch

from kernels import backend
from models.nanochat import NanochatConfig
from quant.library import mapping
from quant.plan import plan_of
from training.loss import LossModel
from training.start.build import build_model
from training.start.shapes import model_of

SHAPE = NanochatConfig(layers=2, width=128, heads=1, hidden=256, vocab_size=300, max_seq_len=128)


def loss_model(recipe: str) -> LossModel:
    backend.use("reference", "cpu")
    with torch.device("meta"):
        plan = plan_of(model_of(SHAPE), mapping(recipe))
    model, _ = build_model(SHAPE, plan, 0, torch.zeros(3, dtype=torch.int64))
    with torch.no_grad():
        model.blocks[1].mlp.down.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return LossModel(model)


def test_one_graph_with_the_same_loss_and_gradients():
    tokens = torch.randint(0, 300, (2, 129), generator=torch.Generator().manual_seed(0))
    plain, compiled = loss_model("nvfp4_rtn"), loss_model("nvfp4_rtn")
    compiled.compile(
        fullgraph=True, dynamic=False, backend="eager"
    )  # the graph is the point; quartet2 agrees too, in minutes
    losses = [model(tokens) for model in (plain, compiled)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    for (name, a), (_, b) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert plain.model.blocks[0].attn.q.weight.grad is not None


def test_rows_of_nats_add_up_to_the_loss_and_start_near_uniform():
    tokens = torch.randint(0, 300, (2, 129), generator=torch.Generator().manual_seed(0))
    model = loss_model("bf16")
    with torch.no_grad():
        rows = model(tokens, per_token=True)
        torch.testing.assert_close(rows.sum(), model(tokens))
    # lm_head starts at a standard deviation of .001: logits of about .001 sqrt(128), loss ln(300).
    assert rows.shape == (2, 128) and abs(rows.mean() - torch.log(torch.tensor(300.0))) < 0.01
