"""All numbers that follow from the configuration, computed once and checked: batch split, length, warm-up, rate."""

from dataclasses import dataclass

from models import family
from training.config import MUON_ONLY, TrainConfig
from training.optim.schedule import Schedule

TOKENS_PER_PARAMETER = 20  # length of a run that names neither tokens nor steps, per non-embedding parameter
MUON_IS_FOR = (
    "optim=muon is made for model=nanochat_560m and nanochat_1b9; use optim=adamw or, at AdamW's rates, optim=muon_rms "
    "for other models"
)
MOST_STEPS = 10**9  # a slip of the keyboard above


@dataclass(frozen=True)
class Numbers:
    """A step consumes `sequences` windows, cut into `micro_batches` of `micro`, dealt to `world` ranks in order."""

    seq_len: int
    sequences: int
    micro: int
    world: int
    tokens_per_step: int
    steps: int
    tokens: int
    schedule: Schedule

    @property
    def micro_batches(self) -> int:
        return self.sequences // self.micro

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step."""
        return self.micro_batches // self.world

    @property
    def micro_tokens(self) -> int:
        return self.micro * self.seq_len

    def micro_batches_of(self, rank: int) -> range:
        """The global indices of a rank's micro-batches: contiguous, so that more ranks only cut the list finer."""
        return range(rank * self.accumulation, (rank + 1) * self.accumulation)


def derive(config: TrainConfig, parameters_non_embedding: int, world: int) -> Numbers:
    """Raises ValueError, with what to type, where numbers don't divide or an optimizer doesn't fit the model."""
    check_optimizer(config)
    seq_len = config.batch.seq_len
    sequences = batch_sequences(config)
    # The largest divisor of the batch within the preset's limit: a function of the config, not of the machine.
    micro = config.batch.micro or largest_divisor(sequences, max(1, config.model.micro_tokens // seq_len))
    fitting = largest_divisor(sequences, micro)
    if sequences % micro:
        raise ValueError(
            f"batch of {sequences} sequences is not a multiple of batch.micro={micro}; "
            f"set batch.micro={fitting} or batch.sequences={max(1, sequences // micro) * micro}"
        )
    if (sequences // micro) % world:
        smaller = largest_divisor(sequences // world, micro) if sequences % world == 0 else 1
        larger = micro * world * max(1, sequences // (micro * world))
        raise ValueError(
            f"{sequences // micro} micro-batches (batch.sequences={sequences} / batch.micro={micro}) don't divide over "
            f"{world} GPUs; set batch.micro={smaller} or batch.sequences={larger}"
        )
    tokens_per_step = sequences * seq_len
    steps = run_steps(config, parameters_non_embedding, tokens_per_step)
    if steps > MOST_STEPS:
        raise ValueError(f"{steps:.3g} steps: needs {MOST_STEPS:.0e} at most; lower steps or tokens")
    if config.profile.steps and config.profile.steps[1] > steps:
        raise ValueError(
            f"profile.steps={config.profile.steps}: the run has {steps} steps; set profile.steps=[{steps},{steps}] or "
            "earlier ones"
        )
    return Numbers(
        seq_len=seq_len,
        sequences=sequences,
        micro=micro,
        world=world,
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=steps * tokens_per_step,
        schedule=build_schedule(config, steps, tokens_per_step),
    )


def check_optimizer(config: TrainConfig) -> None:
    """A preset's peak rate belongs to one optimizer: a Llama's to AdamW, nanochat's to Muon."""
    model = family(config.model.family)
    rate_is_muons = model.optimizer == "muon"
    if config.optim.name.startswith("muon") and (why := model.refuses.get("muon")):
        raise ValueError(
            f"optim={config.optim.name} isn't possible with model={config.model.name}: {why}. Use optim=adamw"
        )
    if config.optim.name == "muon" and not rate_is_muons:
        raise ValueError(MUON_IS_FOR)
    if config.optim.name == "muon_rms" and rate_is_muons:
        raise ValueError(f"optim=muon_rms takes AdamW's rates; model={config.model.name} has Muon's: use optim=muon")
    check_unread(config)
    if config.optim.name == "adamw" and rate_is_muons and config.optim.lr is None:
        raise ValueError(
            f"model={config.model.name}: its rate of {config.model.lr:g} is Muon's; add optim=muon schedule=wsd, or "
            "set AdamW's own with optim.lr=..."
        )


def check_unread(config: TrainConfig) -> None:
    """Raise ValueError for an option that this optimizer or schedule doesn't read: a sweep over it would be reruns."""
    unread = [] if config.optim.name == "muon" else [("optim", name, "muon") for name in MUON_ONLY]
    decay = [("schedule", name, "wsd") for name in ("decay_fraction", "decay_shape")]
    unread += [] if config.schedule.name == "wsd" else decay
    unread += [("schedule", "end_factor", "wsd")] if config.schedule.name == "constant" else []
    for group, name, reader in unread:
        section = getattr(config, group)
        if getattr(section, name) != getattr(type(section)(), name):
            value = getattr(section, name)
            shown = value if isinstance(value, str) else f"{value:g}"
            raise ValueError(f"{group}.{name}={shown}: {group}={section.name} doesn't read it; {group}={reader} does")


def batch_sequences(config: TrainConfig) -> int:
    """Sequences of the job's batch. ValueError where batch.tokens is no multiple of batch.seq_len."""
    batch = config.batch
    if batch.sequences is not None:
        return batch.sequences
    tokens = batch.tokens if batch.tokens is not None else config.model.batch_tokens
    if tokens % batch.seq_len:
        raise ValueError(
            f"batch.tokens={tokens} is not a multiple of batch.seq_len={batch.seq_len}; "
            f"set batch.tokens={max(1, tokens // batch.seq_len) * batch.seq_len} or batch.sequences"
        )
    return tokens // batch.seq_len


def largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


def run_steps(config: TrainConfig, parameters_non_embedding: int, tokens_per_step: int) -> int:
    """Whole steps within the tokens asked for, by default 20 a non-embedding parameter. ValueError if not one fits."""
    if config.steps is not None:
        return config.steps
    tokens = config.tokens if config.tokens is not None else TOKENS_PER_PARAMETER * parameters_non_embedding
    if tokens < tokens_per_step:
        raise ValueError(
            f"tokens={tokens} is less than one step of {tokens_per_step} tokens; raise tokens or lower batch.tokens"
        )
    return tokens // tokens_per_step  # rounded down, as the published runs did


def build_schedule(config: TrainConfig, steps: int, tokens_per_step: int) -> Schedule:
    """Warm-up from steps, tokens or a fraction, in this order; Schedule raises ValueError where they don't fit."""
    section = config.schedule
    if section.warmup_steps is not None:
        warmup = section.warmup_steps
    elif section.warmup_tokens is not None:
        warmup = section.warmup_tokens // tokens_per_step
        if section.warmup_tokens and not warmup:
            raise ValueError(
                f"schedule.warmup_tokens={section.warmup_tokens} is less than one step of {tokens_per_step} tokens: no "
                "warm-up; raise it, or set schedule.warmup_tokens=0"
            )
    else:
        warmup = round((section.warmup_fraction or 0.0) * steps)
    decays = {"wsd": round(section.decay_fraction * steps), "linear": steps - warmup}
    return Schedule(
        name=section.name,
        lr_peak=config.model.lr if config.optim.lr is None else config.optim.lr,
        steps=steps,
        warmup_steps=warmup,
        start_factor=section.start_factor,
        end_factor=section.end_factor,
        decay_steps=decays.get(section.name, 0),
        decay_shape=section.decay_shape,
    )
