"""Time whole training steps (forward, backward, clip, optimizer) on one GPU, and compare with bf16 in the same run.

    python scripts/bench/bench_step.py models=llama_30m,llama_100m,wide recipes=bf16,quartet2 [steps=25] [json=FILE]

sequences=32 sets every model's batch, seq_len=2048 its sequences' size, micro=16 the sequences of a micro-batch (all of
them where it isn't said). Any further key=value is an override of train.py (compile=false, backend=reference,
model.residual_dtype=bfloat16, batch.document_mask=true: then one token in 500 begins a document). `wide` is the
24-layer, 2048-wide model of the speed issue. A recipe may carry overrides of its own, behind semicolons:
recipes='bf16,quartet2;quant.fprop.x.tensor_scale=pow2'. Every model and recipe is built anew in this process, on random
tokens. Reported: min, median and max over the timed steps (CUDA events), tokens/s, MFU by the named formula, peak
memory and its estimate, the first step's time (compilation included), recompilations after the second step, ratios to
bf16.
profile=true adds the time of each GPU kernel in one step.
"""

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("bench_step")

import torch
from torch import Tensor

from base.files import write_json
from base.flops import mfu_note
from kernels import backend
from launcher.compose import compose
from models.shape import DecoderShape
from quant.product import Kept
from training.config import TrainConfig
from training.microbatch import MicroBatch
from training.optim.groups import build_optimizers, clip_gradients
from training.ranks.distributed import Dist, setup
from training.records.metrics import peak_flops
from training.start.build import build_loss, build_micro_batch, set_torch_flags
from training.start.describe import check
from training.start.memory import GIB, estimate, kept_of

VOCABULARY = 32000
DOCUMENT_START, DOCUMENT_TOKENS = 1, 500  # with batch.document_mask=true: what begins a document, and their mean length
# Sequences per step of each model; others take 128.
SEQUENCES = {"wide": 24}
WIDE = ["model=llama_1b9", "model.layers=24", "model.width=2048", "model.heads=16", "model.hidden=5632"]
WIDE += ["model.name=wide"]
OPTIONS = {"models": "llama_30m,llama_100m,wide", "recipes": "bf16,quartet2", "steps": "25", "json": ""}
OPTIONS |= {"profile": "false", "sequences": "", "micro": "", "seq_len": "512"}
KERNELS = 45  # that profile=true lists


@dataclass(frozen=True)
class Timing:
    """One model under one recipe. Times in ms; memory in GiB."""

    model: str
    recipe: str
    tokens: int
    ms_min: float
    ms_median: float
    ms_max: float
    tokens_per_second: float
    mfu: float | None
    memory_gib: float
    expected_gib: float
    first_step_s: float
    recompilations: int
    last_loss: float


@dataclass(frozen=True)
class Built:
    """What train.py would build for one GPU."""

    config: TrainConfig
    shape: DecoderShape
    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    micro_batch: MicroBatch
    rng: Tensor
    kept: Kept


@dataclass(frozen=True)
class Batch:
    """Sequences of a step, of a micro-batch, and tokens of a sequence."""

    sequences: int
    micro: int
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len


def build(model: str, recipe: str, extra: list[str], ranks: Dist, batch: Batch) -> Built:
    name, *overrides = recipe.split(";")
    chosen = WIDE if model == "wide" else [f"model={model}"]
    sizes = [f"batch.seq_len={batch.seq_len}", f"batch.sequences={batch.sequences}", f"batch.micro={batch.micro}"]
    config = compose([*chosen, f"quant={name}", "data=pydocs", *sizes, "steps=1", *overrides, *extra]).config
    set_torch_flags(config)
    backend.use(config.backend, ranks.device.type)
    checked = check(config, ranks, VOCABULARY)
    shape, plan, numbers = checked.shape, checked.plan, checked.numbers
    rng = torch.zeros(3, dtype=torch.int64, device=ranks.device)
    loss, parallel, _ = build_loss(config, shape, plan, rng, ranks)
    loss.model.document_start = DOCUMENT_START if config.batch.document_mask else None
    optimizers = build_optimizers(loss.model, config.optim, numbers.schedule.lr_peak)
    micro_batch = build_micro_batch(loss, config, plan, parallel, numbers.tokens_per_step, ranks.device)
    return Built(config, shape, loss.model, optimizers, micro_batch, rng, kept_of(plan))


def run(model: str, recipe: str, options: dict[str, str], extra: list[str], ranks: Dist) -> Timing:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    steps, sequences = int(options["steps"]), int(options["sequences"] or SEQUENCES.get(model, 128))
    batch = Batch(sequences, int(options["micro"] or sequences), int(options["seq_len"]))
    built = build(model, recipe, extra, ranks, batch)
    generator = torch.Generator(device=ranks.device).manual_seed(1)
    batches = [
        torch.randint(VOCABULARY, (sequences, batch.seq_len + 1), device=ranks.device, generator=generator)
        for _ in range(4)
    ]
    if built.config.batch.document_mask:
        for rows in batches:
            rows[torch.rand(rows.shape, device=ranks.device) < 1 / DOCUMENT_TOKENS] = DOCUMENT_START

    def step(index: int) -> Tensor:
        built.rng[1].fill_(index)
        parts, nats = batches[index % len(batches)].split(batch.micro), 0
        for i, part in enumerate(parts):
            nats = nats + built.micro_batch(part, first=i == 0, last=i == len(parts) - 1)
        clip_gradients(built.model, built.config.optim.clip, built.optimizers)
        for optimizer in built.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return nats

    begin = time.perf_counter()
    step(0)
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    step(1)
    compiled = graphs()
    for index in range(2, 5):
        step(index)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for index in range(steps):
        nats = step(5 + index)
        events[index + 1].record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(events)]
    rate = 1e3 * batch.tokens / median(times)
    if options["profile"] == "true":
        print(kernel_table(lambda: step(0)), flush=True)
    peak = peak_flops(ranks.device)
    return Timing(
        model=model,
        recipe=recipe,
        tokens=batch.tokens,
        ms_min=min(times),
        ms_median=median(times),
        ms_max=max(times),
        tokens_per_second=rate,
        mfu=built.shape.flops_per_token(batch.seq_len) * rate / peak if peak else None,
        memory_gib=torch.cuda.max_memory_allocated() / GIB,
        expected_gib=estimate(
            built.shape,
            batch.micro * batch.seq_len,
            built.kept,
            accumulates=batch.micro < sequences,
            optimizer=built.config.optim.name,
        ).total,
        first_step_s=first,
        recompilations=graphs() - compiled,
        last_loss=nats.item() / batch.tokens,
    )


def kernel_table(step: Callable[[], Tensor]) -> str:
    """Where the GPU's time of one step goes: total ms and count of each kernel, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    lines = [f"  {total / 1e3:8.2f} ms in all kernels"]
    lines += [f"  {e.self_device_time_total / 1e3:8.3f} ms {e.count:5d} x  {e.key[:110]}" for e in events[:KERNELS]]
    return "\n".join(lines)


def graphs() -> int:
    """How many graphs Dynamo has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def table(timings: list[Timing]) -> str:
    head = "model       recipe                  min ms  median     max   ratio  Mtok/s    MFU    GiB   ratio  expected"
    lines = [head + "  first s  recompiled"]
    for t in timings:
        base = next((b for b in timings if b.model == t.model and b.recipe == "bf16"), None)
        ratio = f"{t.ms_median / base.ms_median:.3f}" if base else "-"
        memory = f"{t.memory_gib / base.memory_gib:.3f}" if base else "-"
        mfu = f"{100 * t.mfu:.1f}%" if t.mfu else "-"
        lines.append(
            f"{t.model:<11} {t.recipe:<22} {t.ms_min:7.1f} {t.ms_median:7.1f} {t.ms_max:7.1f} {ratio:>7} "
            f"{t.tokens_per_second / 1e6:7.3f} {mfu:>6} {t.memory_gib:6.1f} {memory:>7} {t.expected_gib:9.1f} "
            f"{t.first_step_s:8.1f} {t.recompilations:>11}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return 0
    options, extra = dict(OPTIONS), []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in options:
            options[key] = value
        else:
            extra.append(argument)
    if not torch.cuda.is_available():
        print("error: bench_step times a GPU and there is none here", file=sys.stderr)
        return 1
    ranks = setup()
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}, overrides {extra}; MFU: {mfu_note(gpu)}", flush=True)
    timings: list[Timing] = []
    for model in options["models"].split(","):
        for recipe in options["recipes"].split(","):
            try:
                timings.append(run(model, recipe, options, extra, ranks))
                print(table(timings[-1:]).splitlines()[1], flush=True)
            except Exception as error:  # one failing recipe must not cost the others' measurements
                print(f"{model} {recipe}: failed: {type(error).__name__}: {str(error)[:2000]}", flush=True)
            if options["json"]:
                write_json(Path(options["json"]), [asdict(t) for t in timings])
    print(table(timings))
    return 0 if timings else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
