"""torch.compile under everything that a run does with its model: the graphs that it needs are all allowed."""

from functools import partial

import pytest
import torch
import torch._dynamo


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without code generation: quick, and as many graphs as on a GPU."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's own, whatever ran before
        yield
    torch._dynamo.reset()


# Without the BF16 evaluation there are fewer graphs of the same kinds.
@pytest.mark.parametrize("bf16", [pytest.param("evaluate.bf16=false", marks=pytest.mark.slow), "evaluate.bf16=true"])
def test_every_kind_of_evaluation_and_layer_is_compiled(run, traced, bf16):
    """Training, evaluation and an odd last batch; first, middle and BF16 blocks; quantized and not: more than eight."""
    words = ["quant=fp8", "quant.high_precision.last=1", "model.layers=3", "compile=true", bf16]
    code, folder = run(*words, "steps=2", "evaluate.every=1", "evaluate.tokens=512", "evaluate.final_tokens=832")
    assert code == 0 and (folder / "result.json").exists()
