"""Quantizer back ends against the reference: codes and scales byte by byte, over the slots of all NVFP4 recipes."""

from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from kernels import backend
from kernels.formats.nvfp4 import NVFP4Tensor
from kernels.philox import Draw
from kernels.quantize import reference_impl
from kernels.selftest.verdicts import NOT_HERE, Line, judge
from kernels.spec import NVFP4_SCALES, NVFP4_SQUARE_SCALES, QuantSpec

# Where a rotation or a sum decides, the order of FP32 sums may move this share of codes and scales
# (docs/numerics.md#7-what-is-equal-what-is-bounded).
SUM_ORDER_SHARE = 1e-5
# Largest relative rounding error of one FP32 sum; a rotation of dim values is dim of them at most.
FP32_STEP = 2.0**-24


@dataclass(frozen=True)
class Slot:
    """A quantizer as a recipe uses it. again: its input is a packed NVFP4 tensor (re-quantization)."""

    name: str
    spec: QuantSpec
    axis: int
    dim: int | None = None
    again: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether back ends must agree in every bit."""
        return self.dim is None and self.spec.select == "absmax" and self.spec.rounding != "ms_eden"


def _spec(scales: tuple = NVFP4_SCALES, **fields) -> QuantSpec:
    return QuantSpec.resolve("e2m1", scales, **fields)


SLOTS = (
    Slot("RTN", _spec(), 1),
    Slot("RTN, contraction first", _spec(), 0),
    Slot("RTN 16x16", _spec(NVFP4_SQUARE_SCALES), 1),
    Slot("RTN 4/6", _spec(select="four_over_six"), 1),
    Slot("RTN, RHT 16", _spec(), 0, 16),
    Slot("SR", _spec(rounding="sr"), 1),
    Slot("SR, contraction first", _spec(rounding="sr"), 0),
    Slot("SR, RHT 32", _spec(rounding="sr"), 1, 32),
    Slot("SR, RHT 32, re-quantized", _spec(rounding="sr"), 0, 32, True),
    Slot("MS-EDEN, RHT 128", _spec(rounding="ms_eden"), 1, 128),
    Slot("MS-EDEN, RHT 128, contraction first", _spec(rounding="ms_eden"), 0, 128),
    Slot("MS-EDEN, RHT 128, re-quantized", _spec(rounding="ms_eden"), 0, 128, True),
)


def inputs(rows: int, columns: int, device: str) -> dict[str, Tensor]:
    """BF16 matrices: Gaussian, heavy-tailed, zeros, one hot block, all ties of the grid with both signs."""
    generator = torch.Generator(device).manual_seed(0)
    gaussian = torch.randn(rows, columns, generator=generator, device=device)
    hot = torch.zeros(rows, columns, device=device)
    hot[0, :16] = 3.0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], device=device).repeat(rows, columns // 8)
    made = {
        "gaussian": gaussian,
        "cubed": gaussian**3,
        "zeros": hot * 0,
        "one hot block": hot,
        "ties": ties * gaussian.sign(),
    }
    return {name: x.to(torch.bfloat16) for name, x in made.items()}


def amax_of(module, slot: Slot, x: Tensor | NVFP4Tensor, signs: Tensor | None) -> Tensor:
    """FP32 []: the largest magnitude that the slot sees, by one back end."""
    return (module.amax_packed if slot.again else module.amax)(x, slot.axis, signs, False)


def run(module, slot: Slot, x: Tensor | NVFP4Tensor, rng: Tensor, layer: Tensor) -> tuple[NVFP4Tensor, float]:
    """The packed result of one back end from the reference's amax, and how far its own amax is from that one
    (relative): after a rotation the amax is a sum, and its last bit would move every scale."""
    signs = None if slot.dim is None else module.rht_signs(rng, layer, 1, slot.dim, False)
    amax, own = amax_of(reference_impl, slot, x, signs), amax_of(module, slot, x, signs)
    quantize = module.requantize if slot.again else module.quantize
    packed = quantize(x, slot.spec, slot.axis, amax, signs, Draw(rng, layer, 3), ("packed",)).packed
    return packed, float((own - amax).abs() / amax.clamp(min=torch.finfo(torch.float32).tiny))


def differing(ours: NVFP4Tensor, reference: NVFP4Tensor) -> tuple[int, int]:
    """(differing, all) code and scale bytes; a differing global scale counts as all."""
    pairs = [(ours.codes, reference.codes), (ours.block_scales, reference.block_scales)]
    count = sum(int((a.view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in pairs)
    total = sum(b.numel() for _, b in pairs)
    return (count if bool(ours.global_scale == reference.global_scale) else total), total


def check_slot(module, slot: Slot, shapes: list[tuple[int, int]], device: str) -> tuple[list[str], int, int]:
    """(failures, differing bytes, all bytes) of one slot over shapes and inputs."""
    rng, layer = torch.tensor([11, 5, 2], device=device), torch.tensor(7, device=device)
    failures, differ, total = [], 0, 0
    for rows, columns in shapes:
        for name, x in inputs(rows, columns, device).items():
            if slot.again:
                x, _ = run(reference_impl, SLOTS[0], x, rng, layer)
            ours, amax_error = run(module, slot, x, rng, layer)
            wrong, count = differing(ours, run(reference_impl, slot, x, rng, layer)[0])
            differ, total = differ + wrong, total + count
            if amax_error > (slot.dim or 0) * FP32_STEP:
                failures.append(f"{slot.name} {rows}x{columns} {name}: amax is {amax_error:.1g} off")
            if slot.is_exact and wrong:
                failures.append(f"{slot.name} {rows}x{columns} {name}: {wrong} of {count} bytes differ")
    if not slot.is_exact and differ > SUM_ORDER_SHARE * total:
        failures.append(f"{slot.name}: {differ} of {total} bytes differ, more than {SUM_ORDER_SHARE} of them")
    return failures, differ, total


def check_backend(name: str, shapes: list[tuple[int, int]], device: str) -> list[Line]:
    """One line for each slot of back end `name` of `quantize`."""
    if reason := backend.unavailable("quantize", name):
        return [Line(f"quantize {name}", NOT_HERE, reason)]
    module = import_module(f"kernels.quantize.{name}_impl")
    lines = []
    for slot in SLOTS:
        failures, differ, total = check_slot(module, slot, shapes, device)
        exact = "bit for bit" if slot.is_exact else f"{differ} of {total} bytes differ (order of FP32 sums)"
        lines.append(judge(f"quantize {name}: {slot.name}", failures, exact))
    if name == "triton":
        from kernels.selftest import conversion  # needs triton, which the check above found

        lines.append(conversion.check(device))
    return [*lines, check_sr_mean(module, name, device)]


def check_sr_mean(module, name: str, device: str, draws: int = 256) -> Line:
    """SR must be unbiased: the error along the sign of x over `draws` quantizations, in standard errors of its mean."""
    slot = next(slot for slot in SLOTS if slot.name == "SR")
    x = inputs(256, 512, device)["gaussian"]
    layer = torch.tensor(7, device=device)
    total, squares = torch.zeros(256, 512, device=device), torch.zeros(256, 512, device=device)
    for step in range(draws):
        rng = torch.tensor([11, step, 0], device=device)
        error = (run(module, slot, x, rng, layer)[0].dequantize() - x.float()) * x.sign()  # a shrinkage can't cancel
        total += error
        squares += error.square()
    variance = (squares - total.square() / draws).sum() * draws / (draws - 1)
    z = float(total.sum() / variance.sqrt())
    what = f"z = {z:+.2f} over {draws} draws of {x.numel()} elements"
    return judge(f"quantize {name}: SR mean", [] if abs(z) < 5 else [f"biased: {what}"], what)
