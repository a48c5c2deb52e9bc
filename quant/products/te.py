"""Recipes `fp8_te` and `nvfp4_te`: the linear layer of NVIDIA's Transformer Engine, a yardstick for our own `fp8` and
`nvidia`. Needs a GPU, for NVFP4 a Blackwell one: nvfp4_te has never run, only been driven against a stand-in (tests).

scaling   scale                                                      grids                    state
current   one per tensor, from this tensor's amax                    E4M3, dY in E5M2         none
delayed   one per tensor, from the largest of 1024 earlier amaxes    E4M3, dY in E5M2         amax history and scale
block     a power of two per 1x128 (X, dY) or 128x128 (W)            E4M3                     none
(NVFP4)   E4M3 per 1x16 (X, dY) or 16x16 (W) under one of the tensor  E2M1                     none

Kept from our own contract: Transformer Engine reads X, dY and the BF16 (RNE) of the FP32 master weight; Y and dX come
out in BF16, dW straight from the GEMM in FP32 (its main_grad path). Its own: with current and delayed scaling fprop
sums in the tensor core's short accumulator (fast accumulation), dgrad and wgrad promote to FP32; block always promotes.
NVFP4's stochastic rounding draws from PyTorch's CUDA generator, which no checkpoint holds: a resumed run isn't bitwise.

Exempt from fullgraph (each layer is a graph break) and, with delayed scaling, from world-size invariance: the amax of a
layer is the largest over all ranks. Written against Transformer Engine 2.20.2, whose delayed scaling this file drives
layer by layer (see `TELinear.update`), since its own update would run once for the whole model after every layer.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from base.words import suggestion
from quant.linear import QuantLinear
from quant.product import Divisor, Product
from quant.recipe import Recipe

INSTALL = (
    "on a CUDA machine: pip install --no-build-isolation 'nibble-train[te]' "
    "(scripts/te/carry_te.py carries it to one without internet)"
)
SCALINGS = ("current", "delayed", "block")
AMAX_HISTORY = 1024  # micro-batches; Transformer Engine's default
FOUR_OVER_SIX = ("none", "weights", "activations", "all")
BACKWARDS = ("quantized", "dequantized", "high_precision")
# Transformer Engine's quantizers per linear layer: x, w, y forward; dy, dx backward (y and dx stay BF16, unused).
DIRECTIONS = {"fwd": ("forward", 3), "bwd": ("backward", 2)}


@dataclass(frozen=True)
class TEProduct(Product):
    """What both recipes answer alike. multiples: what must divide a layer's features, and its tokens."""

    is_quantized: ClassVar[bool] = True
    fullgraph: ClassVar[bool] = False
    is_delayed: ClassVar[bool] = False
    multiples: ClassVar[tuple[int, int]]
    why_multiple: ClassVar[str]

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "TEProduct":
        """From a recipe file's mapping (`scheme` may be there). Raises ValueError that names the nearest known key."""
        known = [field.name for field in fields(cls)]
        for key in mapping:
            if key not in (*known, "scheme"):
                near = suggestion(key, known, f"known: {', '.join(known)}")
                raise ValueError(f"quant: unknown field {key!r} of recipe {cls.name}{near}")
        return cls(**{key: value for key, value in mapping.items() if key != "scheme"})

    def require(self) -> None:
        """Raises RuntimeError, with the reason and what to install, where this machine can't run the recipe."""
        reason = self.unavailable()
        if reason:
            raise RuntimeError(f"recipe {self.label or self.name}: {reason}")

    def unavailable(self) -> str | None:
        """Why this machine can't run it, or None. Imports Transformer Engine where it is found."""
        raise NotImplementedError

    def te_recipe(self) -> Any:
        """Transformer Engine's recipe object. Each field that it would take from an environment variable is set."""
        raise NotImplementedError

    def divisors(self) -> Iterator[Divisor]:
        features, tokens = self.multiples
        yield Divisor("in_features", features, self.why_multiple)
        yield Divisor("out_features", features, self.why_multiple)
        yield Divisor("tokens", tokens, self.why_multiple)

    def plain(self) -> Product:
        return Recipe.bf16()

    def module_state(self) -> frozenset[Any]:
        """Transformer Engine's own recipe object."""
        return frozenset(self.to_dict().items())

    def build(self, linear: nn.Linear, index: int, rng: Tensor) -> "TELinear":
        return TELinear(linear, self, index, rng)


@dataclass(frozen=True)
class Fp8TE(TEProduct):
    """The recipe: `scaling` is current, delayed or block."""

    scaling: str = "current"
    name: str = "fp8_te"

    gemm_bits: ClassVar[int] = 8
    # cuBLAS's FP8 GEMM takes operands whose rows are multiples of 16 bytes; Transformer Engine wants 8 rows of X.
    multiples: ClassVar[tuple[int, int]] = (16, 8)
    why_multiple: ClassVar[str] = "Transformer Engine's FP8 GEMM"

    def __post_init__(self):
        if self.scaling not in SCALINGS:
            raise ValueError(f"quant.scaling={self.scaling!r}; use one of {', '.join(SCALINGS)}")

    @property
    def label(self) -> str:
        return f"{self.name}/{self.scaling}"

    @property
    def is_delayed(self) -> bool:
        return self.scaling == "delayed"

    def to_dict(self) -> dict[str, Any]:
        """What decides the numerics, JSON-able. Transformer Engine's version belongs to the environment's record."""
        history = {"amax_history": AMAX_HISTORY} if self.is_delayed else {}
        return {"name": self.name, "scheme": "fp8_te", "scaling": self.scaling} | history

    def unavailable(self) -> str | None:
        return unavailable(self.scaling)

    def te_recipe(self) -> Any:
        return te_recipe(self.scaling)

    @property
    def recomputable(self) -> bool:
        """Not with delayed scaling: a second forward would move the amax history once more."""
        return not self.is_delayed


@dataclass(frozen=True)
class Nvfp4TE(TEProduct):
    """NVFP4BlockScaling with its options. rht: Hadamard transform of 16 of both operands of wgrad, one sign vector.
    stochastic_rounding: of dY. weights_2d: 16x16 blocks of W. four_over_six: of these tensors, by the squared error.
    backward: quantized, or on the operands that the forward saved (dequantized), or on the BF16 ones (high_precision).
    """

    rht: bool = True
    stochastic_rounding: bool = True
    weights_2d: bool = True
    four_over_six: str = "none"
    backward: str = "quantized"
    name: str = "nvfp4_te"

    gemm_bits: ClassVar[int] = 4
    # Blocks of 16 along both axes of X and dY; cuBLAS's rows of 16 bytes hold 32 codes.
    multiples: ClassVar[tuple[int, int]] = (32, 32)
    why_multiple: ClassVar[str] = "Transformer Engine's NVFP4 GEMM"

    def __post_init__(self):
        for name in ("rht", "stochastic_rounding", "weights_2d"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"quant.{name}={getattr(self, name)!r}; use true or false")
        for name, allowed in (("four_over_six", FOUR_OVER_SIX), ("backward", BACKWARDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"quant.{name}={getattr(self, name)!r}; use one of {', '.join(allowed)}")
        if self.four_over_six in ("activations", "all") and self.rht:
            raise ValueError(
                f"quant.four_over_six={self.four_over_six}: Transformer Engine has no 4/6 behind a Hadamard transform; "
                "set quant.rht=false, or quant.four_over_six=weights"
            )

    @property
    def label(self) -> str:
        changed = [field for field in fields(self) if getattr(self, field.name) != field.default]
        return " ".join([Nvfp4TE.name, *(f"{field.name}={getattr(self, field.name)}" for field in changed)])

    def to_dict(self) -> dict[str, Any]:
        return {"scheme": "nvfp4_te"} | {field.name: getattr(self, field.name) for field in fields(self)}

    def unavailable(self) -> str | None:
        reason = not_installed()
        if reason:
            return reason
        import transformer_engine.pytorch as te

        if not hasattr(te, "is_nvfp4_available"):
            return f"this Transformer Engine has no NVFP4; needs 2.19 or newer: {INSTALL}"
        usable, reason = te.is_nvfp4_available(return_reason=True)
        return None if usable else reason

    def te_recipe(self) -> Any:
        from transformer_engine.common import recipe as te

        return te.NVFP4BlockScaling(
            disable_rht=not self.rht,
            disable_stochastic_rounding=not self.stochastic_rounding,
            disable_2d_quantization=not self.weights_2d,
            row_scaled_activation=False,
            nvfp4_4over6=self.four_over_six,
            nvfp4_4over6_e4m3_use_256="all",
            nvfp4_4over6_err_mode="MSE",
            backward_override=None if self.backward == "quantized" else self.backward,
        )


def not_installed() -> str | None:
    """Why Transformer Engine can't be imported here or has no GPU, or None; imports it."""
    if find_spec("transformer_engine") is None:
        return f"Transformer Engine is not installed; {INSTALL}"
    if not torch.cuda.is_available():
        return "Transformer Engine needs a CUDA GPU of compute capability 8.9 or higher; this machine has none"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return f"Transformer Engine is there but does not import ({error}); {INSTALL}"
    return None


def unavailable(scaling: str) -> str | None:
    """Why this machine can't run fp8_te with this scaling, or None. Imports Transformer Engine where it is found."""
    reason = not_installed()
    if reason:
        return reason
    import transformer_engine.pytorch as te

    available = te.is_fp8_block_scaling_available if scaling == "block" else te.is_fp8_available
    usable, reason = available(return_reason=True)
    return None if usable else reason


def te_recipe(scaling: str) -> Any:
    """Transformer Engine's recipe object. Each field that it would take from an environment variable is set here."""
    from transformer_engine.common import recipe as te

    if scaling == "delayed":
        return te.DelayedScaling(
            fp8_format=te.Format.HYBRID, amax_history_len=AMAX_HISTORY, amax_compute_algo="max", backward_override=None
        )
    if scaling == "current":
        chosen = te.Float8CurrentScaling(use_power_2_scales=False, fp8_format=te.Format.HYBRID, backward_override=None)
    else:
        chosen = te.Float8BlockScaling(use_f32_scales=False, fp8_format=te.Format.E4M3, backward_override=None)
    quantizer = te.QParams(power_2_scale=scaling == "block")
    chosen.fp8_quant_fwd_inp = chosen.fp8_quant_fwd_weight = chosen.fp8_quant_bwd_grad = quantizer
    return chosen


@dataclass(frozen=True)
class Engine:
    """What a layer holds of Transformer Engine. Not an nn.Module, so that the layer doesn't register what is inside."""

    linear: Any  # te.Linear without a parameter of its own
    recipe: Any
    history: Tensor | None  # the buffer that it writes forward amaxes into


@cache
def break_graphs() -> None:
    """Dynamo can't trace Transformer Engine's global state; a planned graph break beats a failed trace.

    Not a decorator: with that, every command would wait a second for Dynamo's import.
    """
    TELinear.forward = torch.compiler.disable(TELinear.forward)


class TELinear(QuantLinear):
    """y = x W^T by Transformer Engine. x [..., K] bf16 -> y [..., N] bf16; weight [N, K] float32, no bias.

    With delayed scaling the state is four buffers (scale_fwd, amax_history_fwd, scale_bwd, amax_history_bwd), plain
    float32 tensors in state_dict; Transformer Engine's own pickled `_extra_state` never appears. Evaluation leaves the
    state untouched. While `recipe` is another one than the layer was built with (quant.plan.changed), that one
    multiplies.
    """

    def __init__(self, linear: nn.Linear, recipe: TEProduct, layer: int, rng: Tensor):
        super().__init__(linear, recipe, layer, rng)
        break_graphs()
        self.own = recipe
        self.is_delayed = recipe.is_delayed
        self.engine: Engine | None = None
        if self.is_delayed:
            for direction, (_, count) in DIRECTIONS.items():
                self.register_buffer(f"scale_{direction}", self.weight.new_ones(count))
                self.register_buffer(f"amax_history_{direction}", self.weight.new_zeros(AMAX_HISTORY, count))

    def forward(self, x: Tensor) -> Tensor:
        if self.recipe != self.own:
            return super().forward(x)
        self.check_input(x)
        import transformer_engine.pytorch as te

        if self.engine is None or self.engine.history is not self._buffers.get("amax_history_fwd"):
            self.engine = self.start()
        is_training = torch.is_grad_enabled()
        if self.is_delayed and not is_training:
            seen = self.amax_history_fwd[0].clone()
        linear = self.engine.linear
        # As an attribute, not a parameter; taken away again since it would keep the whole graph alive.
        linear.weight = self.bf16_weight()
        with te.autocast(enabled=True, recipe=self.engine.recipe):
            y = linear(x)
        linear.weight = None
        if self.is_delayed:
            if is_training:
                self.update("fwd")
            else:
                self.amax_history_fwd[0].copy_(seen)
        return y

    def bf16_weight(self) -> Tensor:
        """The weight as Transformer Engine sees it, marked so that wgrad is written in FP32 into `main_grad`."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return self.weight.detach().to(torch.bfloat16)
        dw = torch.empty_like(self.weight)
        w = Bf16Weight.apply(self.weight, dw, self.after_backward)
        w.main_grad = dw
        w.overwrite_main_grad = True  # GEMM with beta = 0, so dw needs no zeros
        w.grad_added_to_main_grad = False  # its presence makes Transformer Engine return a placeholder as dW
        return w

    def start(self) -> Engine:
        """A te.Linear without parameters whose delayed-scaling state is this layer's buffers."""
        import transformer_engine.pytorch as te
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager, RecipeState

        recipe = self.own.te_recipe()
        linear = te.Linear(
            self.in_features,
            self.out_features,
            bias=False,
            params_dtype=torch.bfloat16,
            device="meta",
            fuse_wgrad_accumulation=True,
        )
        del linear.weight
        if not self.is_delayed:
            return Engine(linear, recipe, None)
        for direction, (mode, count) in DIRECTIONS.items():
            # On its first forward te.Linear inherits scale and history, as tensors, from a state that is there already.
            state = RecipeState.create(recipe, mode=mode, num_quantizers=count, device=self.weight.device)
            state.scale, state.amax_history = self.state(direction)
            linear.fp8_meta[f"scaling_{direction}"] = state
        # A layer with this key is taken as registered for the model-wide update, which so never sees it.
        linear.fp8_meta[FP8GlobalStateManager.get_buffer_info()] = []
        return Engine(linear, recipe, self.amax_history_fwd)

    def state(self, direction: str) -> tuple[Tensor, Tensor]:
        """scale [tensors] and amax history [1024, tensors] of a direction; row 0 collects the current micro-batch."""
        return self._buffers[f"scale_{direction}"], self._buffers[f"amax_history_{direction}"]

    def after_backward(self) -> None:
        if self.is_delayed:
            self.update("bwd")

    @torch.no_grad()
    def update(self, direction: str) -> None:
        """Move this micro-batch's amax into the history and set the scale from its maximum: after each training
        forward (x, w) and each backward (dy). Transformer Engine's own update, for this layer alone."""
        import transformer_engine_torch as tex

        scale, history = self.state(direction)
        held = self.engine.linear.fp8_meta[f"scaling_{direction}"]
        if held.amax_history is not history or held.scale is not scale:
            raise RuntimeError("Transformer Engine did not take over this layer's amax buffers; use version 2.20")
        amax = history[0].clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX)
        tex.fused_amax_and_scale_update_after_reduction(amax, [history], [scale], "max", held.dtype, held.recipe.margin)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, recipe={self.recipe.label or self.recipe.name}"


class Bf16Weight(torch.autograd.Function):
    """W float32 -> bf16 (RNE). Its gradient is `dw`, filled by wgrad by then; the one that arrives is a placeholder."""

    @staticmethod
    def forward(ctx, weight: Tensor, dw: Tensor, after: Callable[[], None]) -> Tensor:
        ctx.dw, ctx.after = dw, after
        return weight.to(torch.bfloat16)

    @staticmethod
    def backward(ctx, _placeholder: Tensor):
        dw, ctx.dw = ctx.dw, None  # let go, so that the accumulator may take the buffer instead of copying it
        ctx.after()
        return dw, None, None
