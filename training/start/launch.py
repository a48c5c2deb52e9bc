"""From a typed configuration to a running trainer: what is checked, built and written, and in which order.

Nothing is written before everything that can be known in advance has been checked: the numbers divide, the recipe is
legal on every layer, the data exists, the folder is ours.
"""

from pathlib import Path

import torch

from base.files import disk_full_explained, make_folder
from base.runfolder import CHECKPOINTS, ENV
from data.mixture import open_tokens
from data.prepare import ensure
from data.valsets import open_val_sets
from kernels import backend
from training import hooks, probes
from training.checkpoint.manifest import checkpoints
from training.checkpoint.state import TrainState
from training.config import TrainConfig
from training.hooks.base import Run
from training.hooks.phases import Phases
from training.loop import Parts, Trainer
from training.optim.groups import build_optimizers
from training.ranks.alike import check_alike, check_start
from training.ranks.distributed import Dist, setup, teardown
from training.ranks.signals import RunLock, StopFlag
from training.ranks.watchdog import Watchdog
from training.records.console import Console
from training.records.loggers import check_asked_for
from training.records.profile import Profile
from training.records.runfolder import ROOM_FOR_RUNS, RunFolder, device_name, environment, moved
from training.start import fork
from training.start.build import (
    Texts,
    build_loss,
    build_micro_batch,
    check_evaluations,
    check_recipes,
    mask_documents,
    micro_batches,
    open_checkpointer,
    open_loggers,
    open_texts,
    resume,
    set_torch_flags,
)
from training.start.describe import Description, Request, check, check_memory, config_files, describe
from training.start.oom import advice
from training.start.screen import screen


def launch(request: Request) -> int:
    """Run, resume or describe one training run. Returns the process's exit code.

    Raises ValueError for mistakes in the configuration, RuntimeError for what the machine can't do, OSError for files.
    """
    ranks = setup()
    check_start(ranks, request.config)
    if request.config.dry_run:
        text = start_screen(request, ranks)
        if ranks.is_main:
            print(text)
        code = 0
    else:
        code = train(request, ranks)
    # Not after an error: NCCL would flush what was started, and wait for ranks that are gone or wait for this one. The
    # end of the process aborts it instead.
    teardown()
    return code


def start_screen(request: Request, ranks: Dist, elsewhere: bool = False) -> str:
    """The start screen of a run that isn't started here; `elsewhere`: that other machines will run."""
    config = request.config  # other text may not be prepared yet, and a dry run does nothing
    is_there = config.data.path or config.data.mix
    tokens = open_tokens(config.data, ensure(config.data, config.paths.data)) if is_there else None
    return screen(request, describe(request, ranks, tokens), ranks, elsewhere=elsewhere)


def train(request: Request, ranks: Dist) -> int:
    config = request.config
    set_torch_flags(config)
    backends = backend.use(config.backend, ranks.device.type)
    for plan in check(config, ranks, config.data.vocab_size).plans:  # text may take hours to prepare
        check_recipes(plan, config.recompute)
    ranks.on_main(lambda: check_asked_for(config.logger))
    tokens = open_tokens(
        config.data, ranks.on_main(lambda: str(ensure(config.data, config.paths.data, config.batch.seq_len)))
    )
    described = describe(request, ranks, tokens)
    check_alike(ranks, hash=described.run["hash"], data=described.run["data_fingerprint"])
    check_memory(config, described, ranks)
    texts = open_texts(config, tokens, open_val_sets(config.data, tokens))
    for plan in described.plans:
        check_evaluations(config, texts, plan, described.numbers)
    folder = RunFolder(Path(config.paths.runs) / described.run["name"])
    if described.parent and not checkpoints(folder.path / CHECKPOINTS):
        fork.check_there(described.parent)
    text = screen(request, described, ranks, backends)
    lock = RunLock(folder.path)

    def open_folder() -> bool:
        """True if there is something left to do. Only rank 0 touches the folder."""
        make_folder("paths.runs", folder.path)
        lock.acquire()
        folder.check_identity(described.run)
        if finished := folder.result():
            loss = f"final loss {finished['final_loss']:.4f}"
            ended = f"dead: {finished['why']}" if "why" in finished else "finished"
            print(f"this run is {ended} (step {finished['step']}, {loss}): {folder.path}")
            return False
        print(text, flush=True)
        env = environment(ranks.device, ranks.world, backends, config_files(request.choices, described.plan))
        if warning := moved(folder.read(ENV), env):
            print(warning, flush=True)
        folder.write_start(described.run, request.yaml, described.plan_json(), env, text)
        return True

    try:
        with disk_full_explained(folder.path, ROOM_FOR_RUNS):
            if not ranks.on_main(open_folder):
                return 0
            say = print if ranks.is_main else lambda text: None
            profile = Profile(config.profile.steps, folder.path, ranks.rank, ranks.device, say)
            with profile.watching():
                return run_in(folder, config, described, texts, ranks, backends, profile)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(advice(error, config, described, ranks)) from error
    finally:
        lock.release()


def run_in(
    folder: RunFolder,
    config: TrainConfig,
    described: Description,
    texts: Texts,
    ranks: Dist,
    backends: dict[str, str],
    profile: Profile,
) -> int:
    """Build, resume, train. The folder is locked and is this run's."""
    stop, watchdog = StopFlag(), Watchdog(ranks, config.watchdog_s)
    rng = torch.zeros(3, dtype=torch.int64, device=ranks.device)
    rng[0] = config.seed if config.rounding_seed is None else config.rounding_seed
    loss, parallel, init_hash = build_loss(config, described.shape, described.plan, rng, ranks)
    model = loss.model
    mask_documents(model, config, described.tokens)
    optimizers = build_optimizers(model, config.optim, described.numbers.schedule.lr_peak)
    micro_batch = build_micro_batch(
        loss, config, described.plan, parallel, described.numbers.tokens_per_step, ranks.device
    )
    run = Run(loss, optimizers, described.numbers.steps, micro_batch)
    around = hooks.build(described.hooks, run)
    if described.phases:
        around = {"phases": Phases(described.plan, described.phases, run)} | around
    state = TrainState(model, optimizers, around, probes.build(described.probes), hash=described.run["hash"])
    resumed = resume(folder, state, ranks)
    if not resumed and described.parent:
        fork.begin(described.parent, state, ranks)
    elif not resumed:
        for hook in state.hooks.values():
            hook.begin(0)
    loggers = open_loggers(folder, config, described.run, ranks, state.step)
    console = Console(ranks.is_main, described.numbers.steps, state.step)
    newest = state.step if resumed else None
    checkpointer = open_checkpointer(folder, config, ranks, described.tokens, described.numbers.steps, newest)
    if config.checkpoint.every is not None or config.checkpoint.at:
        checkpointer.reserve(state)
    trainer = Trainer(
        Parts(
            config=config,
            numbers=described.numbers,
            ranks=ranks,
            folder=folder,
            state=state,
            loss=loss,
            accumulate=parallel.accumulate,
            micro_batch=micro_batch,
            rng=rng,
            batches=lambda first_step: micro_batches(texts.train, described.numbers, ranks, first_step),
            sample_hashes=lambda step, count: texts.train.sample_hashes(
                step * described.numbers.sequences, described.numbers.sequences, count
            ),
            evalset=texts.evaluation,
            final_evalset=texts.final,
            named_evalsets=texts.named,
            flops_per_token=described.shape.flops_per_token(config.batch.seq_len),
            checkpointer=checkpointer,
            loggers=loggers,
            console=console,
            profile=profile,
            stop=stop,
            watchdog=watchdog,
        )
    )
    trainer.event(
        "resume" if resumed else "start",
        init_hash=init_hash,
        backends=backends,
        world=ranks.world,
        parallel=parallel.mode,
        device=str(ranks.device),
        device_name=device_name(ranks.device),  # env.json has the newest start's only
    )
    try:
        with watchdog:
            return trainer.run()
    finally:
        console.close()
        loggers.close()
        stop.restore()
