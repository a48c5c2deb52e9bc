"""The start screen: what will run, on what, in which precision, how long, in how much memory."""

from pathlib import Path

import torch

from base.flops import mfu_note
from data.tokens import TokenSet
from models.shape import DecoderShape
from training import probes
from training.config import TrainConfig
from training.optim.schedule import Schedule
from training.ranks.distributed import Dist
from training.ranks.parallel import choose
from training.start import fork, price
from training.start.build import is_blockwise, is_compiled, is_graphed
from training.start.cautions import cpu_seconds, many_epochs, slow, too_large
from training.start.derive import Numbers
from training.start.describe import Description, Request, expected_memory


def screen(
    request: Request,
    described: Description,
    ranks: Dist,
    backends: dict[str, str] | None = None,
    elsewhere: bool = False,
) -> str:
    """The text; a dry run names the back end that was asked for. `elsewhere`: the run is for other machines, of whose
    speed and memory this one says nothing."""
    config, run, parent = request.config, described.run, described.parent
    shape, plan, n, device = described.shape, described.plan, described.numbers, ranks.device
    mode = choose(config.parallel, ranks, shape.parameters)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    graphed = is_graphed(config, plan.fullgraph, mode, device)
    memory = expected_memory(config, described, ranks, mode, graphed)
    place = gpu or f"CPU ({torch.get_num_threads()} threads)"
    sizes = f"{shape.layers} x {shape.width}, {shape.heads} heads, hidden {shape.hidden}"
    count = f"{shape.parameters_non_embedding:,} parameters + {shape.parameters_ends:,} in embedding and lm_head"
    phases = [line for phase in described.phases for line in (str(phase), *phase.plan.table().splitlines())]
    data = config.data.name if described.tokens is None else data_name(described.tokens)
    parts = ", ".join(f"{name} {size:.1f}" for name, size in memory.parts.items())
    lines = [
        ("run", f"{run['name']} -> {Path(config.paths.runs) / run['name']}"),
        ("fork", fork.told(parent, run["numerics"]) if parent else None),
        ("device", f"{place}, {n.world} process{'es' if n.world > 1 else ''}, parallel={mode}"),
        ("back ends", ", ".join(f"{op}: {of}" for op, of in (backends or {"asked for": config.backend}).items())),
        ("compile", compilation(is_compiled(config, device), plan.fullgraph, graphed)),
        ("model", f"{config.model.name}: {sizes}; {count}"),
        ("attention", attention(config, shape, device)),
        ("recipe", plan.label),
        *(("", line) for line in plan.table().splitlines()),
        *(("phase" if line.startswith("steps ") else "", line) for line in phases),
        ("price", price.told(described, parent.step if parent else 0)),
        ("data", f"{data}, vocabulary {shape.vocab_size:,}{epochs(n, described.train_tokens)}"),
        ("length", f"{n.steps:,} steps x {n.tokens_per_step:,} tokens = {n.tokens:,} tokens"),
        ("batch", batch(n)),
        ("schedule", rates(n.schedule)),
        *(("probe", line) for line in probes.costs(described.probes, n, plan, graphed)),
        ("memory", f"{memory.total:.1f} GiB{' a GPU' * bool(gpu)} expected ({parts})"),
        ("MFU", mfu_note(gpu)),
    ]
    warnings = cautions(config, described, ranks, memory.total, elsewhere)
    return "\n".join([*(f"{label:<10} {text}" for label, text in lines if text is not None), *warnings])


def compilation(compiled: bool, fullgraph: bool, graphed: bool) -> str:
    if compiled and not fullgraph:
        return "torch.compile, a graph break at each layer of Transformer Engine"
    return ("torch.compile, full graph" if compiled else "off") + ", CUDA graphs" * graphed


def epochs(numbers: Numbers, train_tokens: int | None) -> str:
    if train_tokens is None:
        return " (not counted here)"
    return f", {train_tokens:,} train tokens ({numbers.tokens / train_tokens:.2f} epochs)"


def batch(n: Numbers) -> str:
    return (
        f"{n.sequences} sequences of {n.seq_len} = {n.micro_batches} micro-batches of {n.micro} "
        f"({n.world} processes x {n.accumulation} accumulated)"
    )


def rates(s: Schedule) -> str:
    decay = f", {s.decay_steps} decay steps" if s.decay_steps else ""
    end = s.lr_peak * (1.0 if s.name == "constant" else s.end_factor)
    return f"{s.name}, peak {s.lr_peak:.3g}, {s.warmup_steps} warm-up steps{decay}, end {end:.3g}"


def cautions(config: TrainConfig, described: Description, ranks: Dist, memory_gib: float, elsewhere: bool) -> list[str]:
    """What a person should know before this run starts."""
    shape, plan, numbers = described.shape, described.plan, described.numbers
    found = [] if described.train_tokens is None else [many_epochs(numbers, described.train_tokens)]
    if not elsewhere:
        found.append(too_large(memory_gib, ranks.device, ranks.local_world))
    if not elsewhere and ranks.device.type == "cpu":
        found.append(slow(cpu_seconds(shape, plan, numbers, torch.get_num_threads()), numbers, config.batch))
    return [caution for caution in found if caution]


def attention(config: TrainConfig, shape: DecoderShape, device: torch.device) -> str | None:
    """How masks act; None where every layer sees everything before."""
    windows = [window for window in shape.windows if window is not None and window < config.batch.seq_len - 1]
    within = ["documents"] if config.batch.document_mask else []
    within += [f"windows of {windows[0]:,} positions in {len(windows)} of {shape.layers} layers"] if windows else []
    how = "FlexAttention" if is_blockwise(config, device) else "a dense mask"
    return f"within {' and '.join(within)}, by {how}" if within else None


def data_name(tokens: TokenSet) -> str:
    copies = tokens.copies_of_val
    return tokens.label + (f" ({copies:,} train rows are copies of validation rows)" if copies else "")
