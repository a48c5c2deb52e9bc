"""The packed path of the 4-bit tensor cores, its product emulated, trains bitwise as the emulated path does."""

import pytest
import torch
from support import FP4_RECIPES
from torch import nn

from kernels import backend
from kernels.gemm import packed_emulated_impl
from quant import library
from quant.linear import QuantLinear

WIDTH, HIDDEN, TOKENS = 128, 256, 128
CPU = {"quantize": "reference", "gemm": "reference", "cross_entropy": "reference"}
CUDA = {"quantize": "triton", "gemm": "cublaslt", "cross_entropy": "reference"}


class Block(nn.Module):
    """Two quantized linear layers with a non-linearity between them: FP32 residual, BF16 into the linears."""

    def __init__(self, recipe: str, rng: torch.Tensor):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList()
        for index, (n, k) in enumerate(((HIDDEN, WIDTH), (WIDTH, HIDDEN))):
            linear = nn.Linear(k, n, bias=False)
            linear.weight.data = torch.randn(n, k, generator=generator) * k**-0.5
            self.layers.append(QuantLinear(linear.to(rng.device), library.load(recipe), index, rng))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(self.layers[0](x.to(torch.bfloat16)))
        return x + self.layers[1](hidden).float()


def train(recipe: str, device: str, steps: int = 3) -> list[torch.Tensor]:
    """Losses, input gradients and final weights of a few steps."""
    rng = torch.tensor([1, 0, 0], device=device)
    block = Block(recipe, rng)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(5)
    out = []
    for step in range(steps):
        rng.copy_(torch.tensor([1, step, 0]))
        x = torch.randn(TOKENS, WIDTH, generator=generator).to(device).requires_grad_()
        loss = block(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out += [loss.detach(), x.grad]
    return out + [parameter.detach() for parameter in block.parameters()]


def compare(recipe: str, device: str, plain: dict[str, str], monkeypatch) -> None:
    monkeypatch.setattr(backend, "IMPL", {})
    backend.use(plain, device)
    expected = train(recipe, device)
    calls = []
    gemm = packed_emulated_impl.gemm
    monkeypatch.setattr(
        packed_emulated_impl, "gemm", lambda a, b, *rest: calls.append((a.packed, b.packed)) or gemm(a, b, *rest)
    )
    backend.use(plain | {"gemm": "packed_emulated"}, device)
    packed = train(recipe, device)
    assert len(calls) == 3 * 2 * 3 and all(a and b for a, b in calls)
    for ours, wanted in zip(packed, expected, strict=True):
        assert torch.equal(ours, wanted), f"{recipe}: {int((ours != wanted).sum())} of {wanted.numel()} differ"


@pytest.mark.parametrize("recipe", FP4_RECIPES)
def test_packed_path_trains_bitwise_as_the_emulated_path(recipe, monkeypatch):
    compare(recipe, "cpu", CPU, monkeypatch)


def test_packed_path_compiles_into_one_graph(monkeypatch):
    monkeypatch.setattr(backend, "IMPL", {})
    backend.use(CPU | {"gemm": "packed_emulated"})
    rng = torch.tensor([1, 0, 0])
    block = Block("nvfp4_rtn", rng)  # no random bits: their tracing is slow and not the question here
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(5))
    expected = block(x)
    assert torch.equal(torch.compile(block, fullgraph=True, backend="eager")(x), expected)


OFTEN = ("nvidia", "quartet2")  # 16x16 codes reused, and codes quantized again


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=pytest.mark.gpu if name in OFTEN else pytest.mark.gpu_long) for name in FP4_RECIPES],
)
def test_packed_path_trains_bitwise_as_the_emulated_path_on_a_gpu(recipe, monkeypatch):
    compare(recipe, "cuda", CUDA, monkeypatch)
