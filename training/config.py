"""Everything a run can be told, as typed dataclasses: the schema behind configs/ and the only thing the engine reads.

Each class checks its own values; what needs several of them together is checked in training/start/derive.py. `quant`,
`hooks` and `probes` stay mappings here: quant.recipe, and each hook and probe, own their fields and check them.
Integers that people like to write as 3e9 are declared float and turned into int when they are whole.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from base.files import expanded
from base.words import suggestion
from data.spec import DataSpec
from kernels.backend import PRESETS
from models import FAMILIES, FIRST

SWITCH = ("auto", "true", "false")


def choice(key: str, value: Any, allowed: tuple[str, ...]) -> str:
    """`value` in lower case if it is allowed; YAML's true and false arrive as True and False and count as words."""
    word = str(value).lower()
    if word not in allowed:
        raise ValueError(f"{key}={value}: needs one of {', '.join(allowed)}{suggestion(word, allowed)}")
    return word


def whole(key: str, value: float | None, minimum: int = 1, null: str = "") -> int | None:
    """An int from 3e9 or 3000; None stays None. Raises ValueError for 0.5 or a value below `minimum`.

    `null`: what null means for this key, for the message.
    """
    if value is None:
        return None
    if not math.isfinite(value) or value != int(value) or value < minimum:
        raise ValueError(f"{key}={value:g}: needs a whole number of at least {minimum}{null and f', or null {null}'}")
    return int(value)


def set_whole(section: Any, prefix: str, *names: str, minimum: int = 1, null: str = "") -> None:
    """Fields of a section that are whole numbers, or null."""
    for name in names:
        setattr(section, name, whole(f"{prefix}{name}", getattr(section, name), minimum, null))


def at_most_one(section: Any, prefix: str, names: tuple[str, ...]) -> None:
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) > 1:
        both = " and ".join(f"{prefix}{name}={getattr(section, name):.15g}" for name in given)
        raise ValueError(f"{both}: give one of them; set the other to null")


def in_range(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{key}={value:g}: needs a number from {low:g} to {high:g}")


@dataclass
class ModelSection:
    """A preset (configs/model). `lr` is its peak learning rate: 1.2e-3 * min(1, 768 / width)."""

    name: str = "custom"
    family: str = FIRST  # one of models.FAMILIES
    layers: int = 6
    width: int = 640
    heads: int = 5
    hidden: int = 1792  # of the SwiGLU
    norm_eps: float = 1e-5
    rope_theta: float = 1e4
    residual_dtype: str = "float32"
    kv_heads: int | None = None  # grouped-query attention: heads of k and v; null: as many as heads
    tied: bool = False  # lm_head's weight is the embedding's
    rope_llama3: list[float] = field(default_factory=list)  # factor, low, high, context of Llama 3's RoPE; []: none
    lr: float = 1.2e-3
    # Defaults of the batch and the micro-batch. Part of the numerics, so they never follow from the machine.
    batch_tokens: int = 262144  # the published runs' 512 sequences of 512
    micro_tokens: int = 65536

    def __post_init__(self) -> None:
        self.family = choice("model.family", self.family, tuple(FAMILIES))
        in_range("model.lr", self.lr, 1e-12, 1e3)
        in_range("model.norm_eps", self.norm_eps, 0.0, 1.0)
        in_range("model.rope_theta", self.rope_theta, 1.0, 1e12)
        set_whole(self, "model.", "batch_tokens", "micro_tokens")


# Above zero in FP32, with room: a row of the embedding without a gradient gets 0 / (0 + eps), and eps=0 makes it NaN.
SMALLEST_EPS = 1e-30
MUON_ONLY = ("embed_lr", "head_lr", "scalar_lr")  # fields of OptimSection


@dataclass
class OptimSection:
    name: str = "adamw"
    lr: float | None = None  # peak; null: the model preset's
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1  # on the linear weights of the blocks only
    clip: float | None = 1.0  # global gradient norm; null: logged but not clipped
    train: list[str] | None = None  # globs over parameters' names; null: all. Others are frozen from train_from on
    train_from: float = 0.0  # share of the run's steps
    # Muon only: `lr` is that of the blocks' matrices; these are AdamW's, at width 768 for the first two.
    embed_lr: float = 0.3
    head_lr: float = 0.004
    scalar_lr: float = 0.5

    def __post_init__(self) -> None:
        self.name = choice("optim.name", self.name, ("adamw", "muon", "muon_rms"))
        if len(self.betas) != 2:
            raise ValueError(f"optim.betas={self.betas}: needs two numbers, such as [0.9,0.95]")
        for beta in self.betas:
            in_range("optim.betas", beta, 0.0, 0.999999)
        if self.lr is not None:
            in_range("optim.lr", self.lr, 1e-12, 1e3)
        for name in MUON_ONLY:
            in_range(f"optim.{name}", getattr(self, name), 0.0, 1e3)
        in_range("optim.eps", self.eps, SMALLEST_EPS, 1.0)
        in_range("optim.weight_decay", self.weight_decay, 0.0, 1e3)
        in_range("optim.train_from", self.train_from, 0.0, 1.0)
        if self.train is None and self.train_from:
            raise ValueError(f"optim.train_from={self.train_from:g} acts with optim.train only, such as ['*norm*']")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"optim.clip={self.clip:g}: needs a positive number, or null for no clipping")


@dataclass
class ScheduleSection:
    """`cosine`: cosine-shaped warm-up and decay. `wsd`: linear warm-up, flat, a decay over `decay_fraction`. `linear`:
    linear warm-up, then linear decay to the end. `constant`: linear warm-up, then flat."""

    name: str = "cosine"
    warmup_fraction: float | None = 0.1  # of the steps, unless warmup_steps or warmup_tokens is given
    warmup_steps: float | None = None
    warmup_tokens: float | None = None
    start_factor: float = 0.01  # lr at step 0 over the peak
    end_factor: float = 0.1  # lr at the last step over the peak
    decay_fraction: float = 0.4  # wsd only
    decay_shape: str = "linear"  # wsd only: linear, or sqrt for 1 - sqrt(share of the decay)

    def __post_init__(self) -> None:
        self.name = choice("schedule.name", self.name, ("cosine", "wsd", "linear", "constant"))
        self.decay_shape = choice("schedule.decay_shape", self.decay_shape, ("linear", "sqrt"))
        set_whole(self, "schedule.", "warmup_steps", "warmup_tokens", minimum=0)
        at_most_one(self, "schedule.", ("warmup_steps", "warmup_tokens"))
        for name in ("warmup_fraction", "start_factor", "end_factor", "decay_fraction"):
            if getattr(self, name) is not None:
                in_range(f"schedule.{name}", getattr(self, name), 0.0, 1.0)


@dataclass
class BatchSection:
    """The batch of the whole job, over all GPUs, in tokens or in sequences; `micro` sequences at a time."""

    seq_len: int = 512
    tokens: float | None = None
    sequences: float | None = None
    micro: int | None = None
    document_mask: bool = False  # a token attends to its own document alone, not to others of its sequence

    def __post_init__(self) -> None:
        set_whole(self, "batch.", "seq_len", "tokens", "sequences", "micro")
        at_most_one(self, "batch.", ("tokens", "sequences"))


@dataclass
class EvaluateSection:
    every: float | None = 200  # steps; null: only at the end
    tokens: float | None = 1048576  # of the validation split, always the same ones; null: all
    final_tokens: float | None = None  # at the last step; null: the whole validation split
    bf16: bool = False  # report the unquantized model too
    served: bool = False  # at the end, the same weights under other forwards: BF16, NVFP4, FP8 (scripts/score.py)
    slots: bool = True  # count clipping and underflow per operand slot

    def __post_init__(self) -> None:
        set_whole(self, "evaluate.", "every", null="for the end only")
        set_whole(self, "evaluate.", "tokens", "final_tokens")


@dataclass
class CheckpointSection:
    every: float | None = 500  # steps; null: only when stopped and at the end
    keep_last: int = 2
    keep_every: int | None = None  # steps; these are never deleted
    at: list[float] = field(default_factory=list)  # shares of the run; saved there too, and never deleted
    asynchronous: bool = True  # files are written while training goes on

    def __post_init__(self) -> None:
        set_whole(self, "checkpoint.", "every", null="for the end only")
        set_whole(self, "checkpoint.", "keep_last", "keep_every")
        for share in self.at:
            in_range("checkpoint.at", share, 0.0, 1.0)


@dataclass
class WandbSection:
    mode: str = "disabled"
    project: str = "nibble"
    entity: str | None = None

    def __post_init__(self) -> None:
        self.mode = choice("logger.wandb.mode", self.mode, ("online", "offline", "disabled"))


@dataclass
class LoggerSection:
    """Sinks beside metrics.jsonl, which is always written and is the truth."""

    wandb: WandbSection = field(default_factory=WandbSection)
    tensorboard: bool = False


@dataclass
class LogSection:
    every: float = 10  # steps between two reads of the device; every step's loss is logged nevertheless

    def __post_init__(self) -> None:
        set_whole(self, "log.", "every")


@dataclass
class ProfileSection:
    """A torch trace, and on a GPU a snapshot of its memory, in the run folder. profile=true asks for some steps."""

    steps: list[int] = field(default_factory=list)  # first and last step to trace; []: none

    def __post_init__(self) -> None:
        ordered = len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]
        if self.steps and not ordered:
            raise ValueError(f"profile.steps={self.steps}: needs the first and the last step to trace, such as [20,25]")


FOLDER_NAME = re.compile(r"(?!\.+$)[\w.+-]+")


@dataclass
class RunSection:
    name: str | None = None  # null: model-recipe-tokens-seed-hash

    def __post_init__(self) -> None:
        if self.name is not None and not FOLDER_NAME.fullmatch(self.name):
            raise ValueError(
                f"run.name={self.name}: needs the name of one folder: letters, digits and . _ + -; "
                "where runs lie is paths.runs"
            )


@dataclass
class PathsSection:
    runs: str = "runs"
    data: str = "token_shards"  # prepared token folders

    def __post_init__(self) -> None:
        self.runs, self.data = expanded(self.runs, "paths.runs"), expanded(self.data, "paths.data")


def check_init(init: dict[str, Any]) -> None:
    """A mapping, not a section: `from` is a word of Python's."""
    if unknown := sorted(init.keys() - {"from"}):
        raise ValueError(f"init.{unknown[0]}: unknown key; init.from=PATH is all there is")
    if init.get("from") is not None:
        init["from"] = expanded(str(init["from"]), "init.from")


@dataclass
class TrainConfig:
    model: ModelSection = field(default_factory=ModelSection)
    quant: dict[str, Any] = field(default_factory=dict)
    hooks: dict[str, Any] = field(default_factory=dict)  # {name: options}, beside the model's and the recipe's own
    probes: dict[str, Any] = field(default_factory=dict)  # {name: options}, beside those of `evaluate`
    init: dict[str, Any] = field(default_factory=dict)  # from: folder of a Llama checkpoint to begin with
    data: DataSpec = field(default_factory=DataSpec)
    optim: OptimSection = field(default_factory=OptimSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    batch: BatchSection = field(default_factory=BatchSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logger: LoggerSection = field(default_factory=LoggerSection)
    log: LogSection = field(default_factory=LogSection)
    profile: ProfileSection = field(default_factory=ProfileSection)
    run: RunSection = field(default_factory=RunSection)
    paths: PathsSection = field(default_factory=PathsSection)
    seed: int = 0
    fork: str | None = None  # RUN@STEP: go on from that checkpoint of another run, with its configuration
    tokens: float | None = None  # length of the run; null and no steps: 20 per non-embedding parameter
    steps: float | None = None
    parallel: str = "auto"
    backend: str = "auto"
    compile: str = "auto"  # auto: on a GPU
    cuda_graphs: str = "auto"  # auto: where the model is compiled and no weight is sharded; same bits, fewer launches
    recompute: bool = False  # keep only each block's input, compute it again in the backward, gather weights anew
    deterministic: bool = True  # a resumed run repeats the uninterrupted one bit for bit
    nonfinite: str = "stop"  # what a NaN or infinite loss or gradient leads to: stop, skip, rollback
    rounding_seed: int | None = None  # of rounding bits and signs; null: seed. For measuring what they alone change
    perturb: float = 0.0  # relative Gaussian noise on the initial weights: 1e-6 shows how far chaos carries
    watchdog_s: float = 1800  # a rank without progress for longer (compilation included) ends the job
    dry_run: bool = False

    def __post_init__(self) -> None:
        at_most_one(self, "", ("tokens", "steps"))
        set_whole(self, "", "tokens", "steps")
        self.data.check()
        check_init(self.init)
        self.parallel = choice("parallel", self.parallel, ("auto", "ddp", "fsdp", "hsdp"))
        self.backend = choice("backend", self.backend, ("auto", *PRESETS))
        self.nonfinite = choice("nonfinite", self.nonfinite, ("stop", "skip", "rollback"))
        in_range("watchdog_s", self.watchdog_s, 1, 1e6)
        in_range("perturb", self.perturb, 0.0, 1.0)
        self.compile = choice("compile", self.compile, SWITCH)
        self.cuda_graphs = choice("cuda_graphs", self.cuda_graphs, SWITCH)
        for key in ("seed", "rounding_seed"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < 2**63:
                raise ValueError(f"{key}={value}: needs an integer from 0 to 2^63 - 1")
