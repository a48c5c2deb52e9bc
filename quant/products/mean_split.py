"""Scheme `mean_split`: the means of X and dY over a micro-batch's tokens are quantized apart from what is left of them.

Averis (arXiv 2603.10444 v2; no code was published). With mu [K] the mean of X over its M rows, nu [N] that of dY,

    R = X - mu, S = dY - nu                         in BF16, mu and nu rounded to BF16 first
    Rq, Wq, Sq: what the slots make of R, W and S;  mq: RTN of mu, nq: SR of nu, one row with an amax of its own
    Y  = Rq Wq^T + 1 (Wq mq)^T                      1: a column of M ones
    dX = Sq Wq + 1 (Wq^T nq)^T
    dW = Sq^T Rq + (Sq^T 1) mq^T + nq (Rq^T 1 + M mq)^T       what is left sums to 0 only before it is rounded

The terms of the means are FP32 and are added to the product before its one rounding. dgrad's rotation leaves its
term out: behind one, that term takes W as the forward left it. Sums over tokens of operands that are rotated along the
tokens are products with rotated ones. Kept beside what the slots keep: mq.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.philox import Draw
from kernels.quantize import Quantized
from kernels.rotation import rotated
from kernels.spec import NO_QUANT, NVFP4_SCALES, QuantSpec
from quant.held import Held, Plain, Wish
from quant.linear import Call
from quant.names import SLOTS
from quant.products.over_slots import OverSlots

# Of the random bits of nq: the stream after those of the six slots.
MEAN_STREAM = len(SLOTS)


@dataclass(frozen=True)
class MeanSplit(OverSlots):
    """ValueError for slots whose format no row of a mean has. mean_x, mean_dy: the quantizers of mu and nu."""

    mean_x: QuantSpec = field(init=False, compare=False, repr=False)
    mean_dy: QuantSpec = field(init=False, compare=False, repr=False)

    scheme: ClassVar[str] = "mean_split"

    def __post_init__(self):
        if self.slots.fprop.rotation.dim is not None:
            raise ValueError(
                f"quant.fprop.rotation.dim={self.slots.fprop.rotation.dim}: scheme mean_split multiplies means by the "
                "forward's own W; set quant.fprop.rotation.dim=null"
            )
        for slot in ("fprop.x", "dgrad.dy"):
            spec = self.slots.operand(slot).spec
            if spec.per_row or (spec.is_blocked and not spec.scaling.corrected):
                raise ValueError(
                    f"quant.{slot}: scheme mean_split quantizes a mean as one row under E4M3 scales or one FP32 scale; "
                    f"got scales [{', '.join(map(str, spec.scales))}]: use scales [tensor fp32, 1x16 e4m3]"
                )
        # Found once: torch.compile then meets constants.
        object.__setattr__(self, "mean_x", of_row(self.slots.operand("fprop.x").spec, "rtn"))
        object.__setattr__(self, "mean_dy", of_row(self.slots.operand("dgrad.dy").spec, "sr"))

    @property
    def about(self) -> str:
        return "X and dY less their means over tokens; the means, a row each in the slot's grid, multiply in FP32"

    def forward(self, call: Call, x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Sequence[Any]]:
        mean, rest = split(x)
        mq = quantized(call, mean, self.mean_x)
        qx, kept_x = self.slots.input_operands(call, Plain(rest), None, keep)
        qw, kept_w = self.slots.weight_operand(call, Plain(weight), None, keep)
        y = self.slots.multiply(qx, qw, "fprop", torch.float32) + (dense(qw) * mq).sum(-1)
        return y.to(torch.bfloat16), (kept_w, kept_x, Plain(mq)) if keep else ()

    def gradients(self, call: Call, dy: Tensor, needed: tuple[bool, bool], kept: Sequence[Any]) -> tuple[Any, Any]:
        mean, rest = split(dy)
        nq = quantized(call, mean, self.mean_dy)
        return tuple((made, nq) for made in self.slots.gradients(call, rest, needed, kept[:2]))

    def input_gradient(self, call: Call, dy: Any, kept: Sequence[Any]) -> Tensor:
        (a, signs), nq = dy
        b = self.slots.operand_of(call, kept[0], "dgrad.w", self.slots.partner("dgrad", signs))
        w = dense(b, axis=0) if signs is None else as_kept(call, kept[0])
        dx = self.slots.multiply(a, b, "dgrad", torch.float32) + (w * nq.t()).sum(0)
        return dx.to(torch.bfloat16)

    def weight_gradient(self, call: Call, dy: Any, kept: Sequence[Any]) -> Tensor:
        ((a, signs), nq), mq = dy, kept[2].x
        partner = self.slots.partner("wgrad", signs)
        b = self.slots.operand_of(call, kept[1], "wgrad.x", partner)
        alpha = self.slots.gemm("wgrad").alpha
        of_dy, of_x = over_tokens(a, partner) * alpha, over_tokens(b, signs) * alpha
        rows = b.packed.shape[1] if b.values is None else b.values.shape[0]
        dw = self.slots.multiply(a, b, "wgrad", torch.float32)
        return dw + of_dy.unsqueeze(1) * mq + nq.t() * (of_x + rows * mq)


def of_row(spec: QuantSpec, rounding: str) -> QuantSpec:
    """A slot's format for one row: its grid under E4M3 scales, or FP8 or none as it is."""
    if not spec.is_blocked:
        return spec
    select = spec.select if rounding == "rtn" else "absmax"
    return QuantSpec.resolve(spec.grid, NVFP4_SCALES, select=select, rounding=rounding)


def quantized(call: Call, mean: Tensor, spec: QuantSpec) -> Tensor:
    """FP32 [1, C]: the mean, quantized with an amax of its own."""
    draw = Draw(call.rng, call.layer, MEAN_STREAM)
    return dense(Wish(spec, 1, None, "exact", draw, False, ("values",)).quantize(mean))


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over rows [1, C] and what is left of x [R, C], both BF16."""
    mean = x.to(torch.float32).mean(0, keepdim=True).to(torch.bfloat16)
    return mean, (x.to(torch.float32) - mean.to(torch.float32)).to(torch.bfloat16)


def dense(q: Quantized, axis: int = 1) -> Tensor:
    """FP32 values with their scale, in the natural layout; packed codes lie along `axis`."""
    values = q.values
    if values is None:
        values = q.packed.values() if axis == 1 else q.packed.values().t()
    return values.to(torch.float32) if q.scale is None else values.to(torch.float32) * q.scale


def as_kept(call: Call, held: Held) -> Tensor:
    """FP32: what is kept, without another quantization."""
    return dense(held.quantize(Wish(NO_QUANT, 1, None, "exact", Draw(call.rng, call.layer), False, ("values",))))


def over_tokens(q: Quantized, rotation: Tensor | None) -> Tensor:
    """FP32 [C]: the sum over tokens of an operand [M, C] of wgrad; `rotation`: of its partner, for the ones."""
    values = dense(q, axis=0)
    if rotation is None:
        return values.sum(0)
    ones = rotated(torch.ones(1, values.shape[0], device=values.device), rotation)
    return (values * ones.t()).sum(0)
