"""Weights rounded with error feedback after training, X by plain NVFP4: what any run can have without training for it.

W in the metric of X^T X (kernels/quantize/feedback.py), as quartet2_shaped has it in training; X of TOKENS training
tokens, the last that were trained on, under the BF16 forward of the weights that are served. No evaluation text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import Loader
from kernels import gemm as gemms
from kernels.quantize import Quantized
from kernels.quantize.feedback import fit
from quant.linear import Call
from quant.plan import HEAD, quant_linears, unquantized
from quant.products.shaped import DAMPING, Shaped
from quant.recipe import Recipe
from training.start.derive import Numbers

SHAPED_W = "nvfp4_shaped_w"
TOKENS = 65_536  # for X^T X, or all before the step where they are fewer


@dataclass(frozen=True, eq=False)
class Given(Shaped):
    """One layer's: F [K, K] comes with the recipe, so that a layer needs no state for it. Equal to itself alone."""

    F: Tensor | None = None
    __eq__, __hash__ = object.__eq__, object.__hash__

    def feedback(self, call: Call, slot: str) -> Tensor | None:
        return self.F if slot == "fprop.w" else None


def shaped_weights(
    model: nn.Module, train: Loader, numbers: Numbers, step: int, base: Recipe, score: Callable[[Tensor], Any]
) -> tuple[dict[str, Recipe], int]:
    """({layer: its recipe}, tokens of X): `base` with W shaped. `score` runs the model on int64 [B, T + 1].

    Raises ValueError where nothing was trained on before `step`.
    """
    end = step * numbers.sequences
    first = max(0, end - max(1, TOKENS // numbers.seq_len))
    if not end:
        raise ValueError("--shaped-weights at step 0: no training tokens came before; name a later one, RUN@STEP")
    layers = {name: layer for name, layer in quant_linears(model).items() if name != HEAD}
    grams: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        rows = Quantized(x.reshape(-1, x.shape[-1]), None)
        gram = gemms.gemm(rows, rows, "wgrad", 1.0, torch.float32)
        grams[name] = grams[name].add_(gram) if name in grams else gram

    def seen_by(name: str) -> Callable:
        return lambda layer, inputs: add(name, inputs[0])

    hooks = [layer.register_forward_pre_hook(seen_by(name)) for name, layer in layers.items()]
    try:
        with unquantized(model), torch.no_grad():
            for at in range(first, end, numbers.micro):
                score(train.samples(at, min(numbers.micro, end - at)))
    finally:
        for hook in hooks:
            hook.remove()
    parts = (base.name, base.fprop, base.dgrad, base.wgrad, ("w",), None)
    made = {name: Given(*parts, fit(grams.pop(name), DAMPING)) for name in layers}
    return made, (end - first) * numbers.seq_len
