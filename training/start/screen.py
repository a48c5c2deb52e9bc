"""The start screen: what will run, on what, in which precision, how long, in how much memory."""

from dataclasses import dataclass

from base.flops import mfu_note
from models.shape import DecoderShape
from training.start.derive import Numbers
from training.start.memory import MemoryEstimate


@dataclass(frozen=True)
class StartScreen:
    """Everything the screen shows. `gpu`: its name, None on a CPU; `train_tokens` is None where the data isn't
    prepared yet."""

    name: str
    folder: str
    device: str
    gpu: str | None
    backends: dict[str, str]
    compiled: bool
    graphed: bool
    fullgraph: bool
    parallel: str
    model: str
    shape: DecoderShape
    attention: str | None
    recipe: str
    plan_lines: list[str]
    phases: list[str]
    fork: str | None
    price: str | None
    numbers: Numbers
    data: str
    train_tokens: int | None
    probes: list[str]
    memory: MemoryEstimate
    warnings: list[str]

    def __str__(self) -> str:
        n, shape = self.numbers, self.shape
        count = f"{shape.parameters_non_embedding:,} parameters + {shape.parameters_ends:,} in embedding and lm_head"
        lines = [
            ("run", f"{self.name} -> {self.folder}"),
            *([("fork", self.fork)] if self.fork else []),
            ("device", f"{self.device}, {n.world} process{'es' if n.world > 1 else ''}, parallel={self.parallel}"),
            ("back ends", ", ".join(f"{op}: {name}" for op, name in self.backends.items())),
            ("compile", self._compile()),
            (
                "model",
                f"{self.model}: {shape.layers} x {shape.width}, {shape.heads} heads, hidden {shape.hidden}; {count}",
            ),
            *([("attention", self.attention)] if self.attention else []),
            ("recipe", self.recipe),
            *(("", line) for line in self.plan_lines),
            *(("phase" if line.startswith("steps ") else "", line) for line in self.phases),
            *([("price", self.price)] if self.price else []),
            ("data", f"{self.data}, vocabulary {shape.vocab_size:,}{self._epochs()}"),
            ("length", f"{n.steps:,} steps x {n.tokens_per_step:,} tokens = {n.tokens:,} tokens"),
            ("batch", self._batch()),
            ("schedule", self._schedule()),
            *(("probe", line) for line in self.probes),
            ("memory", f"{self.memory.total:.1f} GiB{' a GPU' * bool(self.gpu)} expected ({self._parts()})"),
            ("MFU", mfu_note(self.gpu)),
        ]
        return "\n".join([*(f"{label:<10} {text}" for label, text in lines), *self.warnings])

    def _compile(self) -> str:
        if not self.compiled:
            return "off" + (", CUDA graphs" if self.graphed else "")
        if not self.fullgraph:
            return "torch.compile, a graph break at each layer of Transformer Engine"
        return "torch.compile, full graph" + (", CUDA graphs" if self.graphed else "")

    def _epochs(self) -> str:
        if self.train_tokens is None:
            return " (not counted here)"
        return f", {self.train_tokens:,} train tokens ({self.numbers.tokens / self.train_tokens:.2f} epochs)"

    def _batch(self) -> str:
        n = self.numbers
        return (
            f"{n.sequences} sequences of {n.seq_len} = {n.micro_batches} micro-batches of {n.micro} "
            f"({n.world} processes x {n.accumulation} accumulated)"
        )

    def _schedule(self) -> str:
        s = self.numbers.schedule
        decay = f", {s.decay_steps} decay steps" if s.decay_steps else ""
        end = s.lr_peak * (1.0 if s.name == "constant" else s.end_factor)
        return f"{s.name}, peak {s.lr_peak:.3g}, {s.warmup_steps} warm-up steps{decay}, end {end:.3g}"

    def _parts(self) -> str:
        return ", ".join(f"{name} {size:.1f}" for name, size in self.memory.parts.items())
