"""What a linear layer multiplies is one class in one file: shown by a product that no file of the package has."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from kernels import backend
from quant import library, products
from quant.held import Plain
from quant.plan import convert, plan_of, quant_linears, unquantized
from quant.price import kind_of
from quant.product import Product
from quant.recipe import Recipe

M, K, N = 64, 32, 48
RNG = torch.tensor([1, 2, 3])


@dataclass(frozen=True)
class MeanSplit(Product):
    """Slots on X - mean, the mean's products in FP32: Y = (X - m) W^T + m W^T, dW = dY^T (X - m) + (sum dY) m^T."""

    slots: Recipe
    name: str = "mean_split"

    is_quantized = True

    @classmethod
    def from_dict(cls, mapping: dict) -> "MeanSplit":
        return cls(library.load(mapping["inner"]))

    def to_dict(self) -> dict:
        return {"name": self.name, "scheme": "mean_split", "slots": self.slots.to_dict()}

    def plain(self) -> Product:
        return self.slots.plain()

    def divisors(self):
        return self.slots.divisors()

    def forward(self, call, x: Tensor, weight: Tensor, keep: bool):
        mean = x.float().mean(0, keepdim=True)
        y, kept = self.slots.forward(call, (x.float() - mean).to(torch.bfloat16), weight, keep)
        return (y.float() + mean @ weight.t()).to(torch.bfloat16), (*kept, Plain(mean)) if keep else ()

    def gradients(self, call, dy: Tensor, needed, kept):
        a, b = self.slots.gradients(call, dy, needed, kept)
        return a, (b, dy)

    def input_gradient(self, call, dy, kept):
        return self.slots.input_gradient(call, dy, kept)

    def weight_gradient(self, call, dy, kept):
        quantized, plain = dy
        dw = self.slots.weight_gradient(call, quantized, kept)
        return dw + plain.float().sum(0).unsqueeze(1) @ kept[2].x


@pytest.fixture
def model(monkeypatch) -> nn.Module:
    monkeypatch.setitem(products.PRODUCTS, "mean_split", MeanSplit)
    backend.use("reference")
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(K, N, bias=False), "lm_head": nn.Linear(K, N, bias=False)})
    return convert(model, plan_of(model, {"name": "mean_split", "scheme": "mean_split", "inner": "nvfp4_rtn"}), RNG)


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    layer.weight.grad = None
    y = layer(leaf)
    y.backward(dy)
    return y.detach().float(), leaf.grad.float(), layer.weight.grad


def error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


def test_a_product_of_its_own_is_planned_converted_and_multiplies(model):
    """On an X whose mean is nearly everything, plain slots lose what the split keeps."""
    assert model["up"].recipe.name == "mean_split" and model["lm_head"].recipe.name == "bf16"
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(M, K, generator=g) + 50 * torch.randn(1, K, generator=g)).bfloat16()
    dy = torch.randn(M, N, generator=g).bfloat16()
    with unquantized(model):
        exact = gradients(model["up"], x, dy)
    split = gradients(model["up"], x, dy)
    model["up"].recipe = model["up"].recipe.slots
    slots = gradients(model["up"], x, dy)
    assert error(split[0], exact[0]) < 0.01 < 0.05 < error(slots[0], exact[0])
    assert torch.equal(split[1], slots[1])
    assert error(split[2], exact[2]) < 0.02 < 0.05 < error(slots[2], exact[2])


def test_it_compiles_without_a_graph_break(model):
    torch.compiler.reset()
    x, dy = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
    eager = gradients(model["up"], x, dy)
    compiled = torch.compile(model["up"], backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    model["up"].weight.grad = None
    y = compiled(leaf)
    y.backward(dy)
    assert torch.equal(y.float(), eager[0]) and torch.equal(model["up"].weight.grad, eager[2])


@pytest.mark.parametrize("name", library.names())
def test_every_recipe_answers_the_questions(name):
    recipe = library.load(name)
    assert recipe.plain() == library.load("bf16") and not recipe.plain().is_quantized
    assert isinstance(recipe.recomputable, bool) and isinstance(recipe.fullgraph, bool)
    assert "name" not in recipe.numerics() and recipe.to_dict()["name"] == name
    assert hash(recipe) == hash(library.load(name)) and library.label(recipe).startswith(name)
    assert all(divisor.number > 0 and divisor.what for divisor in recipe.divisors())
    assert recipe.kept_bytes().inputs <= 2


def test_a_price_is_known_of_what_says_its_bits(model):
    assert kind_of(library.load("fp8_te"), "dgrad").bits == 8
    assert kind_of(library.load("quartet2"), "dgrad").bits == 4
    with pytest.raises(ValueError, match=r"no price is known of mean_split.*gemm_bits"):
        kind_of(model["up"].recipe, "fprop")


def test_layers_are_found_whatever_multiplies_in_them(model):
    assert set(quant_linears(model)) == {"up", "lm_head"}
