"""Every recipe's fast path traces without a graph break, forward and backward: on the meta device, without a GPU."""

import pytest
import torch
from support import KINDS

pytest.importorskip("triton")

from kernels import backend
from kernels.cross_entropy import triton_impl as cross_entropy
from kernels.gemm import cublaslt_impl
from kernels.pointwise import triton_impl as pointwise_triton
from kernels.quantize import triton_impl as quantize_triton
from launcher.compose import compose
from models.llama import Llama, LlamaConfig
from quant.plan import convert, plan_of

FAST = {
    "quantize": quantize_triton,
    "gemm": cublaslt_impl,
    "cross_entropy": cross_entropy,
    "pointwise": pointwise_triton,
}


# One of each form that the fast path has: none, FP8, E2M1 with square weights to nearest and at random, MS-EDEN and
# rotation, the operators of other block formats (hif4), and shaped rounding.
FORMS = ("bf16", "fp8", "nvidia", "quartet2", "hif4", "quartet2_shaped")
REST = [name for name in KINDS if name not in FORMS]


@pytest.mark.parametrize("recipe", [*FORMS, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_fast_path_traces_as_one_graph_per_region(recipe, monkeypatch):
    monkeypatch.setattr(backend, "IMPL", FAST)
    torch.compiler.reset()
    rng = torch.zeros(3, dtype=torch.int64, device="meta")
    with torch.device("meta"):
        model = Llama(LlamaConfig(layers=1, width=128, heads=2, hidden=128, vocab_size=256, max_seq_len=64))
        tokens = torch.zeros(4, 64, dtype=torch.int64)
    convert(model, plan_of(model, compose([f"quant={recipe}"]).config.quant), rng)
    for module, method in model.regions():
        setattr(module, method, torch.compile(getattr(module, method), backend="aot_eager", fullgraph=True))
    model.hidden(tokens).float().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "lm_head.weight")
