"""What an operand is made from: the tensor as it came, or what an earlier quantization left of it.

A layer keeps these from its forward to its backward, so each says which tensors autograd has to keep (`tensors`) and
what makes it again from those (`form`). A slot asks it for an operand by a `Wish`: `quantize` makes one from its
values, `operand` hands it over without another quantization. A container of another format is one more class here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels import quantize as ops
from kernels.formats.minifloat import FP8_DTYPES
from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.philox import Draw
from kernels.quantize import Quantized
from kernels.spec import QuantSpec


@dataclass(frozen=True)
class Wish:
    """What one slot asks for: its quantizer, along which axis, rotated by which signs, by which random bits.

    turned: what is kept was made along the other axis, for fprop. want: "values", "packed" or both. feedback: of
    shaped rounding (kernels.quantize.quantize_shaped), or None.
    """

    spec: QuantSpec
    axis: int
    signs: Tensor | None
    amax: str | float
    draw: Draw
    turned: bool
    want: tuple[str, ...]
    feedback: Tensor | None = None

    @property
    def is_identity(self) -> bool:
        return self.spec.grid == "none" and self.signs is None

    def largest(self, measure: Callable, x: Any) -> Tensor | None:
        """The amax to quantize by: `measure`d (ops.amax, ops.amax_packed), or the fixed one; None for grid none."""
        if self.spec.grid == "none":
            return None
        return fixed_or(self.amax, measure(x, self.axis, self.signs, self.spec.per_row))

    def quantize(self, x: Tensor) -> Quantized:
        largest = self.largest(ops.amax, x)
        if self.feedback is not None:
            return ops.quantize_shaped(x, self.spec, largest, self.feedback, self.want)
        return ops.quantize(x, self.spec, self.axis, largest, self.signs, self.draw, self.want)

    def requantize(self, p: NVFP4Tensor) -> Quantized:
        if not p.tensor_core:  # no kernel reads its codes: made values once, for the maximum and the quantizer
            return self.quantize(ops.dequantize(p).values).under(p.global_scale)
        largest = self.largest(ops.amax_packed, p)
        return ops.requantize(p, self.spec, self.axis, largest, self.signs, self.draw, self.want)


def fixed_or(amax: str | float, largest: Tensor) -> Tensor:
    """A fixed amax is that of the tensor the quantizer sees: rotated, not normalised, without an outer scale.

    NaN where the measured one, `largest`, is not finite: a bad number must reach the output (docs/numerics.md#6-edges).
    """
    if amax == "exact":
        return largest
    return torch.where(largest.isfinite(), torch.full_like(largest, amax), float("nan"))


@dataclass(frozen=True)
class Plain:
    """The tensor as it came: x or dY in BF16, or the FP32 master weight, which is quantized from its BF16 rounding."""

    x: Tensor

    is_quantized: ClassVar[bool] = False

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.x,)

    @property
    def form(self) -> Callable[..., "Held"]:
        return Plain

    def values(self) -> Tensor:
        """What a quantizer reads."""
        return self.x.to(torch.bfloat16)

    def quantize(self, wish: Wish) -> Quantized:
        return wish.quantize(self.values())


@dataclass(frozen=True)
class Packed:
    """4-bit codes and their scales."""

    packed: NVFP4Tensor

    is_quantized: ClassVar[bool] = True

    def tensors(self) -> tuple[Tensor, ...]:
        return self.packed.tensors()

    @property
    def form(self) -> Callable[..., "Held"]:
        return packed if self.packed.spec is None else partial(packed, spec=self.packed.spec)

    def values(self) -> Tensor:
        """What a quantizer reads: without the global scale, which stays outside."""
        return self.packed.values()

    def quantize(self, wish: Wish) -> Quantized:
        return self.operand(wish) if wish.is_identity else wish.requantize(self.packed)

    def operand(self, wish: Wish) -> Quantized:
        """In the natural layout of the slot."""
        if "packed" in wish.want:
            return Quantized(None, self.packed.global_scale, self.packed.transposed() if wish.turned else self.packed)
        return ops.dequantize(self.packed, 1 if wish.turned else wish.axis)


def packed(*tensors: Tensor, spec: QuantSpec | None = None) -> Packed:
    return Packed(NVFP4Tensor.holding(tensors, spec))


@dataclass(frozen=True)
class Float8:
    """FP8 bytes beside their scale; natural layout, whichever the contraction."""

    bytes: Tensor
    scale: Tensor

    is_quantized: ClassVar[bool] = True

    def tensors(self) -> tuple[Tensor, ...]:
        return self.bytes, self.scale

    @property
    def form(self) -> Callable[..., "Held"]:
        return Float8

    def values(self) -> Tensor:
        """What a quantizer reads: without the scale, which stays outside."""
        return self.bytes.to(torch.bfloat16)

    def quantize(self, wish: Wish) -> Quantized:
        inner = wish.quantize(self.values())
        packed = inner.packed  # has the tensor's scale a second time, for GEMMs of codes
        if packed is not None:
            packed = replace(packed, global_scale=packed.global_scale * self.scale)
        return Quantized(inner.values, self.scale if inner.scale is None else inner.scale * self.scale, packed)

    def operand(self, wish: Wish) -> Quantized:
        return Quantized(self.bytes, self.scale)


Held = Plain | Packed | Float8


def hold(made: Quantized, spec: QuantSpec) -> Held:
    """The smallest exact form of an operand that was made for a GEMM."""
    if made.packed is not None:
        return Packed(made.packed)
    return Float8(made.values.to(FP8_DTYPES[spec.grid]), made.scale)
