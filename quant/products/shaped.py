"""Six slots whose forward operands are rounded with error feedback (kernels/quantize/feedback.py says by which metric).

    w   W in the metric of X^T X, of training tokens that came before
    x   X in the metric of W^T W: each token by itself, so that nothing of another token reaches its row
The backward is the slots': it re-quantizes what the forward multiplied where its `source` says so. The matrices F are
state of the layers, set by the hook `feedback` (training/hooks/feedback.py) and constant between its refreshes, in
evaluations too; until the first they are zero, which is plain rounding.
Source: docs/results/candidates.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels import gemm as gemms
from kernels.quantize import Quantized
from kernels.quantize.feedback import fit, width
from quant.linear import Call, QuantLinear
from quant.product import Product
from quant.recipe import Recipe

OPERANDS = ("x", "w")
GRAM_TOKENS = 8192  # of a step's first micro-batch, at most
DAMPING = 0.1  # of a fit: times the mean of the metric's diagonal, added to it


@dataclass(frozen=True)
class Shaped(Recipe):
    """shape: which operands of fprop are rounded so. rank: of X's metric only so many directions count, where handing
    errors on through them is cheaper than as a whole; None: all."""

    shape: tuple[str, ...] = OPERANDS
    rank: int | None = None

    hook: ClassVar[str] = "feedback"

    def __post_init__(self):
        super().__post_init__()
        if not set(self.shape) <= set(OPERANDS):
            raise ValueError(f"quant.shape={list(self.shape)}: use [x], [w] or [x,w]")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1 or "x" not in self.shape):
            raise ValueError(
                f"quant.rank={self.rank!r}: a number of directions, 64 say, where quant.shape has x; or null"
            )
        for name in self.shape:
            operand = self.operand(f"fprop.{name}")
            nvfp4 = operand.spec.tensor_core and not operand.spec.is_square
            if operand.is_quantized and not (nvfp4 and operand.spec.rounding == "rtn"):
                raise ValueError(
                    f"quant.fprop.{name}: shaped rounding is for grid=e2m1 in 1x16 blocks and rounding=rtn; leave "
                    f"{name} out of quant.shape={list(self.shape)}"
                )
        if self.shape and self.fprop.rotation_dim is not None:
            raise ValueError("quant.fprop.rotation: shaped rounding reads unrotated operands; set rotation.dim=null")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "Shaped":
        fields = dict(mapping)
        shape = fields.pop("shape", None)
        rank = fields.pop("rank", None)
        fields.pop("scheme", None)
        if not isinstance(shape, list | tuple | None):
            raise ValueError(f"quant.shape={shape!r}: use [x], [w] or [x,w]")
        made = Recipe.from_dict(fields)
        return cls(made.name, made.fprop, made.dgrad, made.wgrad, tuple(OPERANDS if shape is None else shape), rank)

    def to_dict(self) -> dict[str, Any]:
        rank = {} if self.rank is None else {"rank": self.rank}
        return super().to_dict() | {"scheme": "shaped", "shape": list(self.shape)} | rank

    def describe(self, label: str) -> list[str]:
        rank = "" if self.rank is None else f" of rank {self.rank}"
        metric = {"x": f"fprop.x by W^T W{rank}", "w": "fprop.w by X^T X"}
        return [*super().describe(label), f"  shaped    {', '.join(metric[name] for name in self.shape) or 'nothing'}"]

    def more_flops(self, shape: tuple[int, int], tokens: int) -> float:
        """Errors times F, half of which is zero (or in and out of the directions that count); not the refits with their
        Gram matrix, in one of dozens of steps."""
        rows, columns = shape
        wide = columns if self.rank is None else min(columns, 4 * self.rank)
        of = {"x": tokens * wide, "w": rows * columns}
        return sum(of[name] * columns for name in self.shape if self.shapes(name))

    def plain(self) -> Product:
        return Recipe.bf16()

    def module_state(self) -> frozenset[Any]:
        """Feedback matrices, X's of one rank."""
        return frozenset((name, self.rank if name == "x" else None) for name in self.shape if self.shapes(name))

    def alone(self) -> dict[str, Product]:
        return {gemm: replace(product, shape=self.shape, rank=self.rank) for gemm, product in super().alone().items()}

    def shapes(self, name: str) -> bool:
        """Whether operand `name` of fprop is rounded with feedback."""
        return name in self.shape and self.operand(f"fprop.{name}").is_quantized

    def feedback(self, call: Call, slot: str) -> Tensor | None:
        gemm, name = slot.split(".")
        if gemm != "fprop" or not self.shapes(name):
            return None
        if name not in call.fitted:
            raise ValueError(
                f"recipe {self.name}: this layer was built for another recipe and has no feedback matrices"
            )
        return call.fitted[name]

    def build(self, linear: nn.Linear, index: int, rng: Tensor) -> "ShapedLinear":
        return ShapedLinear(linear, self, index, rng)


class ShapedLinear(QuantLinear):
    """y = x W^T with operands shaped by F_x and F_w, bf16 [K, K] or the factors of recipe.rank. `seen`: bf16
    [GRAM_TOKENS, K], X of the newest training step's first micro-batch (what it hasn't is zero): a captured step copies
    that much in every step, where X^T X, of which one step in dozens has need, would be a GEMM. All are written in
    place: compiled graphs and CUDA graphs read them where they lie."""

    hook = "feedback"

    def __init__(self, linear: nn.Linear, recipe: Shaped, layer: int, rng: Tensor):
        super().__init__(linear, recipe, layer, rng)
        self.rank = recipe.rank
        self.shaped = tuple(name for name in OPERANDS if recipe.shapes(name))
        for name in self.shaped:
            columns = width(self.in_features, self.rank_of(name))
            zeros = torch.zeros((self.in_features, columns), dtype=torch.bfloat16, device=rng.device)
            self.register_buffer(f"feedback_{name}", zeros, persistent=False)
        if "w" in self.shaped:
            zeros = torch.zeros((GRAM_TOKENS, self.in_features), dtype=torch.bfloat16, device=rng.device)
            self.register_buffer("seen", zeros, persistent=False)

    def fitted(self) -> dict[str, Tensor]:
        return {name: self._buffers[f"feedback_{name}"] for name in self.shaped}

    def refitted(self, name: str, gram: Tensor, damping: float) -> Tensor:
        """F of an operand by its metric [K, K]."""
        return fit(gram, damping, self.rank_of(name))

    def rank_of(self, name: str) -> int | None:
        return self.rank if name == "x" else None

    def forward(self, x: Tensor) -> Tensor:
        if "w" in self.shaped and torch.is_grad_enabled() and self.training:
            self.see(x.detach().reshape(-1, self.in_features)[:GRAM_TOKENS])
        return super().forward(x)

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """The global batch's first micro-batch alone, so that the result doesn't depend on the number of ranks."""
        target = self.seen[: len(x)]
        target.copy_(torch.where(self.rng[2] == 0, x, target))

    def gram(self) -> Tensor:
        """X^T X of what was seen, float32 [K, K]."""
        rows = Quantized(self.seen, None)
        return gemms.gemm(rows, rows, "wgrad", 1.0, torch.float32)
