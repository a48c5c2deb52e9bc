"""From a typed configuration to a running trainer: what is checked, built and written, and in which order.

Nothing is written before everything that can be known in advance has been checked: the numbers divide, the recipe is
legal on every layer, the data exists, the folder is ours.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.loader import Loader
from data.prepare import ensure
from data.tokens import TokenSet
from kernels import backend
from models.llama import LlamaConfig
from models.nanochat import NanochatConfig
from quant.plan import Plan, plan_of, unquantized
from training.build import (
    build_model,
    compile_loss,
    eval_sets,
    is_compiled,
    micro_batches,
    open_loggers,
    resume,
    set_torch_flags,
    slot_counter,
)
from training.checkpoint import Checkpointer, SaveReport, TrainState
from training.config import TrainConfig
from training.console import Console
from training.derive import Numbers, derive
from training.distributed import Dist, setup, teardown
from training.identity import default_name, hash_of, numerics, plan_numerics
from training.loop import Parts, Trainer
from training.loss import LossModel
from training.memory import estimate, saves_packed
from training.optim import build_optimizers
from training.parallel import choose, parallelize
from training.recompute import recompute_blocks
from training.report import StartScreen
from training.runfolder import RunFolder, environment
from training.shapes import model_of, shape_of
from training.signals import RunLock, StopFlag
from training.watchdog import Watchdog


@dataclass(frozen=True)
class Request:
    """One run as asked for. `yaml`: the composed text; `choices`: {group: option}; `command`: how it was typed."""

    config: TrainConfig
    yaml: str
    choices: dict[str, str]
    command: str


@dataclass(frozen=True)
class Sketch:
    """Everything known about a run before memory is allocated. `tokens` is None in a dry run without prepared data."""

    shape: LlamaConfig | NanochatConfig
    plan: Plan
    numbers: Numbers
    tokens: TokenSet | None
    run: dict[str, Any]


def launch(request: Request) -> int:
    """Run, resume or describe one training run. Returns the process's exit code.

    Raises ValueError for mistakes in the configuration, RuntimeError for what the machine can't do, OSError for files.
    """
    ranks = setup()
    try:
        if request.config.dry_run:
            sketch = describe(request, ranks, tokens=None)
            if ranks.is_main:
                print(screen(request, sketch, ranks))
            return 0
        return train(request, ranks)
    finally:
        teardown()


def describe(request: Request, ranks: Dist, tokens: TokenSet | None) -> Sketch:
    """Check and derive everything, on the meta device."""
    config = request.config
    vocab_size = tokens.vocab_size if tokens else expected_vocab_size(config)
    shape = shape_of(config, vocab_size)
    with torch.device("meta"):
        model = model_of(shape)
    numbers = derive(config, shape.parameters_non_embedding, ranks.world)
    plan = plan_of(model, config.quant)
    plan.check_tokens(numbers.micro_tokens)
    fingerprints = {"fingerprint": tokens.fingerprint if tokens else None}
    fingerprints |= {"tokenizer": tokens.tokenizer_hash if tokens else None, "packing": config.data.packing}
    flat = numerics(config, numbers, plan_numerics(plan), vocab_size, fingerprints)
    digest = hash_of(flat)
    run = {
        "name": config.run.name
        or default_name(config.model.name, plan.recipe.name, numbers.tokens, config.seed, digest),
        "hash": digest,
        "numerics": flat,
        "model": config.model.name,
        "parameters": shape.parameters,
        "parameters_non_embedding": shape.parameters_non_embedding,
        "recipe": plan.recipe.name,
        "recipe_label": plan.label,
        "seed": config.seed,
        "tokens": numbers.tokens,
        "steps": numbers.steps,
        "tokens_per_step": numbers.tokens_per_step,
        "seq_len": numbers.seq_len,
        "vocab_size": vocab_size,
        "data_path": str(tokens.path.resolve()) if tokens else None,
        "data_fingerprint": fingerprints["fingerprint"],
        "tokenizer_hash": fingerprints["tokenizer"],
        "experiment": request.choices.get("experiment"),
        "cell": request.choices.get("cell"),
        "command": request.command,
    }
    return Sketch(shape, plan, numbers, tokens, run)


def expected_vocab_size(config: TrainConfig) -> int:
    """What the tokenizer will have, without preparing any text."""
    if config.data.path:
        return TokenSet(config.data.path).vocab_size
    if config.data.tokenizer:
        from data.tokenizer import TextTokenizer, tokenizer_file  # needs the tokenizers package; training doesn't

        return TextTokenizer(tokenizer_file(config.data.tokenizer), config.data.bos).vocab_size
    return config.data.vocab_size


def train(request: Request, ranks: Dist) -> int:
    config = request.config
    set_torch_flags(config)
    backends = backend.use(config.backend, ranks.device.type)
    tokens = TokenSet(ranks.on_main(lambda: str(ensure(config.data, config.paths.data))), verify=config.data.verify)
    sketch = describe(request, ranks, tokens)
    folder = RunFolder(Path(config.paths.runs) / sketch.run["name"])
    text = screen(request, sketch, ranks, backends)
    lock = RunLock(folder.path)

    def open_folder() -> bool:
        """True if there is something left to do. Only rank 0 touches the folder."""
        folder.path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        folder.check_identity(sketch.run)
        if finished := folder.result():
            loss = f"final loss {finished['final_loss']:.4f}"
            print(f"this run is finished (step {finished['step']}, {loss}): {folder.path}")
            return False
        print(text, flush=True)
        env = environment(ranks.device, ranks.world, backends)
        folder.write_start(sketch.run, request.yaml, sketch.plan.to_dict(), env, text)
        return True

    try:
        if not ranks.on_main(open_folder):
            return 0
        return run_in(folder, config, sketch, ranks, backends)
    finally:
        lock.release()


def run_in(folder: RunFolder, config: TrainConfig, sketch: Sketch, ranks: Dist, backends: dict[str, str]) -> int:
    """Build, resume, train. The folder is locked and is this run's."""
    stop, watchdog = StopFlag(), Watchdog(ranks, config.watchdog_s)
    rng = torch.zeros(3, dtype=torch.int64, device=ranks.device)
    rng[0] = config.seed if config.rounding_seed is None else config.rounding_seed
    model, init_hash = build_model(sketch.shape, sketch.plan, config.seed, rng, config.perturb)
    if config.recompute:
        recompute_blocks(model)
    loss = LossModel(model)
    mode = choose(config.parallel, ranks, sketch.shape.parameters)
    compile_loss(loss, config, mode, ranks.device)
    parallel = parallelize(loss, mode, ranks)
    optimizers = build_optimizers(model, config.optim, sketch.numbers.schedule.lr_peak)
    state = TrainState(model, optimizers, hash=sketch.run["hash"])
    resumed = resume(folder, state, ranks)
    loggers = open_loggers(folder, config, sketch.run, ranks, state.step)
    console = Console(ranks.is_main, sketch.numbers.steps, state.step)
    trainer = None

    def on_saved(report: SaveReport) -> None:
        trainer.event("checkpoint", **{("saved_step" if k == "step" else k): v for k, v in asdict(report).items()})

    checkpoint = config.checkpoint
    loader = Loader(sketch.tokens, "train", config.batch.seq_len, config.seed, config.data.packing)
    evalset, final_evalset = eval_sets(config, sketch.tokens)
    trainer = Trainer(
        Parts(
            config=config,
            numbers=sketch.numbers,
            ranks=ranks,
            folder=folder,
            run=sketch.run,
            state=state,
            loss=loss,
            accumulate=parallel.accumulate,
            rng=rng,
            batches=lambda first_step: micro_batches(loader, sketch.numbers, ranks, first_step),
            sample_hash=lambda step: loader.sample_hash(step * sketch.numbers.sequences, sketch.numbers.sequences),
            evalset=evalset,
            final_evalset=final_evalset,
            flops_per_token=sketch.shape.flops_per_token(config.batch.seq_len),
            count_slots=slot_counter(model, sketch.plan) if config.evaluate.slots else None,
            unquantized=(lambda: unquantized(model)) if config.evaluate.bf16 else None,
            checkpointer=Checkpointer(
                folder.path,
                keep_last=checkpoint.keep_last,
                keep_every=checkpoint.keep_every or 0,
                asynchronous=checkpoint.asynchronous,
                group=ranks.group,
                on_saved=on_saved,
                before_save=sketch.tokens.check_unchanged,
            ),
            loggers=loggers,
            console=console,
            stop=stop,
            watchdog=watchdog,
        )
    )
    trainer.event(
        "resume" if resumed else "start",
        init_hash=init_hash,
        backends=backends,
        world=ranks.world,
        parallel=mode,
        device=str(ranks.device),
    )
    try:
        with watchdog:
            return trainer.run()
    finally:
        console.close()
        loggers.close()
        stop.restore()


def screen(request: Request, sketch: Sketch, ranks: Dist, backends: dict[str, str] | None = None) -> str:
    """The start screen; a dry run names the back end that was asked for."""
    config = request.config
    mode = choose(config.parallel, ranks, sketch.shape.parameters)
    on_gpu = ranks.device.type == "cuda"
    train_tokens = sketch.tokens.split("train").length if sketch.tokens else None
    name = sketch.run["name"]
    return str(
        StartScreen(
            name=name,
            folder=str(Path(config.paths.runs) / name),
            device=torch.cuda.get_device_name(ranks.device) if on_gpu else f"CPU ({torch.get_num_threads()} threads)",
            backends=backends or {"asked for": config.backend},
            compiled=is_compiled(config, ranks.device),
            parallel=mode,
            model=config.model.name,
            shape=sketch.shape,
            recipe=sketch.plan.label,
            plan_lines=sketch.plan.table().splitlines(),
            numbers=sketch.numbers,
            data=config.data.name if sketch.tokens is None else sketch.tokens.path.name,
            train_tokens=train_tokens,
            memory=estimate(
                sketch.shape,
                sketch.numbers.micro_tokens,
                saves_packed(sketch.plan),
                shards={"fsdp": ranks.world, "hsdp": ranks.local_world}.get(mode, 1),
                recompute=config.recompute,
            ),
        )
    )
