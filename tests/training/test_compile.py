"""torch.compile under everything that a run does with its model: the graphs that it needs are all allowed."""

from functools import partial

import pytest
import torch
import torch._dynamo

import kernels
from training.start.build import kernels_tag


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


def test_the_compilers_caches_hear_of_changed_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "triton_impl.py").write_text("PROGRAMS = 1")
    tags = {kernels_tag(), kernels_tag()}
    (tmp_path / "op" / "triton_impl.py").write_text("PROGRAMS = 2")
    assert len(tags) == 1 and kernels_tag() not in tags
