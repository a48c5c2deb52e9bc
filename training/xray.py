"""An X-ray: what quantization does to the gradients of the same tokens at the same weights, layer by layer.

Three gradients: g0 of BF16, gF of the quantized forward with the exact backward through it (what it kept, multiplied
without rounding), gQ as trained. So gF - g0 is the forward's part and gQ - gF the backward's; only random bits can be
averaged away, so only the latter has a bias over draws (the former too, where the forward draws). Twice:

    propagated  each pass runs the whole model: a layer has its own error and those of all others
    local       a layer is fed with X and dY of the pass of gF, so that the error is its own

Random bits are counters, hence draws are other numbers of the micro-batch: none that training uses. Everything is
measured on slices of text, whose amax and tensor scales are the slice's. No gradient is left behind.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import Errors, signal_to_noise
from quant.linear import Call, QuantLinear
from quant.names import GEMMS
from quant.operands import Look
from quant.plan import HEAD, quant_linears, replaced
from quant.product import Product

# Elements of a product that figures are taken from: all layers' are held at once where they are propagated.
KEPT_LOCAL, KEPT = 1 << 20, 1 << 18
Products = dict[str, Tensor]  # GEMM -> elements of its product, FP32


@dataclass(frozen=True)
class View:
    """What is looked at. `slices`: tokens int64 [B, T+1] on the device. `set_rng(number)`: the random state of draw
    `number` of this view. `accumulate(last micro-batch?)`: the context of a forward and its backward."""

    loss: nn.Module
    slices: Sequence[Tensor]
    tokens_per_step: int
    set_rng: Callable[[int], None]
    accumulate: Callable[[bool], AbstractContextManager]

    @property
    def layers(self) -> dict[str, QuantLinear]:
        return {name: layer for name, layer in quant_linears(self.loss.model).items() if name != HEAD}


class Tap(Product):
    """A layer's product as it is; `products` takes from what it computed. `local` is called with (x, weight, dY)."""

    def __init__(self, product: Product, local: Callable[[Tensor, Tensor, Tensor], None] | None = None):
        self.name, self.product, self.products, self.local = product.name, product, {}, local

    def forward(self, call: Call, x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Sequence[Any]]:
        y, kept = self.product.forward(call, x, weight, keep)
        self.products["fprop"] = elements(y, KEPT)
        if self.local:
            self._fed = x, weight
        return y, kept

    def gradients(self, call: Call, dy: Tensor, needed: tuple[bool, bool], kept: Sequence[Any]) -> tuple[Any, Any]:
        if self.local:
            self.local(*self._fed, dy)
            del self._fed
        return self.product.gradients(call, dy, needed, kept)

    def input_gradient(self, call: Call, dy: Any, kept: Sequence[Any]) -> Tensor:
        dx = self.product.input_gradient(call, dy, kept)
        self.products["dgrad"] = elements(dx, KEPT)
        return dx

    def weight_gradient(self, call: Call, dy: Any, kept: Sequence[Any]) -> Tensor:
        dw = self.product.weight_gradient(call, dy, kept)
        self.products["wgrad"] = elements(dw, KEPT)
        return dw


@dataclass
class Gaps:
    """Errors of one layer's products: of the forward's part for each GEMM, and of the backward's."""

    draws: bool  # whether the forward does
    forward: dict[str, Errors] = field(default_factory=lambda: {gemm: Errors() for gemm in GEMMS})
    backward: dict[str, Errors] = field(default_factory=lambda: {gemm: Errors() for gemm in GEMMS[1:]})

    def add(self, plain: Products, exact: list[Products], drawn: list[Products]) -> Tensor:
        """One slice: g0; gF once, or for every draw where the forward draws; gQ. Returns the mean error of dW."""
        for gemm, errors in self.forward.items():
            errors.add([plain[gemm]], [one[gemm] for one in exact])
        means = {
            gemm: errors.add([one[gemm] for one in exact], [one[gemm] for one in drawn])
            for gemm, errors in self.backward.items()
        }
        return means["wgrad"]

    def figures(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """{GEMM: {forward or backward: figures}}."""
        found = {g: {"forward": e.near() | (e.spread() if self.draws else {})} for g, e in self.forward.items()}
        for gemm, errors in self.backward.items():
            found[gemm]["backward"] = errors.near() | errors.spread()
        return found


def xray(view: View, draws: int, others: Mapping[str, Product]) -> dict[str, Any]:
    """{"layers": ..., "what_if": ...} of a row (base/runfolder.py, XRAY). `others`: label -> recipe, whose products of
    the same tensors are measured too; what_if is there with them only."""
    with torch.compiler.set_stance("force_eager"):
        return _Xray(view, draws, others).row()


class _Xray:
    def __init__(self, view: View, draws: int, others: Mapping[str, Product]):
        self.view, self.draws, self.layers = view, draws, view.layers
        self.products = {name: layer.recipe for name, layer in self.layers.items()}
        self.exact = {name: product.exact_backward() for name, product in self.products.items()}
        self.plain = {name: product.plain() for name, product in self.products.items()}
        self.forward_draws = any(product.is_quantized and product.forward_draws for product in self.products.values())
        self.propagated = {name: Gaps(self.forward_draws) for name in self.layers}
        # Of each layer its own recipe, under None, and the others.
        self.recipes = {name: {None: product, **others} for name, product in self.products.items()}
        self.local = {
            name: {label: Gaps(product.forward_draws) for label, product in recipes.items()}
            for name, recipes in self.recipes.items()
        }
        self.looks = {name: Look() for name in self.layers}
        self.weights: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.layers}  # dW, mean error

    def row(self) -> dict[str, Any]:
        for number, tokens in enumerate(self.view.slices):
            self._slice(tokens, number * self.draws)
        found = {"layers": {name: self._layer(name) for name in self.layers}}
        labels = [label for label in next(iter(self.local.values())) if label is not None]
        what_if = {label: {name: gaps[label].figures() for name, gaps in self.local.items()} for label in labels}
        return summary(found["layers"]) | found | ({"what_if": what_if} if labels else {})

    def _slice(self, tokens: Tensor, first: int) -> None:
        plain = self._pass(tokens, first, self.plain)
        exact, drawn = [], []
        for draw in range(self.draws):
            if draw == 0 or self.forward_draws:
                exact.append(self._pass(tokens, first + draw, self.exact, local=draw == 0))
            drawn.append(self._pass(tokens, first + draw, self.products))
        for name, gaps in self.propagated.items():
            mean = gaps.add(plain[name], [one[name] for one in exact], [one[name] for one in drawn])
            self.weights[name].append((exact[0][name]["wgrad"], mean))

    def _pass(self, tokens: Tensor, number: int, products: Mapping[str, Product], local: bool = False) -> dict:
        """{layer: Products} of a forward and backward of the whole model."""
        taps = {name: Tap(product, self._measure(name) if local else None) for name, product in products.items()}
        self.view.set_rng(number)
        with replaced(self.view.loss.model, taps), self.view.accumulate(True):
            (self.view.loss(tokens) / self.view.tokens_per_step).backward()
        self.view.loss.zero_grad(set_to_none=True)
        return {name: tap.products for name, tap in taps.items()}

    def _measure(self, name: str) -> Callable[[Tensor, Tensor, Tensor], None]:
        layer, watch = self.layers[name], None if self.looks[name].slots else self.looks[name]

        def measure(x: Tensor, weight: Tensor, dy: Tensor) -> None:
            plain, fitted = multiply(self.plain[name], Call(layer.rng, layer.layer), x, weight, dy), layer.fitted()
            for label, product in self.recipes[name].items():
                calls = [Call(moved(layer.rng, draw), layer.layer, None, fitted) for draw in range(self.draws)]
                firsts = calls if product.forward_draws else calls[:1]
                exact = [multiply(product.exact_backward(), call, x, weight, dy) for call in firsts]
                if label is None:
                    calls[0] = replace(calls[0], watch=watch)
                drawn = [multiply(product, call, x, weight, dy) for call in calls]
                self.local[name][label].add(plain, exact, drawn)

        return measure

    def _layer(self, name: str) -> dict[str, Any]:
        local, propagated = self.local[name][None].figures(), self.propagated[name].figures()
        gemms = {gemm: {"local": local[gemm], "propagated": propagated[gemm]} for gemm in GEMMS}
        gradients, means = (torch.stack(part) for part in zip(*self.weights[name], strict=True))
        share = self.view.slices[0][:, 1:].numel() / self.view.tokens_per_step
        variance = self.propagated[name].backward["wgrad"].variance()
        noise = signal_to_noise(gradients, means, variance, share)
        return {"recipe": self.products[name].name, **gemms, "noise": noise, "slots": self.looks[name].slots}


def summary(layers: Mapping[str, Any]) -> dict[str, float | int | None]:
    """The few numbers that a tracker plots."""
    parts = [layer["wgrad"]["propagated"] for layer in layers.values()]
    rhos = [layer["noise"]["rho"] for layer in layers.values() if layer["noise"]["rho"] is not None]
    local = [layer[gemm]["local"]["backward"] for layer in layers.values() for gemm in GEMMS[1:]]
    return {
        **{f"{name}_error": fmean(part[name]["error"] or 0.0 for part in parts) for name in ("forward", "backward")},
        "least_rho": min(rhos, default=None),
        "biased": sum((one["bias"] or 0.0) > max(3 * (one["bias_se"] or 0.0), one["visible"] or 0.0) for one in local),
    }


def held_bytes(shapes: Sequence[tuple[int, int]], tokens: int, slices: int, draws: int) -> float:
    """Of what an X-ray holds beside the passes themselves, at most. shapes: (out, in) features of the layers."""
    held = 0
    for out_features, in_features in shapes:
        sizes = tokens * out_features, tokens * in_features, out_features * in_features
        kept = [min(size, KEPT) for size in sizes]
        held += sum(kept) * (2 + 2 * draws) + kept[-1] * 2 * slices
    return 4.0 * (held + 3 * KEPT_LOCAL * (1 + 4 * draws))


def multiply(product: Product, call: Call, x: Tensor, weight: Tensor, dy: Tensor) -> Products:
    """All three products of one layer, apart from any model."""
    y, kept = product.forward(call, x, weight, True)
    a, b = product.gradients(call, dy, (True, True), kept)
    found = {"fprop": y, "dgrad": product.input_gradient(call, a, kept)}
    found["wgrad"] = product.weight_gradient(call, b, kept)
    return {gemm: elements(made, KEPT_LOCAL) for gemm, made in found.items()}


def moved(rng: Tensor, draw: int) -> Tensor:
    """The random state of another draw."""
    return rng + torch.tensor([0, 0, draw], device=rng.device)


def elements(x: Tensor, most: int) -> Tensor:
    """FP32 [n]: all elements, or every k-th one over rows and columns alike; a copy."""
    step = -(-x.numel() // most)
    while step > 1 and math.gcd(step, x.shape[-1]) > 1:
        step += 1
    return x.detach().reshape(-1)[::step].to(torch.float32, copy=True)
