"""The linear layer of every recipe: one autograd function around whatever the recipe multiplies (quant/product.py).

The gradient of quantizers is the straight-through one unless a product says otherwise. From forward to backward the
layer keeps what its product returns, and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """What the quantizers of one call share: the random state, who counts (quant/stats.py) or None, and what the layer
    has fitted for them, by name."""

    rng: Tensor
    layer: Tensor
    watch: Any = None
    fitted: Mapping[str, Tensor] = field(default_factory=dict)


class QuantLinear(nn.Module):
    """y = x W^T as a recipe multiplies. x [..., K] bf16 -> y [..., N] bf16; weight [N, K] float32, no bias.

    rng: int64 [3] (seed, step, micro-batch), one tensor shared by all layers, updated in place by the trainer before
    each micro-batch and left alone until its backward is done; no part of the model's state, hence no buffer.
    `recipe` may be exchanged between calls (quant.plan.changed).
    Raises ValueError for a bias, for an input that is not bf16, and from the quantizers for shapes that don't divide.
    """

    hook: str | None = None  # which one (training/hooks) sets what `fitted` gives

    def __init__(self, linear: nn.Linear, recipe: Any, layer: int, rng: Tensor):
        super().__init__()
        if linear.bias is not None:
            raise ValueError("quantized linear layers have no bias; build the model with bias=False")
        self.weight = linear.weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.recipe = recipe
        self.rng = rng
        self.watch = None
        self.register_buffer("layer", torch.tensor(layer, device=rng.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        keep = torch.is_grad_enabled() and (self.weight.requires_grad or x.requires_grad)
        call = Call(self.rng, self.layer, self.watch, self.fitted())
        rows = x.reshape(-1, self.in_features)
        y = Multiply.apply(rows, self.weight, self.rng, self.layer, self.recipe, call, keep)
        return y.view(*x.shape[:-1], self.out_features)

    def fitted(self) -> dict[str, Tensor]:
        """State that training fits for this layer's quantizers, by name; a checkpoint has it as the hook's."""
        return {}

    def check_input(self, x: Tensor) -> None:
        if x.dtype != torch.bfloat16:
            name = type(self).__name__
            raise ValueError(f"{name} takes bfloat16 (the compute dtype of a converted model); got {x.dtype}")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, recipe={self.recipe.name}"


class Multiply(torch.autograd.Function):
    """X [M,K] bf16, W [N,K] float32 -> Y [M,N] bf16; dX bf16, dW float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, rng: Tensor, layer: Tensor, recipe: Any, call: Call, keep: bool):
        y, kept = recipe.forward(call, x, weight, keep)
        parts = [held.tensors() for held in kept]
        ctx.save_for_backward(rng, layer, *(tensor for part in parts for tensor in part))
        ctx.forms, ctx.counts = tuple(held.form for held in kept), tuple(map(len, parts))
        ctx.recipe, ctx.watch = recipe, call.watch
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        rng, layer, *parts = ctx.saved_tensors
        recipe, call, kept = ctx.recipe, Call(rng, layer, ctx.watch), []
        for form, count in zip(ctx.forms, ctx.counts, strict=True):
            kept.append(form(*parts[:count]))
            parts = parts[count:]
        needed = ctx.needs_input_grad[:2]
        a, b = recipe.gradients(call, dy.contiguous(), needed, kept)
        dx = recipe.input_gradient(call, a, kept) if needed[0] else None
        dw = recipe.weight_gradient(call, b, kept) if needed[1] else None
        return dx, dw, None, None, None, None, None
