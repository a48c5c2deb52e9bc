"""What each quantizer does to data whose answer is known: squared error, alignment, bias; beside published figures.

All errors are relative, |Q(x) - x|^2 / |x|^2. Alignment is <Q(x), x> / <x, x> - 1. Bias is an unbiased estimate of
|E Q(x) - x|^2 / |x|^2 from many draws of the random bits: zero if averaging over seeds falls as 1/n.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import quantize as ops
from kernels.formats.scales import PowersOfTwo
from kernels.formats.selects import GROWING_SCALE_CAP
from kernels.gemm import gemm
from kernels.philox import Draw
from kernels.quantize import Quantized
from kernels.rotation import is_heavy, restored
from kernels.spec import (
    MXFP4_SCALES,
    NO_CLIP_MAX,
    NVFP4_SCALES,
    NVFP4_SQUARE_SCALES,
    TENSOR_FP32,
    UE5M3_SCALES,
    QuantSpec,
    default_limits,
)
from quant.decompose import decompose
from quant.held import Wish
from quant.recipe import SLOTS, Recipe

SHAPE = (1024, 2048)  # 2M elements: the error of a Gaussian's MSE is 0.1 %
CURVE_SHAPE = (32, 1024)
DRAWS = (1, 4, 16, 64, 256)
GROUPS = 16  # groups of draws for the jackknife
TOLERANCE = 0.01
# Beyond this many standard errors, and above the resolution that CURVE_SHAPE and 256 draws have, a bias is real.
BIAS_Z, BIAS_RESOLUTION = 4.0, 5e-6
GEMM_RATIO = 2.4


@dataclass(frozen=True)
class Quantizer:
    """One way of quantizing an operand, with the rotation it runs behind and how its amax is found."""

    spec: QuantSpec
    rotation_dim: int | None
    signs: str = "random"
    rounds: int | str = 1
    amax: str | float = "exact"

    @property
    def label(self) -> str:
        """Different for different quantizers: rows, checks and published figures are found by it."""
        spec = self.spec
        limits = spec.target_max, spec.scale_cap
        unusual = (
            f" max {spec.target_max:g} cap {spec.scale_cap:g}"
            * (limits != default_limits(spec.grid, spec.scales, spec.select, spec.rounding))
            + " pow2" * (spec.tensor_scale == "pow2")
            + f" {spec.random_bits} bits" * (spec.random_bits != 24)
            + f" amax {self.amax}" * (self.amax != "exact")
        )
        turned = f" rht{self.rotation_dim}" * bool(self.rotation_dim)
        turned += f" {self.rounds} rounds" * (bool(turned) and self.rounds != 1)
        turned += f" {self.signs} signs" * (bool(turned) and self.signs != "random")
        if not spec.is_blocked:
            return f"{spec.grid} {spec.scales[0]}{unusual}{turned}"
        eden = f"/{spec.eden_block}" if spec.rounding == "ms_eden" else ""
        space = " scaled" if spec.eden_space == "scaled" else ""
        select = {"four_over_six": " +4/6", "search": " +search {}..{}".format(*spec.search)}.get(spec.select, "")
        return f"{form_label(spec)} {spec.rounding}{eden}{space}{select}{unusual}{turned}"


def form_label(spec: QuantSpec) -> str:
    """Grid and blocks of a quantizer with block scales; NVFP4's by their size alone: "1x16", "int4 1x16"."""
    grid = "" if spec.grid == "e2m1" else f"{spec.label} "
    if spec.label == "tables":
        grid += f"{zlib.crc32(repr(spec.grid).encode()):08x} "
    block, number_format = str(spec.scales[-1]).split()
    if number_format == "e4m3" or spec.grid == "hif4":
        return grid + (block if spec.grid != "hif4" else "1x64")
    macro = f" macro {spec.macro_bits}" * (spec.macro_bits is not None)
    rule = f" {spec.scale_rule}{macro}" if number_format == "e8m0" else " T" * spec.scaling.has_tensor_scale
    prescale = f" x{spec.prescale:g}" * (spec.prescale != 1)
    return f"{grid}{block} {number_format}{rule}{prescale}"


# A branch chosen after random rounding: not a recipe, kept as the example of a bias (docs/numerics.md#8-limits;
# published: 706e-6 on N(0,1), docs/published.md#4-quantizer-errors).
NO_CLIP = {"target_max": NO_CLIP_MAX, "scale_cap": GROWING_SCALE_CAP}
BIASED_EXAMPLE = Quantizer(QuantSpec.resolve("e2m1", NVFP4_SCALES, "four_over_six", "sr", **NO_CLIP), None)
SR = Quantizer(QuantSpec.resolve("e2m1", NVFP4_SCALES, rounding="sr"), 128)
MS_EDEN = Quantizer(QuantSpec.resolve("e2m1", NVFP4_SCALES, rounding="ms_eden"), 128)
MS_EDEN_128 = Quantizer(QuantSpec.resolve("e2m1", NVFP4_SCALES, rounding="ms_eden", eden_block="rotation"), 128)

# Relative MSE x1e-3 on N(0,1), keyed by a quantizer's label without its rotation. Sources: issue 2's figures, which are
# Quartet II's Table 1 to more digits (docs/published.md#4-quantizer-errors); the FP8 rows are
# docs/published.md#4-quantizer-errors.
PUBLISHED_MSE = {
    "1x16 rtn": 9.05,
    "1x16 rtn +4/6": 7.56,
    "16x16 rtn": 12.40,
    "16x16 rtn +4/6": 12.38,
    "1x16 sr": 23.5,
    f"1x16 sr +4/6 max {NO_CLIP_MAX:g} cap {GROWING_SCALE_CAP:g}": 17.5,
    "1x16 ms_eden/16": 9.32,
    "1x16 ms_eden/rotation": 9.7,
    "1x16 ms_eden/rotation scaled": 9.7,
    "e4m3 tensor fp32": 0.702,
    "e5m2 tensor fp32": 2.78,
}
# The same of other formats, as an independent implementation measured them on 2^21 elements, for want of published
# figures with as many digits (docs/recipes/README.md).
PUBLISHED_MSE |= {
    "1x16 rtn +search -1..5": 6.65,
    "1x16 rtn +search 0..5": 6.99,
    "1x16 ms_eden/16 +4/6": 8.13,
    "int4 1x16 rtn": 7.43,
    "int4 1x16 ms_eden/16": 7.99,
    "if4 1x16 rtn": 6.17,
    "if4 1x16 rtn +4/6": 5.98,
    "if4 1x16 ms_eden/16": 6.77,
    "sfp4 1x16 rtn": 6.72,
    "sfp4 1x16 rtn +4/6": 5.85,
    "sfp4 1x16 ms_eden/16 +4/6": 6.48,
    "po2_gauss 1x16 rtn": 4.93,
    "po2_gauss 1x16 ms_eden/16": 5.59,
    "po2_mix 1x16 rtn": 5.60,
    "po2_mix 1x16 ms_eden/16": 6.21,
    "po4_gauss 1x16 rtn": 4.30,
    "po4_gauss 1x16 ms_eden/16": 4.98,
    "po4_mix 1x16 rtn": 4.66,
    "po4_mix 1x16 ms_eden/16": 5.36,
    "gridflip 1x16 rtn +4/6": 6.63,
    "hif4 1x64 rtn": 6.88,
    "1x32 e8m0 floor rtn": 13.21,
    "1x32 e8m0 even rtn": 12.53,
    "1x32 e8m0 ceil rtn": 13.32,
    "1x32 e8m0 ceil sr": 27.1,
    "1x32 e8m0 rms rtn": 12.7,
    "1x32 e8m0 floor x0.75 sr": 28.19,
    "1x32 e8m0 ceil macro 5 rtn": 11.89,
    "1x16 ue5m3 rtn": 9.056,
    "1x16 ue5m3 T rtn": 9.04,
}

# Forms that have a figure above and that no shipped recipe uses; gridflip is in no recipe because its values are not
# exact in BF16. Audited beside all recipes.
WITHOUT_RECIPE = tuple(
    Quantizer(QuantSpec.resolve(*form, **fields), dim)
    for dim, form, fields in (
        (None, ("gridflip", NVFP4_SCALES, "four_over_six"), {}),
        (None, ("e2m1", NVFP4_SQUARE_SCALES, "four_over_six"), {}),
        (None, ("e2m1", NVFP4_SCALES, "search"), {"search": (0, 5)}),
        (None, ("if4", NVFP4_SCALES, "four_over_six"), {}),
        (None, ("sfp4", NVFP4_SCALES), {}),
        (None, ("e2m1", MXFP4_SCALES), {"scale_rule": "floor"}),
        (None, ("e2m1", MXFP4_SCALES), {"scale_rule": "ceil"}),
        (None, ("e2m1", UE5M3_SCALES), {}),
        (None, ("e2m1", (TENSOR_FP32, *UE5M3_SCALES)), {}),
        (128, ("po2_mix", NVFP4_SCALES, "absmax", "ms_eden"), {}),
        (128, ("po4_mix", NVFP4_SCALES, "absmax", "ms_eden"), {}),
    )
)


def quantizers(recipes: list[Recipe]) -> dict[Quantizer, list[str]]:
    """The different quantizers of the recipes and where each is used."""
    found: dict[Quantizer, list[str]] = {}
    for recipe in recipes:
        for slot in SLOTS:
            operand, gemm = recipe.operand(slot), recipe.gemm(slot.split(".")[0])
            if operand.is_quantized and operand.source != "fprop_transposed":
                how = (gemm.rotation.signs, gemm.rotation.rounds) if gemm.rotation_dim else ("random", 1)
                quantizer = Quantizer(operand.spec, gemm.rotation_dim, *how, operand.amax)
                found.setdefault(quantizer, []).append(f"{recipe.name}.{slot}")
    return found


def published(quantizer: Quantizer) -> float | None:
    """Published relative MSE on N(0,1), x1e-3. A rotation leaves it as it is, but under scales that are powers of two
    only one whose factor sqrt(dim) is one too: their error depends on where in an octave the data lie."""
    dim = quantizer.rotation_dim
    if dim and isinstance(quantizer.spec.scaling, PowersOfTwo) and dim.bit_length() % 2 == 0:
        return None
    return PUBLISHED_MSE.get(replace(quantizer, rotation_dim=None).label)


def gaussian(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def student_t(shape: tuple[int, int], seed: int) -> Tensor:
    """Student-t with 3 degrees of freedom: a normal over the root of a mean of three squares."""
    parts = torch.randn((4, *shape), generator=torch.Generator().manual_seed(seed))
    return (parts[0] / parts[1:].square().mean(dim=0).sqrt()).bfloat16()


def sparse(shape: tuple[int, int], seed: int) -> Tensor:
    """Two normal entries in each 128, the rest zero: the kind of block on which MS-EDEN is biased."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand((shape[0], shape[1] // 128, 128), generator=generator).topk(2, dim=-1).indices
    mask = torch.zeros(shape[0], shape[1] // 128, 128).scatter_(-1, places, 1.0)
    return (torch.randn(shape, generator=generator) * mask.view(shape)).bfloat16()


Input = Callable[[tuple[int, int], int], Tensor]
INPUTS: dict[str, Input] = {"normal": gaussian, "student_t": student_t, "sparse": sparse}


def wish(quantizer: Quantizer, x: Tensor, seed: int, slot: int = 0) -> Wish:
    """What a slot would ask of x along axis 1; every `seed` is another step: all random bits but fixed signs."""
    rng, layer = torch.tensor([0, seed, 0], device=x.device), torch.tensor(0, device=x.device)
    signs = _signs(quantizer, rng, layer, x)
    return Wish(quantizer.spec, 1, signs, quantizer.amax, Draw(rng, layer, slot), turned=False, want=("values",))


def draw(quantizer: Quantizer, x: Tensor, seed: int, slot: int = 0) -> tuple[Quantized, Tensor | None]:
    """One quantization and its signs."""
    asked = wish(quantizer, x, seed, slot)
    return asked.quantize(x), asked.signs


def terms(quantizer: Quantizer, x: Tensor, seed: int = 1) -> dict[str, float]:
    """Where the squared error of one draw comes from (quant/decompose.py)."""
    return {name: float(value) for name, value in decompose(x, wish(quantizer, x, seed)).items()}


def _signs(quantizer: Quantizer, rng: Tensor, layer: Tensor, x: Tensor) -> Tensor | None:
    """x decides alone where the rounds depend on what is rotated."""
    dim = quantizer.rotation_dim
    if not dim:
        return None
    if quantizer.rounds == "auto":
        return ops.rotation_by_need(rng, layer, 0, dim, quantizer.signs, is_heavy(x, 1, dim))
    return ops.rotation(rng, layer, 0, dim, quantizer.rounds, quantizer.signs)


def estimate(quantizer: Quantizer, x: Tensor, seed: int) -> Tensor:
    """FP32 Q(x) in x's own coordinates: dequantized and rotated back."""
    out, signs = draw(quantizer, x, seed)
    y = out.values.to(torch.float32) * out.scale
    return y if signs is None else restored(y, signs)


def errors(quantizer: Quantizer, x: Tensor, seed: int = 1) -> tuple[float, float]:
    """(relative squared error, alignment) of one draw."""
    exact, got = x.double(), estimate(quantizer, x, seed).double()
    power = exact.square().sum()
    return float((got - exact).square().sum() / power), float((got * exact).sum() / power - 1)


@dataclass(frozen=True)
class Curve:
    """Relative squared error of the mean of n draws, for each n of DRAWS; the bias and its standard error."""

    errors: tuple[float, ...]
    bias: float
    standard_error: float

    @property
    def is_biased(self) -> bool:
        return self.bias > BIAS_Z * self.standard_error + BIAS_RESOLUTION


def bias_curve(quantizer: Quantizer, x: Tensor) -> Curve:
    """Average over seeds 1 .. n.

    The bias is the mean inner product of the errors of two different groups of draws: independent, so its expectation
    is |E Q - x|^2. Its standard error is a jackknife over the groups.
    """
    exact = x.double()
    power = exact.square().sum()
    total, means, curve = torch.zeros_like(exact), [], []
    group = torch.zeros_like(exact)
    per_group = DRAWS[-1] // GROUPS
    for n in range(1, DRAWS[-1] + 1):
        error = estimate(quantizer, x, n).double() - exact
        total, group = total + error, group + error
        if n % per_group == 0:
            means.append(group.flatten() / per_group)
            group = torch.zeros_like(exact)
        if n in DRAWS:
            curve.append(float((total / n).square().sum() / power))
    products = torch.stack(means)
    products = products @ products.t() / power
    left_out = torch.stack([_off_diagonal(products, skip) for skip in range(GROUPS)])
    spread = ((left_out - left_out.mean()).square().sum() * (GROUPS - 1) / GROUPS).sqrt()
    return Curve(tuple(curve), float(_off_diagonal(products, None)), float(spread))


def _off_diagonal(products: Tensor, skip: int | None) -> Tensor:
    keep = [i for i in range(products.shape[0]) if i != skip]
    part = products[keep][:, keep]
    return (part.sum() - part.trace()) / (len(keep) * (len(keep) - 1))


def gemm_error(quantizer: Quantizer) -> float:
    """Relative squared error of A B^T, both operands quantized behind one rotation; A, B [512, 2048], mean of 4."""
    a, b = gaussian((512, 2048), 11), gaussian((512, 2048), 12)
    exact = a.double() @ b.double().t()
    total = 0.0
    for seed in range(1, 5):
        left, right = draw(quantizer, a, seed, slot=2)[0], draw(quantizer, b, seed, slot=3)[0]
        got = gemm(left, right, "fprop", 1.0 / (quantizer.rotation_dim or 1), torch.float32)
        total += float((got.double() - exact).square().sum() / exact.square().sum())
    return total / 4
