"""Scheme `trust_mask`: a forward behind a fixed Hadamard transform, whose clipped elements get no gradient.

Quartet (arXiv 2505.14669) with QuEST's forward (arXiv 2502.05003). With H the normalised Hadamard matrix in blocks of
`hadamard` along K, without signs, and Q the quantizers of fprop's slots (scale_rule rms clips on purpose):

    Xh = Q(X H), Wh = Q(W H), Y = Xh Wh^T
    Mx, Mw: 1 where an element of X H or W H lies within 6 scales of its block, 0 where it was clipped
    dX = (Mx * (dY Wh)) H, dW = (Mw * (dY^T Xh)) H          H is its own inverse

The products of the gradients are those of the slots dgrad and wgrad, in the rotated space, FP32 until they are turned
back. X H and W H are BF16, rounded once from FP32. Kept beside what the slots keep: a bit an element for each mask.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.formats.scales import PowersOfTwo, bit_numbers
from kernels.rotation import hadamard
from kernels.spec import MXFP4_SCALES, ROTATION_DIMS
from quant.linear import Call
from quant.product import BYTES_BF16, Divisor, Kept
from quant.products.over_slots import OverSlots
from quant.recipe import Gemm, Rotation

BYTES_BIT = 1 / 8
FPROP = ("fprop.x", "fprop.w")


@dataclass(frozen=True)
class Mask:
    """Which elements of [R, C] get a gradient: uint8 [R, C/8], the first of eight in the lowest bit."""

    bits: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.bits,)

    @property
    def form(self) -> type["Mask"]:
        return Mask

    @classmethod
    def of(cls, within: Tensor) -> "Mask":
        eights = within.unflatten(-1, (-1, 8)).to(torch.int32)
        return cls((eights << bit_numbers(within)).sum(-1).to(torch.uint8))

    def applied(self, gradient: Tensor) -> Tensor:
        within = (self.bits[..., None].to(torch.int32) >> bit_numbers(self.bits)) & 1
        return torch.where(within.flatten(-2) == 1, gradient, 0.0)


@dataclass(frozen=True)
class TrustMask(OverSlots):
    """hadamard: the size of the forward's transform. ValueError for slots that a mask has no meaning for."""

    hadamard: int = 32

    scheme: ClassVar[str] = "trust_mask"

    def __post_init__(self):
        if type(self.hadamard) is not int or self.hadamard not in ROTATION_DIMS:
            raise ValueError(f"quant.hadamard={self.hadamard!r}; use one of {', '.join(map(str, ROTATION_DIMS))}")
        if self.slots.fprop.rotation.dim is not None:
            raise ValueError(
                f"quant.fprop.rotation.dim={self.slots.fprop.rotation.dim}: scheme trust_mask rotates the forward by "
                "quant.hadamard; leave it out"
            )
        for slot in FPROP:
            spec = self.slots.operand(slot).spec
            if spec.grid != "none" and (spec.scales != MXFP4_SCALES or spec.rounding != "rtn" or spec.prescale != 1):
                raise ValueError(
                    f"quant.{slot}: scheme trust_mask takes grid none, or scales [1x32 e8m0] with rounding=rtn and "
                    "prescale=1, and scale_rule=rms to clip as published"
                )

    @property
    def about(self) -> str:
        return (
            f"fprop behind a fixed Hadamard transform of {self.hadamard}; clipped elements of X and W get no gradient"
        )

    def divisors(self) -> Iterator[Divisor]:
        yield Divisor("in_features", self.hadamard, f"Hadamard transform of {self.name}")
        yield from self.slots.divisors()

    def kept_bytes(self) -> Kept:
        """A weight that the slots take from the master is the rotated one here, in BF16."""
        kept, masks = self.slots.kept_bytes(), [BYTES_BIT * self._clips(slot) for slot in FPROP]
        return Kept(kept.inputs + masks[0], (kept.weights or BYTES_BF16) + masks[1])

    def gemm(self, name: str) -> Gemm:
        """fprop with the transform that it runs behind."""
        found = self.slots.gemm(name)
        return Gemm(Rotation(self.hadamard, signs="none"), found.operands) if name == "fprop" else found

    def forward(self, call: Call, x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Sequence[Any]]:
        x, weight = (self.turned(operand.to(torch.bfloat16)).to(torch.bfloat16) for operand in (x, weight))
        y, kept = self.slots.forward(call, x, weight, keep)
        if not keep:
            return y, ()
        operands = zip(FPROP, (x, weight), strict=True)
        return y, (*kept, *(self.mask(slot, operand) for slot, operand in operands if self._clips(slot)))

    def gradients(self, call: Call, dy: Tensor, needed: tuple[bool, bool], kept: Sequence[Any]) -> tuple[Any, Any]:
        return self.slots.gradients(call, dy, needed, kept[:2])

    def input_gradient(self, call: Call, dy: Any, kept: Sequence[Any]) -> Tensor:
        a, signs = dy
        b = self.slots.operand_of(call, kept[0], "dgrad.w", self.slots.partner("dgrad", signs))
        dx = self.slots.multiply(a, b, "dgrad", torch.float32)  # turned before dX's one rounding
        return self.turned(kept[2].applied(dx) if self._clips("fprop.x") else dx).to(torch.bfloat16)

    def weight_gradient(self, call: Call, dy: Any, kept: Sequence[Any]) -> Tensor:
        dw = self.slots.weight_gradient(call, dy, kept[:2])
        return self.turned(kept[-1].applied(dw) if self._clips("fprop.w") else dw)

    def turned(self, x: Tensor) -> Tensor:
        """x H, FP32 [rows, K]."""
        matrix = hadamard(self.hadamard, x.device)
        return ((x.to(torch.float32).unflatten(-1, (-1, self.hadamard)) @ matrix) * self.hadamard**-0.5).flatten(-2)

    def mask(self, slot: str, x: Tensor) -> Mask:
        """Where x, which the slot quantizes, lies within the levels under its block's scale."""
        spec = self.slots.operand(slot).spec
        groups = x.to(torch.float32).unflatten(-1, (-1, spec.scaling.group))
        scales = spec.scaling.round(spec.scaling.extent(groups, False).largest)
        return Mask.of((groups.abs() <= spec.family.top * scales).flatten(-2))

    def _clips(self, slot: str) -> bool:
        scaling = self.slots.operand(slot).spec.scaling
        return isinstance(scaling, PowersOfTwo) and scaling.rule in ("floor", "even", "rms")
