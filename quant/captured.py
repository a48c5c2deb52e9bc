"""Any recipe on captured tensors: the errors of a layer's operands, and of the three products made of them.

W, X and dY of a layer come from a run (training/capture.py). What the recipe makes of Y = X W^T,
dX = dY W and dW = dY^T X is compared with the products of the BF16 tensors in FP64. An error is
|a - g q|^2 / |a|^2 at the gain g = <a, q> / <q, q> for which it is smallest: a scale that is off by
one factor everywhere costs nothing in training. Y and dX are rounded to BF16, which alone is 1e-6.

What a recipe fits to its inputs (quant/products/shaped.py) is fitted on the first half of the tokens
and measured on the second; other recipes are measured on all.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quant.decompose import decompose
from quant.linear import QuantLinear
from quant.plan import Entry, Precision, resolve
from quant.product import Product
from quant.products.shaped import DAMPING
from quant.stats import slot_stats

PRODUCTS = ("y", "dx", "dw")


def skeleton(linears: Mapping[str, tuple[int, int]]) -> nn.Module:
    """A model's linear layers under their names, {name: (rows, columns)}, without storage."""
    model = nn.Module()
    for name, (rows, columns) in linears.items():
        *path, last = name.split(".")
        place = model
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, nn.Linear(columns, rows, bias=False, device="meta"))
    return model


def entries(precision: Precision, linears: Mapping[str, tuple[int, int]]) -> dict[str, Entry]:
    """{layer: its recipe, and why}: rules and blocks in BF16 count as in the model the layers come
    from. ValueError where a rule or a shape doesn't fit it."""
    return {entry.name: entry for entry in resolve(skeleton(linears), precision).entries}


def measure(
    recipe: Product, index: int, step: int, w: Tensor, x: Tensor, dy: Tensor
) -> dict[str, dict[str, dict[str, float]]]:
    """{"slots": {slot: error, gain and quant.decompose.NAMES}, "products": {y, dx, dw: error, gain}}.

    w [N, K], x [M, K], dy [M, N], BF16. A slot that starts from what fprop made has its own error on
    top of that one. index, step: of the random bits. Slots are empty for a product that has none.
    """
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight = nn.Parameter(w.float())
    layer = recipe.build(linear, index, torch.tensor([0, step, 0])).eval()
    if layer.fitted():
        half = len(x) // 2
        fit(layer, w, x[:half])
        x, dy = x[half:], dy[half:]
    x = x.clone().requires_grad_()
    made: dict[str, Tensor] = {}

    def run() -> None:
        made["y"] = layer(x)
        made["y"].backward(dy)

    slots = slot_stats(layer, run, decompose).get("", {})
    made |= {"dx": x.grad, "dw": linear.weight.grad}
    wide = {"w": w.double(), "x": x.detach().double(), "dy": dy.double()}
    exact = {
        "y": wide["x"] @ wide["w"].t(),
        "dx": wide["dy"] @ wide["w"],
        "dw": wide["dy"].t() @ wide["x"],
    }
    return {
        "slots": {slot: of_operand(found) | found for slot, found in slots.items()},
        "products": {name: compared(exact[name], made[name].detach().double()) for name in PRODUCTS},
    }


def fit(layer: QuantLinear, w: Tensor, x: Tensor) -> None:
    """Fill a layer's feedback matrices: F_w by X^T X, F_x by W^T W."""
    for name, target in layer.fitted().items():
        seen = (w if name == "x" else x).double()
        target.copy_(layer.refitted(name, seen.t() @ seen, DAMPING))


def compared(exact: Tensor, made: Tensor) -> dict[str, float]:
    """The error after the best gain, and that gain; FP64. NaN of what isn't finite or is all zero."""
    products = (exact * made).sum(), exact.square().sum(), made.square().sum()
    cross, energy, size = map(float, products)
    if not energy > 0 or not size > 0:
        return {"error": float("nan"), "gain": float("nan")}
    return {"error": 1 - cross * cross / (energy * size), "gain": cross / size}


def of_operand(terms: Mapping[str, float]) -> dict[str, float]:
    """The same of an operand, from its terms: with |x| = 1 <x, q> is 1 + align, |q|^2 follows."""
    cross = 1 + terms["align"]
    size = terms["mse"] + 2 * cross - 1
    return {"error": 1 - cross * cross / size, "gain": cross / size}


def errors(found: Mapping[str, Any]) -> dict[str, float]:
    """{slot or product: error} of what `measure` found."""
    return {name: part["error"] for name, part in (found["slots"] | found["products"]).items()}


def mean(rows: list[Mapping[str, float]]) -> dict[str, float]:
    """Of each name that all rows have."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}
