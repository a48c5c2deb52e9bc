"""The pieces of a run, built from its configuration: flags, model, compilation, data, evaluation lists, sinks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from base.files import code_hash
from base.runfolder import CHECKPOINTS
from data.evalset import EvalSet, available
from data.loader import Loader
from data.mixture import open_loader
from data.tokens import TokenSet
from models.shape import DecoderShape
from quant.library import label
from quant.plan import Plan, check_supported, convert
from training.checkpoint.manifest import latest_good, problems, remove_temporary
from training.checkpoint.state import Checkpointer, TrainState, load
from training.config import TrainConfig
from training.loss import LossModel
from training.microbatch import GraphedMicroBatch, MicroBatch, SwitchedMicroBatch
from training.ranks.distributed import Dist
from training.ranks.parallel import Parallel, choose, parallelize
from training.recompute import recompute_blocks
from training.records.loggers import Loggers, build_sinks
from training.records.metrics import MetricsFile
from training.records.runfolder import RunFolder
from training.start.derive import Numbers
from training.start.initial import Weights, source_of
from training.start.shapes import model_of

# Graphs of one method: training, evaluation and its odd last batch, for the first and the other blocks of each recipe
# in the plan, and all of evaluation again in BF16. Dynamo's own limit of 8 ends runs at their last evaluation.
GRAPHS_PER_METHOD = 64


def set_torch_flags(config: TrainConfig) -> None:
    """Exact FP32 (no TF32), no reduced-precision sums (docs/numerics.md#2-dtypes), and the same bits in every run."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.use_deterministic_algorithms(config.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # we never read what we didn't write


def build_model(
    shape: DecoderShape, plan: Plan, seed: int, rng: Tensor, perturb: float = 0.0, weights: Weights | None = None
) -> tuple[nn.Module, str]:
    """The initialized and converted model on rng's device, and the init hash (before `perturb`). `weights`: of a
    checkpoint to begin with."""
    with rng.device:
        model = model_of(shape)
    init_hash = model.init_weights(seed) if weights is None else model.fill(weights)
    if perturb:
        nudge(model, perturb, seed)
    convert(model, plan, rng)
    return model, init_hash


def mask_documents(model: nn.Module, config: TrainConfig, tokens: TokenSet) -> None:
    """As batch.document_mask says, in training and in every evaluation: what begins a document is known of the text."""
    if config.batch.document_mask:
        model.document_start = tokens.bos_id


@torch.no_grad()
def nudge(model: torch.nn.Module, relative: float, seed: int) -> None:
    """Multiply every weight by 1 + relative * N(0, 1), drawn on the CPU: the same nudge on every device."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.empty(parameter.shape, device="cpu").normal_(generator=generator)
        parameter.mul_(1.0 + relative * noise.to(parameter.device))


def build_loss(
    config: TrainConfig, shape: DecoderShape, plan: Plan, rng: Tensor, ranks: Dist
) -> tuple[LossModel, Parallel, str]:
    """The loss around the model, compiled and distributed as the configuration says, and the init hash."""
    source = source_of(config)
    weights = None if source is None else Weights(source, shape)
    model, init_hash = build_model(shape, plan, config.seed, rng, config.perturb, weights)
    loss = LossModel(model)
    mode = choose(config.parallel, ranks, shape.parameters)
    compile_loss(loss, config, ranks.device, plan.fullgraph)
    if config.recompute:
        recompute_blocks(model)
    return loss, parallelize(loss, mode, ranks, regather=config.recompute), init_hash


def check_recipes(plan: Plan, recompute: bool) -> None:
    """RuntimeError where this machine lacks what a recipe needs, ValueError for back ends that can't multiply a layer's
    operands, and for recomputation where a second forward would compute something else."""
    check_supported(plan)
    for recipe in plan.recipes:
        if recompute and not recipe.recomputable:
            raise ValueError(f"recompute=true isn't possible with recipe {label(recipe)}; set recompute=false")


def compile_loss(loss: LossModel, config: TrainConfig, device: torch.device, fullgraph: bool = True) -> None:
    """Compile the model's regions in place. `fullgraph`: no break allowed (plan.fullgraph). Methods, not modules:
    checkpointing, which Dynamo doesn't enter there, and FSDP's hooks stay outside; the loss is one operator."""
    if not is_compiled(config, device):
        return
    torch._dynamo.config.recompile_limit = GRAPHS_PER_METHOD
    # A start from full caches traces each block once less. Our autograd functions are traced, not called; of our
    # operators a graph knows the names, so the tag tells the caches when their code has changed.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    torch.compiler.config.cache_key_tag = kernels_tag()
    loss.model.blockwise = is_blockwise(config, device)
    if find_spec("triton"):
        from kernels.pointwise.measured import MeasuredMaxima  # here: it takes seconds and belongs to the compiler

        torch._inductor.config.post_grad_custom_pre_pass = MeasuredMaxima()
    for module, method in loss.model.regions():
        setattr(module, method, torch.compile(getattr(module, method), fullgraph=fullgraph, dynamic=False))


def kernels_tag() -> str:
    """A hash of the code of kernels/."""
    return f"nibble-{code_hash([Path(kernels.__file__).parent], '.py')[:16]}"


def build_micro_batch(
    loss: LossModel, config: TrainConfig, plan: Plan, parallel: Parallel, tokens_per_step: int, device: torch.device
) -> MicroBatch:
    """Forward and backward of one micro-batch, replayed as a CUDA graph where is_graphed says so."""
    arguments = (loss, tokens_per_step, parallel.accumulate)
    if is_graphed(config, plan.fullgraph, parallel.mode, device):
        return SwitchedMicroBatch(lambda: GraphedMicroBatch(*arguments, loss.parameters()))
    return MicroBatch(*arguments)


def is_graphed(config: TrainConfig, fullgraph: bool, mode: str, device: torch.device) -> bool:
    """Whether micro-batches are CUDA graphs. FSDP's gathers and Transformer Engine's Python state can't be in one."""
    possible = device.type == "cuda" and fullgraph and mode in ("none", "ddp")
    if config.cuda_graphs == "true" and not possible:
        raise ValueError(
            "cuda_graphs=true needs a GPU, parallel=ddp or one process, and none of fp8_te and nvfp4_te; "
            f"here: {device.type}, parallel={mode}; use cuda_graphs=auto"
        )
    return possible and (config.cuda_graphs == "true" or (config.cuda_graphs == "auto" and is_compiled(config, device)))


def is_blockwise(config: TrainConfig, device: torch.device) -> bool:
    """Whether masks are FlexAttention's. Uncompiled it would make all scores of all heads."""
    return device.type == "cuda" and is_compiled(config, device)


def is_compiled(config: TrainConfig, device: torch.device) -> bool:
    """Whether compile=auto, true or false means torch.compile here."""
    if config.compile == "auto":
        # The reference quantizers compile, but for minutes: their graphs are as long as their definitions.
        return device.type == "cuda" and config.backend != "reference"
    return config.compile == "true"


def resume(folder: RunFolder, state: TrainState, ranks: Dist) -> bool:
    """Load the newest good checkpoint, if there is one. True if the run goes on rather than starts."""

    def check(path: Path) -> list[str]:
        """Every rank reads its share of the files: 25 GB of checksums are worth splitting."""
        return [problem for found in ranks.gather(problems(path, ranks.rank, ranks.world)) for problem in found]

    ranks.on_main(lambda: remove_temporary(folder.path / CHECKPOINTS))
    path = latest_good(folder.path, say=print if ranks.is_main else lambda text: None, check=check)
    if path is None:
        return False
    load(path, state, ranks.group)
    if ranks.is_main:
        print(f"resuming from {path}: step {state.step}, {state.tokens:,} tokens", flush=True)
    return True


def open_checkpointer(
    folder: RunFolder, config: TrainConfig, ranks: Dist, tokens: TokenSet, steps: int, newest: int | None
) -> Checkpointer:
    """Saves into the run folder as config.checkpoint says; altered token shards are noticed before each save. `steps`:
    the run's; `newest`: the step that was just loaded."""
    section = config.checkpoint
    return Checkpointer(
        folder.path,
        keep_last=section.keep_last,
        keep_every=section.keep_every or 0,
        asynchronous=section.asynchronous,
        group=ranks.group,
        before_save=tokens.check_unchanged,
        newest=newest,
        at=frozenset(math.ceil(share * steps) for share in section.at),
    )


def open_loggers(folder: RunFolder, config: TrainConfig, run: dict[str, Any], ranks: Dist, step: int) -> Loggers:
    """Cut the metrics back to the resumed step, then open the sinks (rank 0 only)."""
    file = MetricsFile(folder.path)
    if not ranks.is_main:
        return Loggers(file, {})
    file.truncate(step, begins=run.get("parent", {}).get("step", 0))
    commit = (folder.read("env.json") or {}).get("commit", "unknown")

    def past() -> list[dict[str, Any]]:
        """In the order of steps, without events: those of later steps stay in the file as history."""
        return sorted((r for r in file.rows() if r["kind"] != "event"), key=lambda r: r["step"])

    return Loggers(file, build_sinks(config.logger, folder.path, run, commit, step, past))


@dataclass(frozen=True)
class Texts:
    """What is trained on, and the fixed lists of the evaluations during training and at the end."""

    train: Loader
    evaluation: EvalSet
    final: EvalSet
    named: dict[str, tuple[EvalSet, EvalSet]]  # data.val_sets: (during training, at the end)


def open_texts(config: TrainConfig, tokens: TokenSet, named: dict[str, TokenSet] | None = None) -> Texts:
    """`named`: further texts to evaluate on. A list longer than val means all of val. ValueError where a split or a
    list is too short for one sequence."""
    seq_len, packing = config.batch.seq_len, config.data.packing

    @cache
    def fixed_list(text: TokenSet, count: int | None) -> EvalSet:
        return EvalSet(text, seq_len, count, packing)

    def lists(text: TokenSet) -> tuple[EvalSet, EvalSet]:
        there = available(text, seq_len, packing)
        counts = (config.evaluate.tokens, config.evaluate.final_tokens)
        during, final = (fixed_list(text, None if n is None or n >= there else n) for n in counts)
        return during, final

    train = open_loader(tokens, seq_len, config.seed, packing)
    return Texts(train, *lists(tokens), {name: lists(text) for name, text in (named or {}).items()})


def check_evaluations(config: TrainConfig, texts: Texts, plan: Plan, numbers: Numbers) -> None:
    """ValueError, with what to type, where an evaluation's last batch has a number of tokens that the recipe can't
    take: training would go well until then."""
    lists = [(texts.evaluation, texts.final), *texts.named.values()]
    during = [] if config.evaluate.every is None else [("tokens", first) for first, _ in lists]
    for key, evalset in [*during, *(("final_tokens", last) for _, last in lists)]:
        odd = evalset.sequences % numbers.micro
        if odd * numbers.seq_len % plan.forward_divisor:
            fitting = evalset.sequences - odd
            remedy = f"evaluate.{key}={fitting * numbers.seq_len}" if fitting else "a smaller batch.micro"
            raise ValueError(
                f"evaluate.{key}={getattr(config.evaluate, key) or 'null'}: the last batch of {odd} sequences of "
                f"{numbers.seq_len} tokens can't be quantized, recipe {plan.label} needs a multiple of "
                f"{plan.forward_divisor}; set {remedy}, or another batch.seq_len"
            )


def micro_batches(loader: Loader, numbers: Numbers, ranks: Dist, first_step: int) -> Iterator[Tensor]:
    """This rank's micro-batches from `first_step` to the end, read ahead and copied to the device."""
    ranges = (
        (step * numbers.sequences + micro * numbers.micro, numbers.micro)
        for step in range(first_step, numbers.steps)
        for micro in numbers.micro_batches_of(ranks.rank)
    )
    for tokens in loader.prefetch(ranges):
        yield tokens.to(ranks.device, non_blocking=True)
