"""Recipes that nobody published: whatever the schema accepts computes its three products, alike on all back ends.

A slot left out of a rotation, a scale applied twice or a factor 1/dim too many is an error of 1 or more; the worst
legal quantizers together leave less than half.
"""

import random
import re

import pytest
import torch
from torch import Tensor, nn

from kernels import backend
from quant.linear import QuantLinear
from quant.names import SLOTS
from quant.product import Product
from quant.products import PRODUCTS
from quant.recipe import OPERANDS, Recipe

OTHERS = (["1x32 e8m0"], ["1x32 e8m0"], ["1x16 ue5m3"], ["tensor fp32", "1x16 ue5m3"])
GRIDS = (*["none"] * 2, *["e2m1"] * 8, "e4m3", "e5m2", "int4", "if4", "sfp4", "po2_mix", "po4_gauss", "gridflip")
GRIDS += ("hif4",)
SCHEMES = [None, None, None, "mean_split", "trust_mask"]
COUNT, WORST = 120, 0.45
M, K, N = 128, 128, 256
REFERENCE, PACKED = {"quantize": "reference", "gemm": "reference"}, {"quantize": "reference", "gemm": "packed_emulated"}


def random_operand(draw: random.Random, slot: str) -> dict:
    grid = draw.choice(GRIDS)
    operand = {"grid": grid, "tensor_scale": draw.choice(["fp32", "pow2"])}
    if grid == "hif4":
        operand["tensor_scale"] = "fp32"
    elif grid not in ("none", "e4m3", "e5m2"):
        operand["scales"] = draw.choice([*[["tensor fp32", "1x16 e4m3"], ["tensor fp32", "16x16 e4m3"]] * 2, *OTHERS])
        operand["rounding"] = draw.choice(["rtn", "sr", "ms_eden"])
        operand["select"] = draw.choice(["absmax", "absmax", "four_over_six", "search"])
        if operand["scales"] == ["1x32 e8m0"] or draw.random() < 0.05:
            operand["scale_rule"] = draw.choice(["floor", "even", "ceil", "rms"])
            operand["prescale"] = draw.choice([1.0, 1.0, 0.75])
            operand["macro_bits"] = draw.choice([None, None, 5])
        operand["eden_block"] = draw.choice([16, "rotation"])
    elif grid != "none":
        operand["scales"] = draw.choice([["tensor fp32"], ["row fp32"]])
    if slot in ("dgrad.w", "wgrad.x"):
        operand["source"] = draw.choice(["input", "fprop", "fprop_transposed"])
    return operand


def random_recipe(draw: random.Random, refused: list[str]) -> Product:
    """The first of the mappings drawn that is legal, for one in five within a scheme if that takes it; what is refused
    says what to type, in `refused`."""
    while True:
        mapping = {"name": "random"}
        for gemm, names in OPERANDS.items():
            dims = [None, None, 16, 32, 128] if gemm != "fprop" else [None, None, None, 16]
            rotation = {"dim": draw.choice(dims), "signs": draw.choice(["random", "fixed", "none"])}
            rotation["rounds"] = draw.choice([1, 1, 2, 3, "auto"])
            mapping[gemm] = {"rotation": rotation} | {n: random_operand(draw, f"{gemm}.{n}") for n in names}
        for scheme in dict.fromkeys((draw.choice(SCHEMES), None)):
            try:
                return PRODUCTS[scheme].from_dict(mapping) if scheme else Recipe.from_dict(mapping)
            except ValueError as error:
                refused.append(str(error))
                assert re.search(r"\b(use|set|leave|takes?|needs?|give|choose)\b", str(error)), error


@pytest.fixture
def products():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).bfloat16()
    w = torch.randn(N, K, generator=generator) * 0.05
    dy = (torch.randn(M, N, generator=generator) * 1e-3).bfloat16()

    def run(recipe: Product, back_end: dict[str, str]) -> tuple[Tensor, Tensor, Tensor]:
        backend.use(back_end, "cpu")
        linear = nn.Linear(K, N, bias=False)
        linear.weight.data.copy_(w)
        leaf = x.clone().requires_grad_()
        y = QuantLinear(linear, recipe, 7, torch.tensor([5, 6, 7]))(leaf)
        y.backward(dy)
        return y.detach(), leaf.grad, linear.weight.grad

    yield (
        run,
        (x.double() @ w.bfloat16().double().t(), dy.double() @ w.bfloat16().double(), dy.double().t() @ x.double()),
    )
    backend.use("reference")


def test_legal_recipes_compute_their_products_alike_on_all_back_ends(products):
    run, exact = products
    draw, seen, refused = random.Random(0), set(), []
    for _ in range(COUNT):
        recipe = random_recipe(draw, refused)
        specs = [recipe.operand(slot).spec for slot in SLOTS]
        seen |= {spec.grid for spec in specs} | {spec.scale_rule for spec in specs} | {spec.select for spec in specs}
        found = run(recipe, REFERENCE)
        errors = [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]
        assert max(errors) < WORST, (errors, recipe.to_dict())
        try:
            packed = run(recipe, PACKED)
        except ValueError as error:  # what one operand's format is not made for is said, not computed
            assert "is NVFP4, the" in str(error), recipe.to_dict()
            continue
        assert all(torch.equal(a, b) for a, b in zip(found, packed, strict=True)), recipe.to_dict()
    assert {*GRIDS, "floor", "even", "ceil", "rms", "search"} - seen == {"gridflip"}  # no other is never legal
    assert len({re.sub(r"quant\S+|\d\S*", "", text) for text in refused}) >= 40  # kinds of refusals
