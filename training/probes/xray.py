"""What quantization does to every layer's gradients, at ten steps of the run (training/xray.py)."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quant import library
from quant.errors import DRAWS_AT_LEAST
from quant.plan import HEAD, Plan, Precision, resolve
from training.probes.base import Coming, Context, Probe
from training.ranks.parallel import is_sharded
from training.start.derive import Numbers
from training.start.memory import GIB, MemoryEstimate
from training.xray import Eye, View, held_bytes

LOOKS = 10
# On an H200: a layer's three products and what they are quantized from, replayed; and the first look, which captures
# and, where caches are empty, compiles (4.5 s in llama_30m, whose other looks took .4).
REPLAY_S, CAPTURE_S = 0.2e-3, 4.0


@dataclass(frozen=True)
class XrayOptions:
    """`every` so many steps, or at `steps`; without either at LOOKS steps, each a like factor after the one before.
    `slices` of `tokens` each, `draws` of the random bits. `recipes`: others to measure on the same tensors."""

    every: int | None = None
    steps: tuple[int, ...] = ()
    tokens: int = 2048
    slices: int = 4
    draws: int = 8
    recipes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("tokens", 1), ("slices", 2), ("draws", DRAWS_AT_LEAST)):
            value = getattr(self, name)
            if not (name == "every" and value is None) and (type(value) is not int or value < least):
                raise ValueError(f"probes.xray.{name}={value!r}: needs a whole number of at least {least}")
        for name, kind, example in (("steps", int, "[100,1000]"), ("recipes", str, "[nvidia]")):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not all(type(value) is kind for value in values):
                raise ValueError(f"probes.xray.{name}={values!r}: needs a list, such as {example}")
            object.__setattr__(self, name, tuple(values))
        if self.every is not None and self.steps:
            raise ValueError("probes.xray.every and probes.xray.steps: give one of them")


class Xray(Probe):
    Options = XrayOptions

    def __init__(self, options: XrayOptions):
        super().__init__(options)
        self._eye: Eye | None = None
        self._looks, self._seconds = 0, 0.0

    @classmethod
    def fit(cls, options: XrayOptions, coming: Coming) -> XrayOptions:
        numbers = coming.numbers
        steps = options.steps or tuple(chosen_steps(options.every, numbers.steps))
        if beyond := [step for step in steps if not 1 <= step <= numbers.steps]:
            raise ValueError(
                f"probes.xray.steps: the run has no step {beyond[0]}; choose from 1 to its last, {numbers.steps}"
            )
        if not steps:
            raise ValueError(f"probes.xray.every={options.every}: the run has {numbers.steps} steps; choose fewer")
        check_slices(options, numbers)
        others = {name: resolve(coming.model, Precision(library.load(name))) for name in options.recipes}
        for plan in (*coming.plans, *others.values()):
            check_plan(plan, options.tokens)
        for name, plan in others.items():
            if plan.recipe.hook:
                raise ValueError(
                    f"probes.xray.recipes: {name} needs what hooks.{plan.recipe.hook} fits in a run of its own; X-ray "
                    "such a run"
                )
        return replace(options, steps=steps)

    @classmethod
    def cost(cls, options: XrayOptions, numbers: Numbers, plan: Plan, graphed: bool) -> str:
        looks = len(options.steps)
        # Passes, and each layer's own products: about as much again for each recipe.
        work = looks * options.slices * options.tokens * (2 + options.draws) * (2 + len(options.recipes))
        price = (
            f"about {seconds(options, plan):.0f} s on an H200"
            if graphed
            else f"uncompiled work of {work / numbers.tokens:.1%} of the run's tokens"
        )
        return (
            f"xray at {looks} step{'s' * (looks > 1)} ({shown(options.steps)}): {options.slices} slices of "
            f"{options.tokens:,} tokens, {options.draws} draws; {price}"
        )

    def spent(self) -> str | None:
        looks = f"{self._looks} look{'s' * (self._looks > 1)}"
        return f"xray: {looks} took {self._seconds:.1f} s" if self._looks else None

    @classmethod
    def memory(
        cls, options: XrayOptions, plan: Plan, of: Callable[..., MemoryEstimate], graphed: bool
    ) -> MemoryEstimate:
        """What is captured stays beside the step's own graphs; else one is gone before the other begins."""
        shapes = [entry.shape for entry in plan.entries if entry.name != HEAD]
        recipes = 1 + len(options.recipes)
        held = held_bytes(shapes, options.tokens, options.slices, options.draws, recipes) / GIB
        parts = of(plan, options.tokens).parts
        held += parts["activations"]  # one forward's stay until the last draw's backward
        if not graphed:
            return MemoryEstimate(parts | {"X-ray": held})
        held += sum(parts[name] for name in ("activations", "temporaries", "gradients"))
        return MemoryEstimate(of(plan).parts | {"X-ray": held})

    def due(self, step: int) -> bool:
        return step in self.options.steps

    def rows(self, context: Context) -> list[dict[str, Any]]:
        numbers, options = context.numbers, self.options
        if not context.graphs:
            context.release()
        view = View(
            context.loss,
            numbers.tokens_per_step,
            lambda draw: context.set_rng(context.step, numbers.micro_batches + draw),
            context.accumulate,
            several=not is_sharded(context.loss),
            graphs=context.graphs,
        )
        text = list(slices(context.batches, context.step, numbers, options))
        return [self.row(view, text, context.step, numbers)]

    def row(self, view: View, text: list[Tensor], step: int, numbers: Numbers) -> dict[str, Any]:
        """What one look sees. Graphs stay for the next one."""
        began = time.perf_counter()
        if self._eye is not None and not self._eye.sees(view):
            self._eye.close()
            self._eye = None
        options = self.options
        eye = self._eye or Eye(view, options.draws, {name: library.load(name) for name in options.recipes})
        eye.view, self._eye = view, eye
        found = eye.look(text)
        if not view.graphs:
            eye.close()
            self._eye = None
        spent = time.perf_counter() - began
        self._looks, self._seconds = self._looks + 1, self._seconds + spent
        return {
            "kind": "xray",
            "step": step,
            "tokens": step * numbers.tokens_per_step,
            "slices": options.slices,
            "slice_tokens": options.tokens,
            "draws": options.draws,
            "seconds": round(spent, 3),
            **found,
        }


def seconds(options: XrayOptions, plan: Plan) -> float:
    """Of all looks, on an H200 (docs/results/xray.md): in every slice each layer's products for BF16, the exact
    backward and each draw, in the pass and then alone, alone under every recipe."""
    layers = sum(entry.name != HEAD for entry in plan.entries)
    once = options.slices * layers * (2 + options.draws) * (2 + len(options.recipes))
    return CAPTURE_S + len(options.steps) * once * REPLAY_S


def chosen_steps(every: int | None, last: int) -> list[int]:
    if every is not None:
        return list(range(every, last + 1, every))
    return sorted({round(last ** (number / LOOKS)) for number in range(1, LOOKS + 1)})


def shown(steps: tuple[int, ...]) -> str:
    return ", ".join(f"{step:,}" for step in steps) if len(steps) <= LOOKS else f"{steps[0]:,} to {steps[-1]:,}"


def check_plan(plan: Plan, tokens: int) -> None:
    """ValueError or RuntimeError where a recipe has no parts to tell apart, or can't take a slice."""
    try:
        plan.check_tokens(tokens)
        for recipe in plan.recipes:
            recipe.exact_backward()
    except ValueError as error:
        raise ValueError(f"probes.xray: {error}") from None


def check_slices(options: XrayOptions, numbers: Numbers) -> None:
    seq_len, tokens = numbers.seq_len, options.tokens
    if tokens > seq_len and tokens % seq_len:
        fitting = tokens // seq_len * seq_len
        raise ValueError(
            f"probes.xray.tokens={tokens}: sequences have {seq_len} tokens; take {fitting}, another multiple, or fewer"
        )
    rank = numbers.steps * numbers.accumulation * numbers.micro
    if options.slices * rows_of(options, numbers) > rank:
        raise ValueError(
            f"probes.xray: {options.slices} slices of {tokens} tokens are more than the {rank * seq_len} that a rank "
            "trains on; lower probes.xray.tokens or probes.xray.slices"
        )


def rows_of(options: XrayOptions, numbers: Numbers) -> int:
    """Sequences of a slice; one is cut where it is longer."""
    return max(1, options.tokens // numbers.seq_len)


def slices(
    batches: Callable[[int], Iterator[Tensor]], step: int, numbers: Numbers, options: XrayOptions
) -> Iterator[Tensor]:
    """Text of the last steps, as many as it takes, of this rank: all of it has been trained on, most of it once."""
    rows, per_step = rows_of(options, numbers), numbers.accumulation * numbers.micro
    behind = -(-options.slices * rows // per_step)
    found, count = [], 0
    stream = batches(max(0, min(step, numbers.steps) - behind))
    while count < options.slices * rows:
        found.append(next(stream))
        count += len(found[-1])
    tokens = torch.cat(found)[: options.slices * rows, : min(options.tokens, numbers.seq_len) + 1]
    yield from tokens.split(rows)
