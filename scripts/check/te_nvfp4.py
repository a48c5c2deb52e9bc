"""Other implementations' NVFP4 beside our `nvidia` recipe, slot by slot: which bits agree, what differs. On the CPU.

    python scripts/check/te_nvfp4.py                     # what is installed
    python scripts/check/te_nvfp4.py te=TransformerEngine/transformer_engine   # TE's reference from a folder of sources

Transformer Engine: the Python reference quantizer that its own tests compare with its kernels (NVFP4QuantizerRef). Its
package needs a compiled library to import; of a folder of sources three files are read, with stand-ins for the rest.
torchao: nvfp4_quantize. Neither rounds stochastically here: slots that do are compared with rounding to nearest.
Inputs: normal numbers, and Student-t with blocks of zeros. Rotated slots have Transformer Engine's sign vector in both.
`as published` is what each does; lines under it change one thing. Scales are compared where a block isn't all zero: an
empty one has scale 1 here, 0 in Transformer Engine and 2^-9 in torchao, and codes 0.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("te_nvfp4")

import torch
from torch import Tensor

from kernels import backend
from kernels import quantize as ops
from kernels.formats.nibbles import unpack
from kernels.rotation import rotated
from kernels.spec import NVFP4_SCALES, NVFP4_SQUARE_SCALES, QuantSpec
from quant import library
from quant.audit import gaussian, student_t

SHAPE = (256, 512)
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)  # of Transformer Engine, for ever
# (slot, contraction axis, square blocks, rotated); dgrad.w has fprop.w's codes in both.
SLOTS = (
    ("fprop.x", 1, False, False),
    ("fprop.w", 1, True, False),
    ("dgrad.dy", 1, False, False),
    ("wgrad.dy", 0, False, True),
    ("wgrad.x", 0, False, True),
)


@dataclass(frozen=True)
class Codes:
    """uint8 E2M1 codes [R, C], float8_e4m3fn scales [R, C/16], the FP32 scale of the tensor."""

    codes: Tensor
    scales: Tensor
    outer: float

    def values(self) -> Tensor:
        levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[(self.codes & 7).long()]
        signs = 1 - 2 * (self.codes >> 3).float()
        return (levels * signs).double() * self.scales.double().repeat_interleave(16, 1) * self.outer


Reference = Callable[[Tensor, bool], Codes]


def ours(x: Tensor, square: bool, target: float = 6.0, signs: Tensor | None = None) -> Codes:
    """x [R, C], already turned, by a quantizer to nearest; behind our rotation with `signs`."""
    scales = NVFP4_SQUARE_SCALES if square else NVFP4_SCALES
    spec = QuantSpec.resolve("e2m1", scales, target_max=target, scale_cap=448.0)
    packed = ops.quantize(x, spec, 1, ops.amax(x, 1, signs), signs, want=("packed",)).packed
    stored = packed.block_scales.repeat_interleave(16, 0) if square else packed.block_scales
    outer = float(packed.global_scale) / (1 if signs is None else 4)  # our rotation isn't normalised
    return Codes(unpack(packed.codes), stored, outer)


def of_torchao() -> Reference | None:
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    def quantize(x: Tensor, square: bool) -> Codes | None:
        if square:
            return None  # 16x16 blocks exist as a Triton kernel alone
        outer = per_tensor_amax_to_scale(x.abs().amax())
        scales, data = nvfp4_quantize(x.contiguous(), 16, outer)
        return Codes(unpack(data), scales.view(x.shape[0], -1), float(outer))

    return quantize


def of_te(folder: str | None) -> Reference | None:
    """ValueError for a folder without the reference."""
    reference = te_module(folder)
    if reference is None:
        return None

    def quantize(x: Tensor, square: bool) -> Codes:
        quantizer = reference.NVFP4QuantizerRef(
            reference.reference_utils.Fp4Formats.E2M1,
            columnwise=False,
            quant_tile_shape=(16, 16) if square else (1, 16),
        )
        codes, scales, _, _, amax, _ = quantizer._quantize(x)
        return Codes(unpack(codes), scales, float(1 / (448.0 * 6.0 / amax)))

    return quantize


def te_module(folder: str | None) -> Any:
    """NVFP4QuantizerRef's module: of the installed package, or of a folder with stand-ins for what is compiled."""
    name = "transformer_engine.pytorch.custom_recipes"
    if folder is None:
        if importlib.util.find_spec("transformer_engine") is None:
            return None
        return importlib.import_module(f"{name}.reference_nvfp4")
    files = Path(folder) / "pytorch" / "custom_recipes"
    if not (files / "reference_nvfp4.py").is_file():
        raise ValueError(f"te={folder}: no pytorch/custom_recipes/reference_nvfp4.py there; name a transformer_engine/")

    class Quantizer:
        def __init__(self, *, rowwise: bool, columnwise: bool):
            self.rowwise_usage, self.columnwise_usage = rowwise, columnwise

    for package in ("transformer_engine", "transformer_engine.pytorch", name, "transformer_engine.pytorch.tensor"):
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = []
    for module, contents in (
        ("transformer_engine.pytorch.quantized_tensor", {"Quantizer": Quantizer, "QuantizedTensorStorage": object}),
        ("transformer_engine.pytorch.tensor.utils", {"is_custom": lambda _: True}),
    ):
        sys.modules[module] = ModuleType(module)
        sys.modules[module].__dict__.update(contents)
    for stem in ("reference_utils", "gemm", "reference_nvfp4"):
        spec = importlib.util.spec_from_file_location(f"{name}.{stem}", files / f"{stem}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        setattr(sys.modules[name], stem, module)
    return module


def compare(mine: Codes, theirs: Codes, x: Tensor) -> str:
    """Shares of codes and scales that are equal, the tensor scales' ratio, both errors relative to x."""
    errors = [float((c.values() - x.double()).square().sum() / x.double().square().sum()) for c in (mine, theirs)]
    codes = (mine.codes == theirs.codes).double().mean()
    alive = x.unflatten(1, (-1, 16)).abs().amax(-1) > 0
    scales = (mine.scales.view(torch.uint8) == theirs.scales.view(torch.uint8))[alive].double().mean()
    return (
        f"{100 * codes:9.4f}{100 * scales:9.4f}{mine.outer / theirs.outer - 1:12.1e}"
        f"{1e3 * errors[0]:9.3f}{1e3 * errors[1]:9.3f}"
    )


def inputs(seed: int) -> dict[str, Tensor]:
    heavy = student_t(SHAPE, seed)
    heavy[:, :32] = 0
    heavy[:16] = 0
    return {"normal": gaussian(SHAPE, seed), "t(3), zeros": heavy}


def rows(name: str, reference: Reference) -> list[str]:
    lines = []
    for number, (slot, axis, square, turned) in enumerate(SLOTS):
        for kind, x in inputs(number).items():
            stored = (x if axis == 1 else x.t()).contiguous()
            signs = torch.tensor(SIGNS, dtype=torch.float32) if turned else None
            operand = (rotated(stored.float(), signs) / 4).bfloat16() if turned else stored
            theirs = reference(operand, square)
            if theirs is None:
                lines.append(f"{slot:10}{kind:13}{name} has 16x16 blocks in its kernels alone")
                continue
            target = library.load("nvidia").operand(slot).spec.target_max  # 6 x 16/17 under SR: nothing clips
            made = {"as published": ours(stored, square, target, signs)}
            if slot.endswith("dy"):
                made["  target 6"] = ours(stored, square, 6.0, signs)
            if turned:
                made["  rotation rounded to BF16" + ", target 6" * slot.endswith("dy")] = ours(operand, square)
            lines += [f"{slot:10}{kind:13}{what:36}" + compare(mine, theirs, operand) for what, mine in made.items()]
    return lines


def main(words: list[str]) -> int:
    if {"-h", "--help"} & {*words} or any(not word.startswith("te=") for word in words):
        print(__doc__)
        return 0 if {"-h", "--help"} & {*words} else 2
    backend.use("reference")
    try:
        found = {"torchao": of_torchao(), "Transformer Engine": of_te(words[0][3:] if words else None)}
    except (ValueError, ImportError, OSError) as error:
        print(f"te_nvfp4: {error}", file=sys.stderr)
        return 2
    for name, reference in found.items():
        if reference is None:
            print(f"{name}: not installed" + "; te=FOLDER reads its sources" * (name != "torchao"))
            continue
        head = (
            f"{'codes %':>9}{'scales %':>9}{'T ratio - 1':>12}{'ours':>9}{'theirs':>9}   (relative squared error, 1e-3)"
        )
        print(f"{name}\n{'slot':10}{'input':13}{'':36}{head}")
        print("\n".join(rows(name, reference)))
    return 0 if any(found.values()) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
