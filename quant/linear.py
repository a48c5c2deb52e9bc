"""The linear layer of every recipe: one autograd function, three GEMMs, six operand slots (quant/recipe.py).

Kept from forward to backward, and nothing else: for dgrad.w and wgrad.x what their `source` names.
    fprop, fprop_transposed   what fprop multiplied: NVFP4 codes and scales, FP8 bytes and scale, or the tensor itself
    input, dgrad.w            nothing: the FP32 master weight is there anyway
    input, wgrad.x            the operand of wgrad itself, quantized in the forward where it is quantized (random bits
                              are counters, so it is the same operand), else x in BF16
The gradient of the quantizers is the straight-through one: dX and dW are those of the quantized product.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels import gemm as gemms
from kernels import quantize as ops
from kernels.formats.minifloat import FP8_DTYPES
from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.quantize import Quantized
from quant.recipe import FPROP_SLOT, GEMMS, SLOTS, Gemm, Operand, Recipe

# Contraction axis of each operand in its natural layout.
AXES = {"fprop.x": 1, "fprop.w": 1, "dgrad.dy": 1, "dgrad.w": 0, "wgrad.dy": 0, "wgrad.x": 0}

# What an operand can be made from: the tensor as it came, or what an earlier quantization left.
Held = Tensor | NVFP4Tensor | Quantized


@dataclass(frozen=True)
class Context:
    """What the quantizers of one call share: the recipe, the random state, and who counts (quant/stats.py) or None."""

    recipe: Recipe
    rng: Tensor
    layer: Tensor
    watch: Any = None


class QuantLinear(nn.Module):
    """y = x W^T with the GEMMs of a recipe. x [..., K] bf16 -> y [..., N] bf16; weight [N, K] float32, no bias.

    rng: int64 [3] (seed, step, micro-batch), one tensor shared by all layers, updated in place by the trainer before
    each micro-batch and left alone until its backward is done; no part of the model's state, hence no buffer.
    Raises ValueError for a bias, for an input that is not bf16, and from the quantizers for shapes that don't divide.
    """

    def __init__(self, linear: nn.Linear, recipe: Recipe, layer: int, rng: Tensor):
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
        if x.dtype != torch.bfloat16:
            raise ValueError(f"QuantLinear takes bfloat16 (the compute dtype of a converted model); got {x.dtype}")
        keep = torch.is_grad_enabled() and (self.weight.requires_grad or x.requires_grad)
        context = Context(self.recipe, self.rng, self.layer, self.watch)
        y = QuantizedProduct.apply(x.reshape(-1, self.in_features), self.weight, self.rng, self.layer, context, keep)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, recipe={self.recipe.name}"


class QuantizedProduct(torch.autograd.Function):
    """X [M,K] bf16, W [N,K] float32 -> Y [M,N] bf16; dX bf16, dW float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, rng: Tensor, layer: Tensor, context: Context, keep: bool) -> Tensor:
        w = weight.to(torch.bfloat16)
        recipe = context.recipe
        signs = rotation_signs(context, "fprop")
        keeps_w = keep and keeps_fprop(recipe, "dgrad.w")
        qx, kept_x = input_operands(x, context, signs, keep)
        qw = make_operand(w, "fprop.w", context, signs, also_packed=keeps_w)
        if keep:
            kept_w = hold(qw, recipe.operand("fprop.w")) if keeps_w else weight
            parts = flatten(kept_w), flatten(kept_x)
            ctx.save_for_backward(rng, layer, *parts[0], *parts[1])
            ctx.kinds, ctx.split, ctx.context = (type(kept_w), type(kept_x)), len(parts[0]), context
        return product(qx, qw, "fprop", recipe.fprop, torch.bfloat16)

    @staticmethod
    def backward(ctx, dy: Tensor):
        rng, layer, *parts = ctx.saved_tensors
        context = replace(ctx.context, rng=rng, layer=layer)
        kept_w = rebuild(ctx.kinds[0], parts[: ctx.split])
        kept_x = rebuild(ctx.kinds[1], parts[ctx.split :])
        signs = rotation_signs(context, "dgrad"), rotation_signs(context, "wgrad")
        a = gradient_operands(dy.contiguous(), context, signs, ctx.needs_input_grad[:2])
        dx = data_gradient(a[0], kept_w, context, signs[0]) if ctx.needs_input_grad[0] else None
        dw = weight_gradient(a[1], kept_x, context, signs[1]) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None, None


def input_operands(x: Tensor, context: Context, signs: Tensor | None, keep: bool) -> tuple[Quantized, Held | None]:
    """X [M,K] as operand of fprop, and what the backward needs of it; made together where wgrad quantizes x itself."""
    recipe = context.recipe
    slots = ("fprop.x", "wgrad.x")
    if not keep or keeps_fprop(recipe, "wgrad.x"):
        qx = make_operand(x, "fprop.x", context, signs, also_packed=keep)
        return qx, hold(qx, recipe.operand("fprop.x")) if keep else None
    if recipe.operand("wgrad.x").source != "input" or not together(context, slots):
        return make_operand(x, "fprop.x", context, signs), keep_input(x, context)
    wants = wanted(recipe, "fprop.x", False), ("packed",) if recipe.operand("wgrad.x").spec.is_nvfp4 else ("values",)
    qx, kept = both_axes(x, slots, context, (signs, rotation_signs(context, "wgrad")), wants)
    return qx, hold(kept, recipe.operand("wgrad.x"))


def together(context: Context, slots: tuple[str, str]) -> bool:
    """Whether two operands of one tensor can come from one call: both quantized, by the exact amax, nobody counting."""
    operands = [context.recipe.operand(slot) for slot in slots]
    return context.watch is None and all(o.is_quantized and o.amax == "exact" for o in operands)


def both_axes(x: Tensor, slots: tuple[str, str], context: Context, signs: tuple, wants: tuple) -> tuple:
    """The operands of two slots from x: the first along axis 1, the second along axis 0."""
    specs = tuple(context.recipe.operand(slot).spec for slot in slots)
    numbers = tuple(SLOTS.index(slot) for slot in slots)
    return ops.quantize_both(x, specs, signs, context.rng, context.layer, numbers, wants)


def gradient_operands(dy: Tensor, context: Context, signs: tuple, needed: tuple[bool, bool]) -> list[Quantized | None]:
    """dY [M,N] as operand of dgrad and of wgrad, made together where both are quantized: then dY is read less often."""
    slots = ("dgrad.dy", "wgrad.dy")
    if not (all(needed) and together(context, slots)):
        pairs = zip(slots, signs, needed, strict=True)
        return [make_operand(dy, slot, context, sign) if need else None for slot, sign, need in pairs]
    return list(both_axes(dy, slots, context, signs, tuple(wanted(context.recipe, slot, False) for slot in slots)))


def data_gradient(a: Quantized, kept_w: Held, context: Context, signs: Tensor | None) -> Tensor:
    """dX [M,K] bf16 = dY [M,N] W [N,K]. kept_w: the FP32 master, or what fprop used."""
    w = kept_w.to(torch.bfloat16) if isinstance(kept_w, Tensor) else kept_w
    return product(a, make_operand(w, "dgrad.w", context, signs), "dgrad", context.recipe.dgrad, torch.bfloat16)


def weight_gradient(a: Quantized, kept_x: Held, context: Context, signs: Tensor | None) -> Tensor:
    """dW [N,K] float32 = dY^T X. kept_x: x in BF16, what fprop used, or the operand itself (`keep_input`)."""
    if context.recipe.operand("wgrad.x").source != "input" or isinstance(kept_x, Tensor):
        b = make_operand(kept_x, "wgrad.x", context, signs)
    else:
        b = as_it_is(kept_x, "wgrad.x", context)
    return product(a, b, "wgrad", context.recipe.wgrad, torch.float32)


def product(a: Quantized, b: Quantized, kind: str, gemm: Gemm, out_dtype: torch.dtype) -> Tensor:
    """One GEMM; 1/dim of the unnormalised rotation goes into the scalar on the FP32 accumulator."""
    return gemms.gemm(a, b, kind, 1.0 / gemm.rotation_dim if gemm.rotation_dim else 1.0, out_dtype)


def rotation_signs(context: Context, name: str) -> Tensor | None:
    """float32 [dim] shared by both operands of the GEMM, or None without a rotation."""
    gemm = context.recipe.gemm(name)
    if gemm.rotation_dim is None:
        return None
    if gemm.rotation.signs == "none":
        return torch.ones(gemm.rotation_dim, device=context.rng.device)
    fixed = gemm.rotation.signs == "fixed"
    return ops.rht_signs(context.rng, context.layer, GEMMS.index(name), gemm.rotation_dim, fixed)


def make_operand(
    held: Held, slot: str, context: Context, signs: Tensor | None, also_packed: bool = False, only_packed: bool = False
) -> Quantized:
    """The operand of a slot from what is there; NVFP4 codes beside the GEMM's own wish or instead of it, to be kept."""
    operand = context.recipe.operand(slot)
    # Behind a rotation only an unquantized operand has this source; it is turned below, as its partner is.
    if operand.source == "fprop_transposed" and not isinstance(held, Tensor) and signs is None:
        return as_it_is(held, slot, context)
    want = wanted(context.recipe, slot, also_packed and operand.spec.is_nvfp4)
    want = ("packed",) if only_packed and operand.spec.is_nvfp4 else want
    arguments = operand.spec, AXES[slot], signs, operand.amax, (context.rng, context.layer, SLOTS.index(slot), want)
    if context.watch is not None:
        context.watch.count(slot, held, operand, AXES[slot], signs, context.rng, context.layer)
    if isinstance(held, NVFP4Tensor):
        return as_it_is(held, slot, context) if is_plain(operand, signs) else quantize_packed(held, *arguments)
    if isinstance(held, Quantized):  # FP8: its one scale stays outside
        inner = quantize_tensor(held.values.to(torch.bfloat16), *arguments)
        packed = inner.packed  # has the tensor's scale a second time, for GEMMs of codes
        if packed is not None:
            packed = replace(packed, global_scale=packed.global_scale * held.scale)
        return Quantized(inner.values, held.scale if inner.scale is None else inner.scale * held.scale, packed)
    return quantize_tensor(held, *arguments)


def quantize_tensor(x: Tensor, spec, axis: int, signs: Tensor | None, amax: str | float, rest: tuple) -> Quantized:
    largest = None if spec.grid == "none" else ops.amax(x, axis, signs, spec.per_row)
    return ops.quantize(x, spec, axis, fixed_or(amax, largest), signs, *rest)


def quantize_packed(p: NVFP4Tensor, spec, axis: int, signs: Tensor | None, amax: str | float, rest: tuple) -> Quantized:
    largest = None if spec.grid == "none" else ops.amax_packed(p, axis, signs, spec.per_row)
    return ops.requantize(p, spec, axis, fixed_or(amax, largest), signs, *rest)


def fixed_or(amax: str | float, largest: Tensor | None) -> Tensor | None:
    """A fixed amax is that of the tensor the quantizer sees: rotated, not normalised, without an outer scale.

    NaN where the measured one, `largest`, is not finite: a bad number must reach the output (design.md 3.6).
    """
    if amax == "exact" or largest is None:
        return largest
    return torch.where(largest.isfinite(), torch.full_like(largest, amax), float("nan"))


def is_plain(operand: Operand, signs: Tensor | None) -> bool:
    return not operand.is_quantized and signs is None


def wanted(recipe: Recipe, slot: str, also_packed: bool) -> tuple[str, ...]:
    """Packed codes for a GEMM that multiplies those, if both its operands have them; else values."""
    operands = recipe.gemm(slot.split(".")[0]).operands
    want = gemms.wants() if all(operand.spec.is_nvfp4 for operand in operands) else "values"
    return (want, "packed") if also_packed and want != "packed" else (want,)


def as_it_is(held: NVFP4Tensor | Quantized, slot: str, context: Context) -> Quantized:
    """A kept operand without another quantization, in the natural layout of the slot."""
    if isinstance(held, Quantized):
        return held
    quantized_here = context.recipe.operand(slot).source == "input"  # then it is stored along this slot's contraction
    if "packed" in wanted(context.recipe, slot, False):
        return Quantized(None, held.global_scale, held if quantized_here else held.transposed())
    return ops.dequantize(held, AXES[slot] if quantized_here else 1)


def keeps_fprop(recipe: Recipe, slot: str) -> bool:
    """Whether the backward's operand `slot` is made from what fprop multiplied (else from the tensor itself)."""
    return recipe.operand(slot).source != "input" and recipe.operand(f"fprop.{FPROP_SLOT[slot]}").is_quantized


def keep_input(x: Tensor, context: Context) -> Held:
    """What wgrad needs of the original x: its operand, made now and smaller than x, or x itself."""
    operand = context.recipe.operand("wgrad.x")
    if operand.source != "input" or not operand.is_quantized:
        return x
    return hold(make_operand(x, "wgrad.x", context, rotation_signs(context, "wgrad"), only_packed=True), operand)


def hold(quantized: Quantized, operand: Operand) -> Held:
    """The smallest exact form of an operand: NVFP4 codes, or FP8 bytes beside their scale."""
    if quantized.packed is not None:
        return quantized.packed
    return Quantized(quantized.values.to(FP8_DTYPES[operand.spec.grid]), quantized.scale)


def flatten(held: Held) -> tuple[Tensor, ...]:
    if isinstance(held, Tensor):
        return (held,)
    if isinstance(held, NVFP4Tensor):
        return held.codes, held.block_scales, held.global_scale
    return held.values, held.scale


def rebuild(kind: type, parts: list[Tensor]) -> Held:
    """The inverse of `flatten`."""
    return kind(*parts) if kind in (NVFP4Tensor, Quantized) else parts[0]
