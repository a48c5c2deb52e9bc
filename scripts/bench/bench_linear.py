"""Where a linear layer's time goes, by shape and recipe: python scripts/bench/bench_linear.py [--model llama_100m]

For each of a block's four linear layers, microseconds of quantizing and multiplying in fprop, dgrad and wgrad, by the
code of training (quant/linear.py), each part compiled and replayed as a CUDA graph. `dy` is the quantization of the
gradient for both backward GEMMs. ratio = all parts over the same of bf16. Below the table, a
PREDICTION for GPUs with FP4 tensor cores that nobody here has (scripts/bench/roofline.py says from which rates).
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("bench_linear")

import torch

from base.files import write_json
from kernels import backend
from kernels.selftest.shapes import PRESETS, Layers
from kernels.spec import GEMMS
from quant import library
from quant.held import Plain
from quant.linear import Call
from scripts.bench.roofline import AGAIN, FPROP_W, FPROP_X, GRADIENT, MACHINES

PARTS = ("x, w", "fprop", "dy", "w again", "dgrad", "x again", "wgrad")
RECIPES = "bf16,fp8,quartet2,nvidia,tetrajet2"


def part_functions(recipe, tokens: int, out_features: int, in_features: int) -> dict[str, Callable]:
    """A function without arguments for each of PARTS, in the order of training; GEMMs get operands made before."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    x, dy = normal(tokens, in_features), normal(tokens, out_features)
    weight = normal(out_features, in_features, dtype=torch.float32)
    rng, layer = torch.tensor([1, 2, 3], device="cuda"), torch.tensor(4, device="cuda")
    call = Call(rng, layer)

    def forward_operands():
        signs = recipe.signs(call, "fprop")
        x_parts = recipe.input_operands(call, Plain(x), signs, keep=True)
        return x_parts, recipe.weight_operand(call, Plain(weight), signs, keep=True)

    def both_gradients():
        return recipe.gradients(call, dy, (True, True))

    def again(slot: str):
        return recipe.operand_of(call, held[slot], slot, recipe.signs(call, slot.split(".")[0]))

    (qx, kept_x), (qw, kept_w) = forward_operands()
    held = {"wgrad.x": kept_x, "dgrad.w": kept_w}
    gradients, w_again, x_again = [a for a, _ in both_gradients()], again("dgrad.w"), again("wgrad.x")

    def gemm(a, b, kind: str):
        dtype = torch.float32 if kind == "wgrad" else torch.bfloat16
        return lambda: recipe.multiply(a, b, kind, dtype)

    functions = (
        forward_operands,
        gemm(qx, qw, "fprop"),
        both_gradients,
        lambda: again("dgrad.w"),
        gemm(gradients[0], w_again, "dgrad"),
        lambda: again("wgrad.x"),
        gemm(gradients[1], x_again, "wgrad"),
    )
    return dict(zip(PARTS, functions, strict=True))


def tensors(made) -> list[torch.Tensor]:
    """What a compiled part returns: all tensors in tuples and dataclasses."""
    if isinstance(made, torch.Tensor):
        return [made]
    parts = [getattr(made, field.name) for field in fields(made)] if is_dataclass(made) else made
    return [tensor for part in parts for tensor in tensors(part)] if isinstance(parts, (list, tuple)) else []


def measure(recipe_name: str, tokens: int, out_features: int, in_features: int) -> dict[str, float]:
    """Median microseconds of each part; a recipe that does nothing in a part leaves its graph empty."""
    from triton.testing import do_bench_cudagraph  # here: --help needs no Triton

    warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
    torch.compiler.reset()
    times = {}
    for part, function in part_functions(library.load(recipe_name), tokens, out_features, in_features).items():
        plain = function if part in GEMMS else lambda make=function: tensors(make())
        compiled = plain if part in GEMMS else torch.compile(plain, fullgraph=True, dynamic=False)
        times[part] = do_bench_cudagraph(compiled, rep=30, return_mode="median") * 1000
    return times


def predictions(layers: Layers, tokens: int) -> list[str]:
    """Lines that predict quartet2's linear layers of one block; nothing overlaps, quantizers bound by memory."""
    inputs, outputs = (tokens * sum(pair[i] for pair in layers.linears) for i in (1, 0))
    moved = inputs * (FPROP_X + AGAIN) + outputs * GRADIENT + layers.parameters * (FPROP_W + AGAIN)
    flops = 6.0 * tokens * layers.parameters
    lines = []
    for machine in MACHINES:
        gemm, bf16, quantize = flops / machine.fp4 / 1e6, flops / machine.bf16 / 1e6, moved / machine.bandwidth / 1e6
        lines.append(
            f"PREDICTION, not measured: {machine.name}: FP4 GEMMs {gemm:.0f} us + quantizing {quantize:.0f} us = "
            f"{(gemm + quantize) / bf16:.2f} of BF16's {bf16:.0f} us"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="llama_100m", help="which preset's layers: " + ", ".join(p.name for p in PRESETS)
    )
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--recipes", default=RECIPES, help="comma-separated; bf16 is always measured")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_linear needs a CUDA GPU; predictions without one: python scripts/bench/roofline.py")
    layers = next((preset for preset in PRESETS if preset.name == args.model), None)
    if layers is None:
        sys.exit(f"no preset {args.model!r}; use one of {', '.join(preset.name for preset in PRESETS)}")
    print(
        torch.cuda.get_device_name(), backend.use("auto", "cuda"), f"{args.model}, {args.tokens} tokens; microseconds"
    )
    print(f"{'layer [out, in]':16} {'recipe':10}" + "".join(f"{part:>9}" for part in PARTS) + f"{'all':>9}{'ratio':>7}")
    rows, totals = [], {}
    names = ["bf16", *(name for name in args.recipes.split(",") if name != "bf16")]
    for out_features, in_features in layers.linears:
        for name in names:
            times = measure(name, args.tokens, out_features, in_features)
            total = sum(times.values())
            totals.setdefault(name, []).append(total)
            ratio = total / totals["bf16"][-1]
            cells = "".join(f"{times[part]:9.0f}" for part in PARTS)
            print(f"{f'[{out_features}, {in_features}]':16} {name:10}{cells}{total:9.0f}{ratio:7.2f}", flush=True)
            rows.append({"layer": [out_features, in_features], "recipe": name, "us": times, "ratio": ratio})
    for name, each in totals.items():
        print(f"{'whole block':16} {name:10}{sum(each):{9 * len(PARTS) + 9}.0f}{sum(each) / sum(totals['bf16']):7.2f}")
    print("\n".join(predictions(layers, args.tokens)))
    if args.json:
        write_json(args.json, {"model": args.model, "tokens": args.tokens, "rows": rows})


if __name__ == "__main__":
    main()
