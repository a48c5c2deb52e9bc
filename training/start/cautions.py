"""What a person should know before a run starts: a slow machine, too little memory, text read over and over."""

import os
from pathlib import Path

import torch

from models.shape import DecoderShape
from quant.plan import Plan
from quant.product import Product
from quant.slots import BYTES_FP8, bytes_of
from training.config import BatchSection
from training.start.derive import Numbers
from training.start.memory import GIB

# One thread of a 2024 server core, PyTorch 2.13: the BF16 model's operations a second (54 to 84e9 seen), and elements a
# second through the reference quantizers, of NVFP4 slots (11 to 21e6) and of FP8 ones. Good to a factor of two.
CPU_FLOPS, CPU_FP4, CPU_FP8 = 70e9, 15e6, 150e6
SLOW_S, BRISK_S = 30.0, 5.0  # a step: worth a warning; what is suggested instead
# Up to four epochs teach nearly as much as fresh text (arXiv 2305.16264).
MANY_EPOCHS = 4.0
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def cpu_seconds(shape: DecoderShape, plan: Plan, numbers: Numbers, threads: int) -> float:
    """About how long one step takes on a CPU with so many threads a process."""
    per_token = shape.flops_per_token(numbers.seq_len) / CPU_FLOPS
    for entry in plan.entries:
        per_token += _quantizing(entry.recipe, entry.shape, numbers.micro_tokens)
    return per_token * numbers.tokens_per_step / (threads * numbers.world)


def _quantizing(recipe: Product, shape: tuple[int, int], micro_tokens: int) -> float:
    """Seconds a token that one layer's quantizers take."""
    out_features, in_features = shape
    elements = {"x": in_features, "dy": out_features, "w": in_features * out_features / micro_tokens}
    return sum(
        elements[slot.partition(".")[2]] / (CPU_FP8 if bytes_of(operand) >= BYTES_FP8 else CPU_FP4)
        for slot, operand in recipe.operands().items()
        if operand.is_quantized
    )


def spoken(seconds: float) -> str:
    """40 -> "40 s", 90 -> "1.5 minutes", 86400 -> "24.0 hours"."""
    for limit, size, unit in ((60, 1, "s"), (5400, 60, "minutes"), (172800, 3600, "hours")):
        if seconds < limit:
            return f"{seconds / size:.{0 if unit == 's' and seconds >= 10 else 1}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def slow(seconds: float, numbers: Numbers, batch: BatchSection) -> str | None:
    """A warning for steps so long that the program looks hung, with what to type."""
    if seconds < SLOW_S:
        return None
    fitting = int(numbers.sequences * BRISK_S / seconds)
    sequences = 1 << max(0, fitting.bit_length() - 1)
    given = f"batch.sequences={sequences}" if batch.tokens is None else f"batch.tokens={sequences * numbers.seq_len}"
    given += " batch.micro=null" if batch.micro and sequences % batch.micro else ""
    shorter = spoken(seconds * sequences / numbers.sequences)
    return (
        f"warning: about {spoken(seconds)} a step on this CPU. To see something sooner, as another "
        f"run, type {given} (about {shorter} a step)"
    )


def many_epochs(numbers: Numbers, train_tokens: int) -> str | None:
    epochs = numbers.tokens / max(1, train_tokens)
    if epochs <= MANY_EPOCHS:
        return None
    return (
        f"warning: the text is read {epochs:,.0f} times; beyond about {MANY_EPOCHS:.0f} little is learned. Give more "
        f"text, or type tokens={int(MANY_EPOCHS * train_tokens)}"
    )


def too_large(expected_gib: float, device: torch.device, local_world: int) -> str | None:
    """A warning where a process is expected to need more memory than its GPU, or its share of this machine, has."""
    has = memory_of(device, local_world)
    if expected_gib <= has:
        return None
    return (
        f"warning: {expected_gib:.1f} GiB expected, {'this GPU' if device.type == 'cuda' else 'this process'} has "
        f"{has:.1f}; add recompute=true, or parallel=fsdp on several GPUs. A smaller batch.micro helps, too"
    )


def memory_of(device: torch.device, local_world: int) -> float:
    """GiB of the GPU, or of a process's share of this machine's, or of its container's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in CGROUPS:
        text = Path(name).read_text().strip() if Path(name).exists() else "max"
        limits += [int(text)] if text.isdigit() else []
    return min(limits) / GIB / local_world
