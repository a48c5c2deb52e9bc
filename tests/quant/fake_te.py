"""The part of Transformer Engine 2.20 that quant/products/te.py touches, for a CPU, written from reading its source.

It shows whether our layer drives that interface as we read it: who owns the amax buffers, what is written where, when
scales change. It can't show that the reading is right, nor anything of the real kernels; the gpu tests do that.
"""

import sys
from dataclasses import dataclass, field
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import nn

E4M3_MAX, E5M2_MAX = 448.0, 57344.0
DTYPE_MAX = {torch.float8_e4m3fn: E4M3_MAX, torch.float8_e5m2: E5M2_MAX}


class Format(Enum):
    E2M1 = 0
    E4M3 = 1
    HYBRID = 2


@dataclass
class QParams:
    power_2_scale: bool = False


@dataclass
class DelayedScaling:
    fp8_format: Format
    amax_history_len: int
    amax_compute_algo: str
    backward_override: str | None
    margin: int = 0


@dataclass
class Float8CurrentScaling:
    use_power_2_scales: bool
    fp8_format: Format
    backward_override: str | None


@dataclass
class Float8BlockScaling:
    use_f32_scales: bool
    fp8_format: Format
    backward_override: str | None


@dataclass
class NVFP4BlockScaling:
    disable_rht: bool
    disable_stochastic_rounding: bool
    disable_2d_quantization: bool
    row_scaled_activation: bool
    nvfp4_4over6: str
    nvfp4_4over6_e4m3_use_256: str
    nvfp4_4over6_err_mode: str
    backward_override: str | None
    fp4_format: Format = Format.E2M1


def is_nvfp4_available(return_reason):
    return False, "Device compute capability 10.0 or higher required for NVFP4 execution."


@dataclass
class State:
    """DelayedScalingRecipeState: a scale and a column of amaxes per quantizer."""

    recipe: object
    mode: str
    count: int
    scale: torch.Tensor = field(init=False)
    amax_history: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.scale = torch.ones(self.count)
        self.amax_history = torch.zeros(self.recipe.amax_history_len, self.count)
        self.dtype = torch.float8_e4m3fn if self.mode == "forward" else torch.float8_e5m2


class RecipeState:
    @staticmethod
    def create(recipe, *, mode, num_quantizers, device=None):
        return State(recipe, mode, num_quantizers)


class FP8GlobalStateManager:
    recipe = None

    @staticmethod
    def get_buffer_info():
        return "buffer_index_and_autocast_key"


class autocast:
    def __init__(self, enabled, recipe):
        self.recipe = recipe

    def __enter__(self):
        FP8GlobalStateManager.recipe = self.recipe

    def __exit__(self, *_):
        FP8GlobalStateManager.recipe = None


def round_to(x, scale, dtype):
    return (x.float() * scale).clamp(-DTYPE_MAX[dtype], DTYPE_MAX[dtype]).to(dtype).float() / scale


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, x, layer):
        xq, wq = (layer.quantize("fwd", slot, tensor) for slot, tensor in enumerate((x, w)))
        ctx.xq, ctx.wq, ctx.layer, ctx.weight = xq, wq, layer, w
        return (xq @ wq.T).to(torch.bfloat16)

    @staticmethod
    def backward(ctx, dy):
        w = ctx.weight
        assert w.overwrite_main_grad and hasattr(w, "grad_added_to_main_grad")
        dyq = ctx.layer.quantize("bwd", 0, dy)
        w.main_grad.copy_(dyq.flatten(0, -2).T @ ctx.xq.flatten(0, -2))
        placeholder = torch.full_like(w, float("nan"))  # what arrives as dW must never be used
        return placeholder, (dyq @ ctx.wq).to(torch.bfloat16), None


class Linear(nn.Module):
    def __init__(self, in_features, out_features, *, bias, params_dtype, device, fuse_wgrad_accumulation):
        super().__init__()
        assert not bias and fuse_wgrad_accumulation and device == "meta"
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.fp8_meta = {}
        self.started = False

    def get_extra_state(self):
        raise AssertionError("Transformer Engine's pickled state was asked for")

    def start(self, recipe):
        for key, mode, count in (("scaling_fwd", "forward", 3), ("scaling_bwd", "backward", 2)):
            old, state = self.fp8_meta.get(key), State(recipe, mode, count)
            if old is not None:
                assert old.scale.shape == state.scale.shape and old.amax_history.shape == state.amax_history.shape
                state.scale, state.amax_history = old.scale, old.amax_history
            self.fp8_meta[key] = state
        self.started = True

    def quantize(self, direction, slot, x):
        if not isinstance(self.recipe, DelayedScaling):
            dtype = torch.float8_e5m2 if direction == "bwd" else torch.float8_e4m3fn
            return round_to(x, DTYPE_MAX[dtype] / x.float().abs().max(), dtype)
        state = self.fp8_meta[f"scaling_{direction}"]
        row = state.amax_history[0]
        with torch.no_grad():
            row[slot] = torch.maximum(row[slot], x.float().abs().max())
        return round_to(x, state.scale[slot].clone(), state.dtype)

    def forward(self, x):
        self.recipe = FP8GlobalStateManager.recipe
        assert self.recipe is not None, "te.Linear outside an autocast region computes in BF16"
        assert self.weight.dtype == x.dtype == torch.bfloat16, "outside torch.autocast both dtypes must agree"
        if isinstance(self.recipe, DelayedScaling):
            if not self.started:
                self.start(self.recipe)
            assert FP8GlobalStateManager.get_buffer_info() in self.fp8_meta, "the model-wide update would run too"
        return Product.apply(self.weight, x, self)


def fused_amax_and_scale_update_after_reduction(amax, histories, scales, algorithm, dtype, margin):
    """As transformer_engine/common/recipe/delayed_scaling.cu: scale from the maximum, rows shifted, row 0 emptied."""
    assert algorithm == "max"
    for history, scale in zip(histories, scales, strict=True):
        history[0] = amax
        largest = history.max(dim=0).values
        history.copy_(torch.roll(history, -1, 0))
        history[0] = 0
        scale.copy_(torch.where(largest > 0, DTYPE_MAX[dtype] / largest / 2**margin, scale))


def install(monkeypatch) -> None:
    """Make `import transformer_engine` find this file's names until the test ends."""
    names = globals()
    contents = {
        "transformer_engine": (),
        "transformer_engine.common": (),
        "transformer_engine.common.recipe": (
            "Format", "QParams", "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling",
            "NVFP4BlockScaling",
        ),
        "transformer_engine.pytorch": ("autocast", "Linear", "is_nvfp4_available"),
        "transformer_engine.pytorch.quantization": ("FP8GlobalStateManager", "RecipeState"),
        "transformer_engine_torch": ("fused_amax_and_scale_update_after_reduction",),
    }  # fmt: skip
    for name, members in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for member in members:
            setattr(module, member, names[member])
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
