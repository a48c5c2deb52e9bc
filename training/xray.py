"""An X-ray: what quantization does to the gradients of the same tokens at the same weights, layer by layer.

Three gradients: g0 of BF16, gF of the quantized forward with the exact backward through it (what it kept, multiplied
without rounding), gQ as trained. So gF - g0 is the forward's part and gQ - gF the backward's; only random bits can be
averaged away, so only the latter has a bias over draws (the former too, where the forward draws). Twice:

    propagated  each pass runs the whole model: a layer has its own error and those of all others
    local       a layer is fed with X and dY of the pass of gF, so that the error is its own

Random bits are counters, hence draws are other numbers of the micro-batch: none that training uses. Everything is
measured on slices of text, whose amax and tensor scales are the slice's. No gradient is left behind.

What costs are launches, not arithmetic: slices are small. So one forward serves the backwards of all draws where
nothing in it is drawn; where training replays CUDA graphs, so do the passes here, and the products of a layer, captured
once for all layers of a shape and run beside the passes; figures are inner products, read from the device once a look.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import Errors, moments, numbers, signal_to_noise
from quant.linear import Call, QuantLinear
from quant.names import GEMMS
from quant.operands import Look, named
from quant.plan import HEAD, quant_linears, replaced
from quant.product import Product
from training.replay import Lane

# Elements of a product that figures are taken from: all layers' are held at once where they are propagated.
KEPT_LOCAL, KEPT = 1 << 20, 1 << 18
LOOK_BYTES = 150  # an element of an operand, while quant/operands.py looks at it in FP64
BACKWARD = GEMMS[1:]
Products = dict[str, Tensor]  # GEMM -> elements of its product, FP32 [n]


@dataclass(frozen=True)
class View:
    """What is looked at. `set_rng(number)`: the random state of draw `number` of this view. `accumulate(last
    micro-batch?)`: the context of a forward and its backward. `several`: whether a forward may have several backwards
    (not where weights are gathered for each). `graphs`: whether passes may be captured as CUDA graphs."""

    loss: nn.Module
    tokens_per_step: int
    set_rng: Callable[[int], None]
    accumulate: Callable[[bool], AbstractContextManager]
    several: bool = True
    graphs: bool = False

    @property
    def layers(self) -> dict[str, QuantLinear]:
        return {name: layer for name, layer in quant_linears(self.loss.model).items() if name != HEAD}

    @property
    def recipes(self) -> dict[str, Product]:
        return {name: layer.recipe for name, layer in self.layers.items()}


class Tap(Product):
    """A layer's product as it is; `products` takes from what it computed last. Random bits of the backward are those of
    `rng`. Backwards may go another product's way, `instead`, whose forward is the same, and are `aside`: what a graph
    writes must not be dropped for what another one does. Others `feed` (x, weight, dY) to whom it is set."""

    def __init__(self, product: Product, rng: Tensor):
        self.name, self.product, self.rng = product.name, product, rng
        self.products: Products = {}
        self.aside: Products = {}
        self.instead: Product | None = None
        self.feed: Callable[[Tensor, Tensor, Tensor], None] | None = None

    def forward(self, call: Call, x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Sequence[Any]]:
        y, kept = self.product.forward(call, x, weight, keep)
        self.products["fprop"] = elements(y, KEPT)
        if self.feed:
            self._input = x.detach(), weight.detach()  # attached they'd hold autograd's graph
        return y, kept

    def gradients(self, call: Call, dy: Tensor, needed: tuple[bool, bool], kept: Sequence[Any]) -> tuple[Any, Any]:
        self._call = replace(call, rng=self.rng)
        if self.feed and not self.instead:
            self.feed(*self._input, dy)
        return self._way.gradients(self._call, dy, needed, kept)

    def input_gradient(self, call: Call, dy: Any, kept: Sequence[Any]) -> Tensor:
        dx = self._way.input_gradient(self._call, dy, kept)
        self._made["dgrad"] = elements(dx, KEPT)
        return dx

    def weight_gradient(self, call: Call, dy: Any, kept: Sequence[Any]) -> Tensor:
        dw = self._way.weight_gradient(self._call, dy, kept)
        self._made["wgrad"] = elements(dw, KEPT)
        return dw

    @property
    def _way(self) -> Product:
        return self.instead or self.product

    @property
    def _made(self) -> Products:
        return self.aside if self.instead else self.products


class Rows:
    """Tensors of each draw, or of each slice, one below the other: {key: FP32 [count, n]}."""

    def __init__(self, count: int):
        self.count = count
        self.all: dict[Any, Tensor] = {}

    def put(self, row: int, found: Mapping[Any, Tensor]) -> None:
        for key, values in found.items():
            if key not in self.all:
                self.all[key] = values.new_empty((self.count, *values.shape))
        torch._foreach_copy_([self.all[key][row] for key in found], list(found.values()))


def gaps(plain: Products, exact: Products, drawn: Products) -> tuple[Tensor, Tensor]:
    """One slice of a layer: g0 [n], gF [1 or R, n], gQ [R, n]. (moments of the forward's part for each GEMM, then of
    the backward's; the mean error of dW.)"""
    forward = [moments(plain[gemm][None], exact[gemm] - plain[gemm]) for gemm in GEMMS]
    errors = {gemm: drawn[gemm] - exact[gemm] for gemm in BACKWARD}
    backward = [moments(exact[gemm], errors[gemm]) for gemm in BACKWARD]
    return torch.cat([part.flatten() for part in (*forward, *backward)]), errors["wgrad"].mean(0)


def parts(found: Tensor, forward_draws: int, draws: int) -> dict[tuple[str, str], Errors]:
    """{(GEMM, forward or backward): of all layers} from `gaps` [layers, slices, m]."""
    sizes = [forward_draws] * len(GEMMS) + [draws] * len(BACKWARD)
    names = [(gemm, "forward") for gemm in GEMMS] + [(gemm, "backward") for gemm in BACKWARD]
    split = found.split([size * (size + 2) for size in sizes], dim=2)
    return {
        name: Errors(part.unflatten(2, (size, size + 2))) for name, part, size in zip(names, split, sizes, strict=True)
    }


def figures(found: Mapping[tuple[str, str], Errors], forward_draws: bool) -> list[dict[str, dict[str, Any]]]:
    """Of each layer {GEMM: {forward or backward: figures}}."""
    count = len(next(iter(found.values())).grams)
    layers: list[dict[str, dict[str, Any]]] = [{gemm: {} for gemm in GEMMS} for _ in range(count)]
    for (gemm, part), errors in found.items():
        spread = errors.spread() if part == "backward" or forward_draws else {}
        for layer, read in zip(layers, numbers(errors.near() | spread), strict=True):
            layer[gemm][part] = read
    return layers


class Alone:
    """The products of a layer apart from its model, under one recipe: of all layers of a shape, one after the other, in
    a lane of its own."""

    def __init__(self, product: Product, plain: Product, draws: int, graphs: bool = False):
        self._product, self._plain, self._exact = product, plain, product.exact_backward()
        self.lane = Lane(graphs, aside=True)
        self._exacts, self._drawns = Rows(draws if product.forward_draws else 1), Rows(draws)
        functions = self._plain_pass, self._exact_pass, self._drawn_backward, self._gaps_of_all, self._watched
        self._run_plain, self._run_exact, self._run_drawn, self._run_gaps, self._look = map(self.lane.replay, functions)
        self._fed: list[Tensor] = []

    def feed(self, layer: QuantLinear, x: Tensor, weight: Tensor, dy: Tensor) -> None:
        """What is multiplied from now on. The first tensors are copied, so that graphs find all others in their
        place."""
        fitted = layer.fitted()
        given = [layer.rng, layer.layer, x, weight, dy, *fitted.values()]
        if not self._fed:
            self._fed = [tensor.detach().clone() for tensor in given]
            self._fitted = dict(zip(fitted, self._fed[5:], strict=True))
        for place, tensor in zip(self._fed, given, strict=True):
            place.copy_(tensor.detach())

    def measure(self, states: Tensor) -> Tensor:
        """What `gaps` gives, by the random states [draws, 3]."""
        self._plains = self._run_plain()
        for draw, state in enumerate(states):
            self._fed[0].copy_(state)
            if draw < self._exacts.count:  # else what it kept serves this draw, too
                self._exacts.put(draw, self._run_exact())
            self._drawns.put(draw, self._run_drawn())
        return self._run_gaps().clone()

    def look(self) -> dict[str, Tensor]:
        """{slot: quant.operands.figures} of its operands, by the random state that it was fed with."""
        return {slot: found.clone() for slot, found in self._look().items()}

    def _call(self, watch: Look | None = None) -> Call:
        return Call(*self._fed[:2], watch, self._fitted)

    def _plain_pass(self) -> Products:
        return multiply(self._plain, self._call(), *self._fed[2:5])

    def _exact_pass(self) -> Products:
        x, weight, dy = self._fed[2:5]
        y, self._kept = self._exact.forward(self._call(), x, weight, True)
        return {"fprop": elements(y, KEPT_LOCAL), **gradients(self._exact, self._call(), dy, self._kept)}

    def _drawn_backward(self) -> Products:
        return gradients(self._product, self._call(), self._fed[4], self._kept)

    def _watched(self) -> dict[str, Tensor]:
        look = Look()
        multiply(self._product, self._call(look), *self._fed[2:5])
        return look.slots

    def _gaps_of_all(self) -> Tensor:
        return gaps(self._plains, self._exacts.all, self._drawns.all)[0]


class Found:
    """What one look has seen, on the device: moments of each slice, figures of operands."""

    def __init__(self, slices: int):
        self.propagated: list[Tensor] = []  # [layers, m]
        self.local: dict[str | None, dict[str, list[Tensor]]] = {}  # recipe -> layer -> [m]
        self.weights = Rows(slices)  # (layer, "gradient" or "error"): elements of dW, its mean error
        self.slots: dict[str, dict[str, Tensor]] = {}


class Eye:
    """Looks at one model, again and again: what is captured serves all looks. `others`: label -> recipe, whose products
    of the same tensors are measured too."""

    def __init__(self, view: View, draws: int, others: Mapping[str, Product]):
        self.view, self.draws, self.layers, self.recipes = view, draws, view.layers, view.recipes
        self.measured = {name: {None: recipe, **others} for name, recipe in self.recipes.items()}
        self.forward_draws = any(recipe.is_quantized and recipe.forward_draws for recipe in self.recipes.values())
        lane = Lane(view.graphs)
        self._rng = next(iter(self.layers.values())).rng
        self._tap_rng = self._rng.clone()  # of backwards: the other one is kept by autograd as it was
        self._offsets = torch.zeros((draws, 3), dtype=torch.int64, device=self._rng.device)
        self._offsets[:, 2] = torch.arange(draws)
        self._plain, self._exact, self._drawn = (
            {name: Tap(of(recipe), self._tap_rng) for name, recipe in self.recipes.items()}
            for of in (lambda one: one.plain(), lambda one: one.exact_backward(), lambda one: one)
        )
        for name, tap in self._exact.items():
            tap.feed = partial(self._feed, name)
        self._exacts, self._drawns = Rows(draws if self.forward_draws else 1), Rows(draws)
        self._run_plain = lane.replay(partial(self._pass, self._plain))
        self._run_exact = lane.replay(partial(self._pass, self._exact, view.several))
        self._run_drawn = lane.replay(self._again if view.several else partial(self._pass, self._drawn))
        self._run_gaps = lane.replay(self._gaps)
        self._tokens: Tensor | None = None
        self._fed: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._alone: dict[Any, Alone] = {}

    def sees(self, view: View) -> bool:
        """Whether what was built for another view serves this one: phases of a run change recipes."""
        return self.view.loss is view.loss and self.recipes == view.recipes

    def close(self) -> None:
        """Gives the graphs' memory back."""
        self.__dict__.clear()

    def look(self, slices: Sequence[Tensor]) -> dict[str, Any]:
        """{"layers": ..., "what_if": ...} of a row (base/runfolder.py, XRAY); what_if is there with other recipes only.
        slices: tokens int64 [B, T+1] on the device, all of a shape."""
        self._found = Found(len(slices))
        with torch.compiler.set_stance("force_eager"):
            for number, tokens in enumerate(slices):
                self._slice(tokens, number)
        return row_of(self._found, self, slices[0][:, 1:].numel() / self.view.tokens_per_step)

    def _slice(self, tokens: Tensor, number: int) -> None:
        if self._tokens is None:
            self._tokens = tokens.clone()
        self._tokens.copy_(tokens)
        self.view.set_rng(number * self.draws)
        self._states = self._rng + self._offsets
        self._run_plain()
        for draw in range(self.draws):
            self._tap_rng.copy_(self._states[draw])
            if draw and (self.forward_draws or not self.view.several):
                self.view.set_rng(number * self.draws + draw)
            if draw < self._exacts.count:
                self._join()  # X and dY of the draw before are read aside
                self._measures = draw == 0
                self._through = self._run_exact()
                self._exacts.put(draw, {(name, g): tap.products[g] for name, tap in self._exact.items() for g in GEMMS})
                for name, fed in self._fed.items() if draw == 0 else ():
                    self._measure(name, *fed)
            self._run_drawn()
            drawn = self._exact if self.view.several else self._drawn
            made = {name: tap.aside or tap.products for name, tap in drawn.items()}
            self._drawns.put(draw, {(name, gemm): each[gemm] for name, each in made.items() for gemm in BACKWARD})
        self._through = None  # a replay keeps its own
        moments_of_all, errors = self._run_gaps()
        self._found.propagated.append(moments_of_all.clone())
        gradients = {(name, "gradient"): self._exacts.all[name, "wgrad"][0] for name in self.layers}
        self._found.weights.put(number, gradients | {(name, "error"): mean for name, mean in errors.items()})
        self._join()

    def _join(self) -> None:
        for alone in self._alone.values():
            alone.lane.join()

    def _pass(self, taps: Mapping[str, Tap], keep: bool = False) -> Tensor | None:
        """A forward and backward of the whole model. keep: returns the loss, for more backwards."""
        with replaced(self.view.loss.model, taps), self.view.accumulate(not self.view.several):
            nats = self.view.loss(self._tokens) / self.view.tokens_per_step
            nats.backward(retain_graph=keep)
        self.view.loss.zero_grad(set_to_none=True)
        return nats if keep else None

    def _again(self) -> None:
        """The backward as trained, through the forward that gF went through."""
        for name, tap in self._exact.items():
            tap.instead = self.recipes[name]
        with self.view.accumulate(False):
            self._through.backward(retain_graph=True)
        self.view.loss.zero_grad(set_to_none=True)
        for tap in self._exact.values():
            tap.instead = None

    def _gaps(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(moments [layers, m], mean errors of dW) of what the passes of a slice left."""
        found = {
            name: gaps(
                self._plain[name].products,
                {gemm: self._exacts.all[name, gemm] for gemm in GEMMS},
                {gemm: self._drawns.all[name, gemm] for gemm in BACKWARD},
            )
            for name in self.layers
        }
        return torch.stack([each for each, _ in found.values()]), {name: error for name, (_, error) in found.items()}

    def _feed(self, name: str, x: Tensor, weight: Tensor, dy: Tensor) -> None:
        """Within a backward, where weights are there as a whole; what is captured is measured afterwards."""
        if self.view.graphs:
            self._fed[name] = x, weight, dy
        elif self._measures:
            self._measure(name, x, weight, dy)

    def _measure(self, name: str, x: Tensor, weight: Tensor, dy: Tensor) -> None:
        layer, found = self.layers[name], self._found
        for label, recipe in self.measured[name].items():
            kind = recipe, x.shape, weight.shape
            if kind not in self._alone:
                self._alone[kind] = Alone(recipe, self.recipes[name].plain(), self.draws, self.view.graphs)
            alone = self._alone[kind]
            with alone.lane.within():
                alone.feed(layer, x, weight, dy)
                if label is None and name not in found.slots:
                    found.slots[name] = alone.look()
                found.local.setdefault(label, {}).setdefault(name, []).append(alone.measure(self._states))


def row_of(found: Found, eye: Eye, share: float) -> dict[str, Any]:
    """What a look has found, read from the device. share: of the tokens of a step that a slice has."""
    names = list(eye.layers)
    whole = parts(torch.stack(found.propagated, 1).cpu(), eye.draws if eye.forward_draws else 1, eye.draws)
    propagated = dict(zip(names, figures(whole, eye.forward_draws), strict=True))
    grams = [
        torch.stack([rows @ rows.t() for rows in (found.weights.all[name, kind] for name in names)]).cpu()
        for kind in ("gradient", "error")
    ]
    noises = numbers(signal_to_noise(*grams, whole["wgrad", "backward"].variance(), share))
    local = {label: local_figures(each, eye, label) for label, each in found.local.items()}
    own = local.pop(None)
    layers = {
        name: {
            "recipe": eye.recipes[name].name,
            **{gemm: {"local": own[name][gemm], "propagated": propagated[name][gemm]} for gemm in GEMMS},
            "noise": noise,
            "slots": {slot: named(values.cpu()) for slot, values in found.slots[name].items()},
        }
        for name, noise in zip(names, noises, strict=True)
    }
    return summary(layers) | {"layers": layers} | ({"what_if": local} if local else {})


def local_figures(found: Mapping[str, list[Tensor]], eye: Eye, label: str | None) -> dict[str, dict[str, Any]]:
    """{layer: figures} of one recipe; layers whose forward draws have more to read."""
    read = {}
    for draws in (False, True):
        names = [name for name in found if eye.measured[name][label].forward_draws == draws]
        if names:
            stacked = torch.stack([torch.stack(found[name]) for name in names]).cpu()
            read |= zip(names, figures(parts(stacked, eye.draws if draws else 1, eye.draws), draws), strict=True)
    return {name: read[name] for name in found}


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


def held_bytes(shapes: Sequence[tuple[int, int]], tokens: int, slices: int, draws: int, recipes: int = 1) -> float:
    """Of what an X-ray holds beside the passes themselves, at most. shapes: (out, in) features of the layers."""
    held = 0.0
    for out_features, in_features in shapes:
        kept = [min(size, KEPT) for size in sizes_of(out_features, in_features, tokens)]
        held += 4 * (sum(kept) * (4 + 2 * draws) + kept[-1] * 2 * slices)
        held += 2 * tokens * (out_features + in_features)  # X and dY
    for shape in set(shapes):
        sizes = sizes_of(*shape, tokens)
        held += recipes * 4 * sum(min(size, KEPT_LOCAL) for size in sizes) * (4 + 2 * draws)
        held += recipes * (2 * sum(sizes) + 2 * sizes[-1])
    largest = max(max(sizes_of(*shape, tokens)) for shape in shapes)
    return held + LOOK_BYTES * largest


def sizes_of(out_features: int, in_features: int, tokens: int) -> tuple[int, int, int]:
    """Elements of Y and dY, of X and dX, of W and dW."""
    return tokens * out_features, tokens * in_features, out_features * in_features


def multiply(product: Product, call: Call, x: Tensor, weight: Tensor, dy: Tensor) -> Products:
    """All three products of one layer, apart from any model."""
    y, kept = product.forward(call, x, weight, True)
    return {"fprop": elements(y, KEPT_LOCAL), **gradients(product, call, dy, kept)}


def gradients(product: Product, call: Call, dy: Tensor, kept: Sequence[Any]) -> Products:
    """dX and dW, from what a forward kept."""
    a, b = product.gradients(call, dy, (True, True), kept)
    dx = elements(product.input_gradient(call, a, kept), KEPT_LOCAL)
    return {"dgrad": dx, "wgrad": elements(product.weight_gradient(call, b, kept), KEPT_LOCAL)}


def elements(x: Tensor, most: int) -> Tensor:
    """FP32 [n]: all elements, or every k-th one over rows and columns alike; a copy."""
    step = -(-x.numel() // most)
    while step > 1 and math.gcd(step, x.shape[-1]) > 1:
        step += 1
    return x.detach().reshape(-1)[::step].to(torch.float32, copy=True)
