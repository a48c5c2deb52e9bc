"""The price of a recipe: its FLOPs in 4 bits, and a PREDICTED step time on Blackwell GPUs.

    python scripts/price.py model=llama_100m recipes=bf16,fp8,quartet2
    python scripts/price.py quant=quartet2 'quant.phases=[{from: .85, set: {fprop: none}}]' steps=3052

Words are overrides of train.py; recipes=a,b,c prices several. Shares are of FLOPs: of the blocks' GEMMs, and of all
products with the head and with attention counted over all positions, as MFU counts it. Times are a roofline of one
GPU and one whole step: nothing overlaps, quantizers run at the share of copy speed that they reach on an H100, 4-bit
codes that are no NVFP4 are multiplied in BF16. B200 (4:1) and (6:1): NVFP4 at so many times BF16's speed; FP8 at twice.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository first, whatever is installed

from base.commands import spelled
from base.terminal import in_columns, one_line_on_ctrl_c, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("price")

from launcher.compose import ConfigError, compose
from quant import price
from quant.plan import Plan
from scripts.bench import roofline
from scripts.bench.roofline import COPY_SHARE, Machine
from training.config import TrainConfig
from training.ranks.distributed import Dist
from training.start.describe import Checked, check
from training.start.price import parts, shares

RTX_5090, B200 = roofline.MACHINES
MACHINES = (*(replace(B200, name=f"B200 ({ratio}:1)", fp4=ratio * B200.bf16) for ratio in (4, 6)), RTX_5090)
HEADER = ("recipe", "steps", "4-bit blocks", "4-bit all", "GPU", "GEMMs", "quantizers", "rest", "step ms", "over bf16")


@dataclass(frozen=True)
class Step:
    """Milliseconds of one step: the blocks' GEMMs, their quantizers, and attention, head, elementwise and optimizer."""

    gemms: float
    quantizers: float
    rest: float

    @property
    def total(self) -> float:
        return self.gemms + self.quantizers + self.rest


def speed(kind: price.Kind, machine: Machine) -> float:
    """TFLOP/s of a GEMM."""
    if kind.bits == 4 and kind.native:
        return machine.fp4
    return 2 * machine.bf16 if kind.bits == 8 else machine.bf16


def step_of(checked: Checked, plan: Plan, machine: Machine) -> Step:
    """Of a step under `plan`, on one GPU. Weights are quantized once a micro-batch."""
    shape, numbers = checked.shape, checked.numbers
    tokens, micro_batches = numbers.tokens_per_step, numbers.micro_batches
    flops = price.block_flops(plan, tokens)
    moved = micro_batches * price.quantizer_bytes(plan, numbers.micro_tokens)
    # As roofline.step_ms: causal attention at half of a GEMM's speed; memory-bound parts at a copy's.
    attention = 3.5 * 2.0 * tokens * numbers.seq_len * shape.width * shape.layers / (machine.bf16 / 2)
    of_token = roofline.BLOCK_BYTES_PER_WIDTH * shape.width + roofline.BLOCK_BYTES_PER_HIDDEN * shape.hidden
    elementwise = shape.layers * tokens * of_token + shape.parameters * roofline.ADAMW_BYTES
    return Step(
        gemms=sum(count / speed(kind, machine) for kind, count in flops.items()) * 1e-9,
        quantizers=moved / (COPY_SHARE * machine.bandwidth) * 1e-9,
        rest=(attention + price.head_flops(plan, tokens) / machine.bf16 + elementwise / machine.bandwidth) * 1e-9,
    )


def mean_step(checked: Checked, machine: Machine) -> Step:
    """Over the run's steps."""
    found = [(share, step_of(checked, plan, machine)) for share, plan in parts(checked)]
    return Step(*(sum(share * getattr(s, name) for share, s in found) for name in ("gemms", "quantizers", "rest")))


def checked_of(config: TrainConfig) -> Checked:
    import torch

    return check(config, Dist(0, 1, 0, torch.device("cpu")), config.data.vocab_size)


def rows(words: list[str], recipes: list[str]) -> Iterator[tuple[str, ...]]:
    """Lines of the table. ValueError for what train.py would refuse."""
    base = checked_of(compose([*(w for w in words if not w.startswith("quant")), "quant=bf16"]).config)
    for recipe in recipes or [None]:
        checked = checked_of(compose([*words, *([f"quant={recipe}"] if recipe else [])]).config)
        blocks, everything = shares(checked)
        for machine in MACHINES:
            step, plain = mean_step(checked, machine), mean_step(base, machine)
            times = (f"{ms:.2f}" for ms in (step.gemms, step.quantizers, step.rest, step.total))
            shown = (checked.label, f"{checked.numbers.steps:,}", f"{blocks:.1%}", f"{everything:.1%}", machine.name)
            yield (*shown, *times, f"{plain.total / step.total:.2f}x")


def main(words: list[str]) -> int:
    if not words or {"-h", "--help"} & {*words}:
        print(spelled(__doc__))
        return 0 if words else 2
    recipes = [name for word in words if word.startswith("recipes=") for name in word.partition("=")[2].split(",")]
    rest = [word for word in words if not word.startswith("recipes=")]
    try:
        lines = [HEADER, *rows(rest, recipes)]
        vocabulary = compose(rest).config.data.vocab_size
    except (ConfigError, ValueError, OSError) as error:
        print(f"price: {error}", file=sys.stderr)
        return 2
    print(in_columns(lines))
    print(f"\nThe head has a vocabulary of {vocabulary:,} (data.vocab_size).")
    print("PREDICTION, ms of a step on one GPU: nothing was run on these. Reachable speeds:")
    for machine in MACHINES:
        print(f"  {machine.name}: NVFP4 {machine.fp4:g}, FP8 {2 * machine.bf16:g}, BF16 {machine.bf16:g} TFLOP/s, "
              f"{machine.bandwidth:.2f} TB/s")  # fmt: skip
    return 0


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main(sys.argv[1:]))
