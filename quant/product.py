"""What a linear layer multiplies: the questions that every recipe answers, and three products.

Y = X W^T, dX = dY W and dW = dY^T X, of X [M,K] bf16, W [N,K] float32 (the master) and dY [M,N] bf16. Six operand slots
(quant/slots.py) are one way; what slots can't say is a class of its own (quant/products). A product is frozen, hashable
plain data; state that a layer needs lies in its module.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from kernels.formats.nvfp4 import NVFP4Tensor
from quant.linear import Call, QuantLinear

BYTES_BF16 = 2.0


@dataclass(frozen=True)
class Kept:
    """Bytes per element of what the linear layers keep for the backward, beside the master weights."""

    inputs: float = BYTES_BF16
    weights: float = 0.0

    @property
    def is_quantized(self) -> bool:
        return self.inputs < BYTES_BF16 or self.weights > 0


@dataclass(frozen=True)
class Divisor:
    """`number` must divide a layer's `size`: in_features, out_features, or tokens of a micro-batch. `what` asks it.

    forward: already of a batch that only goes forward, as evaluation's do.
    """

    size: str
    number: int
    what: str
    forward: bool = True


class Product:
    """The base of all. Below are the answers of a product that asks nothing of shapes, machine and compiler."""

    name: str
    # Its whole name where it isn't `name` and the fields that differ from its file (quant.library.label).
    label: str | None = None
    # False: torch.compile breaks its graph at each layer, and no CUDA graph can hold it.
    fullgraph: ClassVar[bool] = True
    # Of the operands of every GEMM, where `operands` doesn't say them; None: quant/price.py has no price of it.
    gemm_bits: ClassVar[int | None] = None
    # The hook (training/hooks) that fits what the layers need: a run without it is refused.
    hook: ClassVar[str | None] = None

    @property
    def is_quantized(self) -> bool:
        raise NotImplementedError

    @property
    def recomputable(self) -> bool:
        """Whether a second forward on the same numbers computes the same and changes nothing."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides the numerics, and the name; JSON-able."""
        raise NotImplementedError

    def numerics(self) -> dict[str, Any]:
        """What a run's hash covers: equal for two recipes that compute the same."""
        return {key: value for key, value in self.to_dict().items() if key != "name"}

    def describe(self, label: str) -> list[str]:
        """Lines for the start screen."""
        return [f"{label}: {', '.join(f'{key} {value}' for key, value in self.to_dict().items())}"]

    def require(self) -> None:
        """Raises RuntimeError, with the reason and what to install, where this machine can't run it."""

    def unsupported(self) -> str | None:
        """Why the chosen back ends can't multiply it, with what to type, or None."""
        return None

    def divisors(self) -> Iterator[Divisor]:
        """What must divide a layer's sizes."""
        yield from ()

    def kept_bytes(self) -> Kept:
        return Kept()

    def module_state(self) -> frozenset[Any]:
        """What a layer's module must have been built with for it: a phase of a run can't ask for more."""
        return frozenset()

    def operands(self) -> dict[str, Any]:
        """{slot: quant.recipe.Operand} of operands whose quantizers are ours, to be audited and counted."""
        return {}

    def more_flops(self, shape: tuple[int, int], tokens: int) -> float:
        """What a layer [N, K] multiplies beside its three GEMMs, in BF16, for a batch of so many tokens at once."""
        return 0.0

    def audited(self) -> Any:
        """The quant.recipe.Recipe whose quantizers quant.audit measures, or None."""
        return None

    def plain(self) -> "Product":
        """The same layer unquantized."""
        raise NotImplementedError

    def nvfp4_weight(self, weight: Tensor) -> NVFP4Tensor | None:
        """`weight` as fprop multiplies it, packed; None where that is unquantized.

        ValueError, with the reason, where NVFP4 codes and scales don't say it."""
        if self.is_quantized:
            raise ValueError(f"{self.name} isn't made of operand slots")
        return None

    def alone(self) -> dict[str, "Product"]:
        """{GEMM: the same with this one alone quantized}; empty where they can't be parted."""
        return {}

    @property
    def forward_draws(self) -> bool:
        """Whether the forward takes random bits or signs, so that another draw is another forward."""
        return True

    def exact_backward(self) -> "Product":
        """The same forward, and the exact gradients through it: what the forward kept, multiplied without
        rounding. What its forward keeps serves this one's gradients as well.

        Raises ValueError where forward and backward look the same."""
        raise ValueError(f"recipe {self.name}: its backward can't be parted from its forward; use a recipe of slots")

    def build(self, linear: nn.Linear, index: int, rng: Tensor) -> QuantLinear:
        """The layer that replaces `linear`, with the same Parameter; see QuantLinear."""
        return QuantLinear(linear, self, index, rng)

    def forward(self, call: Call, x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Sequence[Any]]:
        """Y bf16, and what the backward needs: containers of quant/held.py, none unless `keep`."""
        raise NotImplementedError

    def gradients(self, call: Call, dy: Tensor, needed: tuple[bool, bool], kept: Sequence[Any]) -> tuple[Any, Any]:
        """dY as the two gradients take it, made together since it is read once; anything where it isn't needed.

        kept: what `forward` kept."""
        raise NotImplementedError

    def input_gradient(self, call: Call, dy: Any, kept: Sequence[Any]) -> Tensor:
        """dX bf16, from the first of `gradients` and what `forward` kept."""
        raise NotImplementedError

    def weight_gradient(self, call: Call, dy: Any, kept: Sequence[Any]) -> Tensor:
        """dW float32, from the second of `gradients` and what `forward` kept."""
        raise NotImplementedError
