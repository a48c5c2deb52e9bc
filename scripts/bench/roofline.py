"""python scripts/bench/roofline.py: a PREDICTION of the speed of recipe quartet2 on GPUs that nobody here has.

For each GEMM the time is its FLOPs over what was published or measured to be reachable; for each quantizer its bytes
over the reachable bandwidth. Nothing overlaps. Two columns for the quantizers: memory bound, and at the 85 % of copy
speed that the fused MS-EDEN kernels reach on an H100 (docs/kernels.md). Set beside the published speed-ups
(docs/published.md#6-speed), which leave amax out; ours has it in.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this repository first, whatever is installed

from base.terminal import one_line_on_ctrl_c, positive, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("roofline")

from kernels.selftest.shapes import PRESETS, PUBLISHED, PUBLISHED_5090, Layers

FP4_BYTES = 0.5 + 1 / 16  # of one element: half a byte of code, a sixteenth of an E4M3 scale
SWIZZLE_BYTES = 2 / 16  # row-major scales read and written in the 128x4 layout
# Bytes an element of each operand of quartet2, reads and writes, as the code does it today.
FPROP_X = 2 + (2 + FP4_BYTES) + SWIZZLE_BYTES  # amax; quantize; swizzle
FPROP_W = (4 + 2) + 2 + (2 + FP4_BYTES) + SWIZZLE_BYTES  # FP32 master to BF16 before
GRADIENT = 2 * (2 + (2 + FP4_BYTES) + SWIZZLE_BYTES)  # along both axes
AGAIN = FP4_BYTES + 2 * FP4_BYTES + SWIZZLE_BYTES  # re-quantize: amax; read and write
COPY_SHARE = 0.85  # of the copy's speed: the fused MS-EDEN kernels on an H100 (docs/kernels.md)
# The published runs: 8 x 2048 tokens. (16 x 2048, the other figure given for them, would put 22B's forward, 12.78 ms,
# at 2,300 TFLOP/s on a chip whose peak is 1,676; at 8 x 2048 it is 1,160, which is also the published GEMM speed.)
TOKENS = 8 * 2048
SEQ_LEN = 2048
VOCABULARY = 32_000
ADAMW_BYTES = 28  # a parameter: FP32 weight, gradient and two moments read, all but the gradient written
# Norms, SwiGLU, RoPE, residual of one block, forward and backward, in bytes a token, as multiples of width and hidden:
# an estimate from counting FP32 residual and BF16 activation passes of a fused implementation.
BLOCK_BYTES_PER_WIDTH, BLOCK_BYTES_PER_HIDDEN = 80, 18


@dataclass(frozen=True)
class Machine:
    """TFLOP/s that real GEMMs reach, and TB/s that a copy reaches."""

    name: str
    fp4: float
    bf16: float
    bandwidth: float
    memory_gb: int
    source: str


MACHINES = (
    Machine("RTX 5090", 1200, 237, 1.79 * 0.85, 32, "FP4: published 1160-1240; BF16: from the published times of 22B"),
    Machine(
        "B200", 5000, 1600, 8.0 * 0.85, 180, "FP4: published 4720-5342; BF16: assumed 71 % of 2,250, as on an H100"
    ),
)


@dataclass(frozen=True)
class Cost:
    """Milliseconds of the linear layers of one block."""

    gemm: float
    quantize: float
    bf16: float


def quantizer_bytes(layers: Layers, tokens: int) -> tuple[float, float]:
    """(forward, backward) bytes of all quantizers of one block."""
    inputs = tokens * sum(k for _, k in layers.linears)
    outputs = tokens * sum(n for n, _ in layers.linears)
    weights = layers.parameters
    return inputs * FPROP_X + weights * FPROP_W, outputs * GRADIENT + (inputs + weights) * AGAIN


def block_cost(layers: Layers, tokens: int, machine: Machine) -> tuple[Cost, Cost]:
    """(forward, backward) of the linear layers of one block; quantizers bound by memory."""
    flops = 2.0 * tokens * layers.parameters

    def cost(gemms: int, moved: float) -> Cost:
        flop = gemms * flops
        return Cost(flop / machine.fp4 * 1e-9, moved / machine.bandwidth * 1e-9, flop / machine.bf16 * 1e-9)

    forward, backward = quantizer_bytes(layers, tokens)
    return cost(1, forward), cost(2, backward)


def step_ms(layers: Layers, blocks: int, tokens: int, machine: Machine, four_bit: bool, copy_share: float) -> dict:
    """Milliseconds of each part of one optimizer step of a Llama on `tokens` tokens."""
    costs = block_cost(layers, tokens, machine)
    linear = sum(c.gemm + c.quantize / copy_share if four_bit else c.bf16 for c in costs)
    parameters = blocks * layers.parameters + 2 * VOCABULARY * layers.width
    # Causal attention: half of 4 T s d forward, 2.5 times that backward; it reaches about half of a GEMM's speed.
    attention = 3.5 * 2.0 * tokens * SEQ_LEN * layers.width / (machine.bf16 / 2) * 1e-9
    elementwise = tokens * (BLOCK_BYTES_PER_WIDTH * layers.width + BLOCK_BYTES_PER_HIDDEN * layers.hidden)
    return {
        "linear": blocks * linear,
        "attention": blocks * attention,
        "lm_head": 6.0 * tokens * layers.width * VOCABULARY / machine.bf16 * 1e-9,
        "elementwise": blocks * elementwise / machine.bandwidth * 1e-9,
        "AdamW": parameters * ADAMW_BYTES / machine.bandwidth * 1e-9,
    }


def block_table(tokens: int) -> list[str]:
    """Markdown: the published layers on both machines."""
    lines = [
        f"Linear layers of one block, {tokens} tokens, quartet2. PREDICTION, not a measurement.",
        "",
        "| GPU | layer | GFLOP | quantizer GB fwd, bwd | GEMM ms fwd, bwd | quantize ms fwd, bwd | BF16 ms fwd, total "
        "| speed-up fwd, total | with quantizers at 85 % of copy | published (amax left out) |",
        "| --- " * 10 + "|",
    ]
    for machine in MACHINES:
        for layers in PUBLISHED:
            forward, backward = block_cost(layers, tokens, machine)
            gigabytes = [f"{b * 1e-9:.1f}" for b in quantizer_bytes(layers, tokens)]
            published = "up to 2.5x total" if layers.name == "22B" else "gains from 3B on"
            if machine.name == "RTX 5090":
                published = "{0[0]}x, {0[1]}x ({1[0]}, {1[1]} ms)".format(*PUBLISHED_5090[layers.name])
            lines.append(
                f"| {machine.name} | {layers.name} | {6e-9 * tokens * layers.parameters:.0f} | {', '.join(gigabytes)} "
                f"| {forward.gemm:.2f}, {backward.gemm:.2f} | {forward.quantize:.2f}, {backward.quantize:.2f} "
                f"| {forward.bf16:.1f}, {forward.bf16 + backward.bf16:.1f} | {_speedups(forward, backward, 1.0)} "
                f"| {_speedups(forward, backward, COPY_SHARE)} | {published} |"
            )
    return lines


def _speedups(forward: Cost, backward: Cost, copy_share: float) -> str:
    times = [c.gemm + c.quantize / copy_share for c in (forward, backward)]
    return f"{forward.bf16 / times[0]:.2f}x, {(forward.bf16 + backward.bf16) / sum(times):.2f}x"


def step_table(tokens: int) -> list[str]:
    """Markdown: a whole step of llama_1b9 on both machines."""
    layers, blocks = next(p for p in PRESETS if p.name == "llama_1b9"), 24
    state_gb = 16e-9 * (blocks * layers.parameters + 2 * VOCABULARY * layers.width)
    lines = [
        f"One step of llama_1b9 on {tokens} tokens, ms. PREDICTION. FP32 weights, gradients, AdamW: {state_gb:.0f} GB. "
        "Published end to end: 1.85x (1.1B, 5090), 1.48x to 1.68x (3.3B to 11B, 8 x B200).",
        "",
        "| GPU | recipe | linear | attention | lm_head | elementwise | AdamW | step | over BF16 |",
        "| --- " * 9 + "|",
    ]
    for machine in MACHINES:
        rows = (("bf16", False, 1.0), ("quartet2", True, 1.0), ("quartet2, quantizers at 85 %", True, COPY_SHARE))
        base = sum(step_ms(layers, blocks, tokens, machine, False, 1.0).values())
        note = "" if state_gb < machine.memory_gb else f" (does not fit in {machine.memory_gb} GB; time only)"
        for recipe, four_bit, share in rows:
            parts = step_ms(layers, blocks, tokens, machine, four_bit, share)
            cells = " | ".join(f"{ms:.1f}" for ms in parts.values())
            total = sum(parts.values())
            lines.append(f"| {machine.name}{note} | {recipe} | {cells} | {total:.1f} | {base / total:.2f}x |")
    return lines


def print_tables(tokens: int) -> None:
    """Both tables, and where the reachable speeds come from."""
    print("\n".join([*block_table(tokens), "", *step_table(tokens), ""]))
    for machine in MACHINES:
        speeds = f"{machine.fp4} / {machine.bf16} TFLOP/s, {machine.bandwidth:.2f} TB/s"
        print(f"{machine.name}: {speeds}. {machine.source}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tokens", type=positive, default=TOKENS, help="tokens of one micro-batch (default: %(default)s)"
    )
    print_tables(parser.parse_args().tokens)


if __name__ == "__main__":
    quiet_pipes()
    main()
