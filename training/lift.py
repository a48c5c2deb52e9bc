"""Which layers cost loss now: each one, or an operand of it, in BF16 while the rest is in 4 bits, and alone in 4 bits.

All at one checkpoint's weights on the same text, so that losses pair token by token; errors are over documents. Only
the forward counts at fixed weights: what the backward costs shows in training alone (training/xray.py has its errors).

Beside each change stands what a Taylor series says of it, from one backward: Y changes by dY, and the summed nats of a
sequence by about g.dY + (g.dY)^2 / 2, where g is their gradient with respect to Y and the Hessian is taken to be that
of Fisher, E g g^T. At the minimum of a loss the first term would be 0 on average.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.files import write_json
from base.runfolder import LIFTS
from data.evalset import EvalSet
from kernels.spec import NO_QUANT
from quant import library
from quant.linear import Call
from quant.names import OPERANDS
from quant.plan import HEAD, quant_linears, replaced
from quant.product import Product
from quant.recipe import Gemm, Operand, Recipe
from training.checkpoint.state import load_model
from training.config import TrainConfig
from training.evaluate import EVAL_MICRO_BASE, evaluate
from training.loss import LossModel
from training.ranks.distributed import Dist
from training.reopen import reopen

TOKENS = 1 << 16  # of validation text
LAYER = "layer"  # both operands
FP8 = "fp8"  # both operands by that recipe
Recipes = Mapping[str, Product]
# What is measured of a change: name -> its value and its standard error.
Change = dict[str, float | None]


@dataclass(frozen=True)
class Base:
    """A whole forward that single layers are exchanged in. `others`: {layer: {what: its product when exchanged}}."""

    recipes: Recipes
    others: Mapping[str, Recipes]


class Exchanged(Product):
    """A layer's product as it is; in the backward it takes g.dY of each sequence, dY from the `others` in its place."""

    def __init__(self, product: Product, others: Recipes, found: Callable[[str, Tensor], None]):
        self.name, self.product, self.others, self.found = product.name, product, others, found

    def forward(self, call: Call, x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Any]:
        y, kept = self.product.forward(call, x, weight, keep)
        self._fed = call, x, weight, y
        return y, kept

    def gradients(self, call: Call, dy: Tensor, needed: tuple[bool, bool], kept: Any) -> tuple[Any, Any]:
        forward, x, weight, y = self._fed
        del self._fed
        for what, other in self.others.items():  # here, not in the forward: all layers' dY would be held at once
            apart = other.forward(forward, x, weight, False)[0] - y
            self.found(what, (apart.float() * dy.float()).sum(-1))
        return self.product.gradients(call, dy, needed, kept)

    def input_gradient(self, call: Call, dy: Any, kept: Any) -> Tensor:
        return self.product.input_gradient(call, dy, kept)

    def weight_gradient(self, call: Call, dy: Any, kept: Any) -> Tensor:
        return self.product.weight_gradient(call, dy, kept)


@dataclass(frozen=True)
class Scorer:
    """Scores the same text under any recipes."""

    loss: LossModel
    evalset: EvalSet
    batch: int
    ranks: Dist
    set_rng: Callable[[int], Any]

    def nats(self, recipes: Recipes) -> np.ndarray:
        """FP64, of each segment."""
        with replaced(self.loss.model, recipes):
            return evaluate(self._per_token, self.evalset, self.batch, self.ranks, self.set_rng)

    def _per_token(self, tokens: Tensor) -> Tensor:
        return self.loss(tokens, per_token=True)

    def changes(self, base: Base) -> dict[str, dict[str, Change]]:
        """{layer: {what: its Change}} of all exchanges, and what the series says of them."""
        before, said = self.nats(base.recipes), self._series(base)
        out: dict[str, dict[str, Change]] = {}
        for name, others in base.others.items():
            out[name] = {}
            for what, product in others.items():
                after = self.nats({**base.recipes, name: product})
                change, error = self.evalset.difference(after, before)
                out[name][what] = numbers({"change": change, "change_se": error}) | said[name][what]
        return out

    def _series(self, base: Base) -> dict[str, dict[str, Change]]:
        taken: dict[str, dict[str, list[Tensor]]] = {name: {} for name in base.others}

        def taker(name: str) -> Callable[[str, Tensor], None]:
            return lambda what, products: taken[name].setdefault(what, []).append(products)

        taps = {name: Exchanged(base.recipes[name].exact_backward(), others, taker(name))
                for name, others in base.others.items()}  # fmt: skip
        with replaced(self.loss.model, {**base.recipes, **taps}):
            for number, first in enumerate(range(0, self.evalset.sequences, self.batch)):
                self.set_rng(EVAL_MICRO_BASE + number)
                tokens = self.evalset.samples(first, min(self.batch, self.evalset.sequences - first))
                self.loss(tokens.to(self.ranks.device)).backward()
                self.loss.zero_grad(set_to_none=True)
        return {name: {what: self._terms(torch.cat(found)) for what, found in whats.items()}
                for name, whats in taken.items()}  # fmt: skip

    def _terms(self, products: Tensor) -> Change:
        """The two terms in nats per token, errors over sequences, from g.dY of every token."""
        first = products.double().view(-1, self.evalset.seq_len).sum(-1)
        found: Change = {}
        for name, each in (("first", first), ("second", first**2 / 2)):
            each = each / self.evalset.seq_len
            error = each.std() / len(each) ** 0.5 if len(each) > 1 else None
            found |= numbers({name: float(each.mean()), f"{name}_se": error})
        return found


def lift(config: TrainConfig, run: Mapping[str, Any], checkpoint: Path, step: int, tokens: int, ranks: Dist) -> dict:
    """What lift/<step>.json has (base/runfolder.py, LIFT). config, run: as reopen takes them; tokens: of validation
    text. Raises ValueError where no layer's forward is quantized, RuntimeError for what the machine can't do."""
    again = reopen(config, run, step, ranks)
    layers = {name: layer.recipe for name, layer in quant_linears(again.model).items() if name != HEAD}
    quantized = {name: recipe for name, recipe in layers.items() if quantizes(recipe)}
    if not quantized:
        raise ValueError(f"{run['name']} at step {step}: no layer's forward is quantized, so there is nothing to lift")
    for recipe in dict.fromkeys(quantized.values()):
        recipe.exact_backward()  # ValueError where it has none
    load_model(checkpoint, again.model)
    micro = again.numbers.micro
    text = part(again.evalset, tokens, config.data.packing, micro)
    scorer = Scorer(LossModel(again.model), text, micro, ranks, again.rng[2].fill_)
    plain = {name: recipe.plain() for name, recipe in layers.items()}
    own, bf16 = scorer.nats(layers), scorer.nats(plain)
    gap, error = text.difference(own, bf16)
    lifted = scorer.changes(Base(layers, {name: lifts(recipe) for name, recipe in quantized.items()}))
    alone = scorer.changes(Base(plain, {name: alones(recipe) for name, recipe in quantized.items()}))
    losses = {"own": text.summary(own)["loss"], "bf16": text.summary(bf16)["loss"], "gap": gap, "gap_se": error}
    return {
        "step": step,
        "targets": text.targets,
        "recipe": run["recipe_label"],
        **losses,
        "layers": {name: {"lifted": lifted[name], "alone": alone[name]} for name in quantized},
    }


def quantizes(product: Product) -> bool:
    """Whether its forward does."""
    operands = product.operands()
    forward = [operands[f"fprop.{name}"] for name in OPERANDS["fprop"] if operands]
    return any(operand.is_quantized for operand in forward) if operands else product.is_quantized


def part(whole: EvalSet, tokens: int, packing: str, batch: int) -> EvalSet:
    """So many tokens of it in whole batches, spread evenly; all where it has no more."""
    if tokens >= whole.targets:
        return whole
    sequences = max(1, tokens // (batch * whole.seq_len)) * batch
    return EvalSet(whole.tokens, whole.seq_len, min(sequences, whole.sequences) * whole.seq_len, packing)


def lifts(product: Product) -> Recipes:
    """{what: the product with it in BF16; the layer in FP8}."""
    return {LAYER: product.plain(), **in_fp8()} | {name: without(product, name) for name in parts(product)}


def alones(product: Product) -> Recipes:
    """{what: the product with it alone in 4 bits, or the layer in FP8}, forward."""
    both = OPERANDS["fprop"]
    kept = {name: next(other for other in both if other != name) for name in parts(product)}
    return {LAYER: product, **in_fp8()} | {name: without(product, other) for name, other in kept.items()}


def in_fp8() -> Recipes:
    """Nothing where the chosen back ends can't multiply FP8."""
    recipe = library.load(FP8)
    return {} if recipe.unsupported() else {FP8: recipe}


def parts(product: Product) -> Iterable[str]:
    """Operands of fprop that can be lifted one by one: of slots, where both are quantized."""
    forward = product.alone().get("fprop")
    is_slots = isinstance(forward, Recipe) and all(operand.is_quantized for operand in forward.fprop.operands)
    return OPERANDS["fprop"] if is_slots else ()


def without(product: Product, name: str) -> Recipe:
    """Its forward with operand `name` in BF16; the backward is BF16's."""
    forward = product.alone()["fprop"]
    named = zip(OPERANDS["fprop"], forward.fprop.operands, strict=True)
    operands = tuple(Operand(NO_QUANT) if one == name else operand for one, operand in named)
    return replace(forward, fprop=Gemm(forward.fprop.rotation, operands))


def numbers(found: dict[str, Any]) -> Change:
    """Six digits."""
    return {name: None if value is None else float(f"{float(value):.6g}") for name, value in found.items()}


def save(folder: Path, found: dict[str, Any]) -> Path:
    """Write lift/<step>.json; an older one is replaced."""
    path = folder / LIFTS / f"{found['step']}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, found)
    return path
