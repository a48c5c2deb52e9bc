"""The training loop: step, log, checkpoint, evaluate, stop. Everything it needs arrives built (start/launch.py).

Order within a step that has several duties: the losses are read and checked, then the checkpoint is saved, then the
model is evaluated; so a failing evaluation never costs the checkpoint, and a non-finite state is never saved.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor, nn

from base.flops import mfu_formula
from base.runfolder import FORWARDS, RESULT, segments_file
from data.evalset import EvalSet
from training.checkpoint.state import Checkpointer, Saved, TrainState
from training.checkpoint.storage import NonFiniteState
from training.config import TrainConfig
from training.dead import REMEDY, Pulse, nothing_learned
from training.evaluate import EVAL_MICRO_BASE, evaluate, save_rows
from training.microbatch import MicroBatch
from training.nonfinite import Guard, Recovery, first_non_finite
from training.optim.groups import clip_gradients, set_rates
from training.probes.base import Context, Evaluation, Probe
from training.ranks.distributed import Dist, SharedFlag
from training.ranks.signals import NAMES, StopFlag
from training.ranks.watchdog import Watchdog
from training.records.console import Console
from training.records.loggers import Loggers
from training.records.metrics import StepBuffer, memory_gib, others_gib, peak_flops
from training.records.profile import Profile
from training.records.runfolder import RunFolder
from training.start.derive import Numbers

# A save that has been written for longer than this is not followed by another one when the job is stopped.
LONG_SAVE_S = 2.0
# Steps between two reads of the device at most, whatever log.every says: the buffer has a row for each.
BUFFERED_STEPS = 10_000


@dataclass
class Parts:
    """What a run is made of. `loss`: tokens [B, T+1] -> summed nats, the wrapped and compiled LossModel."""

    config: TrainConfig
    numbers: Numbers
    ranks: Dist
    folder: RunFolder
    state: TrainState
    loss: nn.Module
    accumulate: Callable[[bool], AbstractContextManager]  # (last micro-batch?) -> context of its forward and backward
    micro_batch: MicroBatch
    rng: Tensor  # int64 [3]: seed, step, micro-batch
    batches: Callable[[int], Iterator[Tensor]]  # first step -> this rank's micro-batches, int64 on the device
    sample_hashes: Callable[[int, int], list[str]]  # first step, count -> hash of each one's samples, over all ranks
    evalset: EvalSet
    final_evalset: EvalSet
    named_evalsets: dict[str, tuple[EvalSet, EvalSet]]  # name -> (during training, at the end)
    flops_per_token: int
    checkpointer: Checkpointer
    loggers: Loggers
    console: Console
    profile: Profile
    stop: StopFlag
    watchdog: Watchdog


class _Stopped(Exception):
    """A stop of this level was asked for within an evaluation."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.level = level


class Trainer:
    """Runs from state.step to the last step. Steps are counted as completed optimizer steps."""

    def __init__(self, parts: Parts):
        self.p = parts
        self.numbers = parts.numbers
        self.state = parts.state
        self.optimizers = parts.state.optimizers
        device = parts.ranks.device
        self._buffer = StepBuffer(min(parts.config.log.every, BUFFERED_STEPS), device)
        self._peak = peak_flops(device)
        self._stop = SharedFlag(parts.ranks)
        self._guard = Guard(parts.state.optimizers, device)
        self._recovery = Recovery(parts.config.nonfinite, parts, self.event)
        self._told: set[str] = set()  # probes whose caution was told
        self._pulse = Pulse(parts.state.model.config.vocab_size, parts.console.say)
        self._window_start = time.perf_counter()
        self._started = time.perf_counter()
        self._wall_before = self.state.extra.get("wall_s", 0.0)
        self._resumed_at = self.state.step
        parts.checkpointer.on_saved = self._saved

    def run(self) -> int:
        """Train to the end or until asked to stop. Returns the process's exit code."""
        try:
            return self._run()
        except _Stopped as stopped:  # an evaluation changes no state; the resumed run begins with it
            return self._stop_early(stopped.level)

    def _run(self) -> int:
        if self._evaluation_due() and not self._evaluated():
            self._evaluate(self.p.evalset)  # killed between a checkpoint and its evaluation
        self._batches = self.p.batches(self._resumed_at)
        self._restart_clock()
        while self.state.step < self.numbers.steps:
            with self.p.profile.step(self.state.step + 1):
                level = self._train_step()
            save = bool(level) or self._due(self.p.config.checkpoint.every) or self.state.step in self.p.checkpointer.at
            step = self.state.step
            probes = {} if level else self._due_probes(at_evaluation=False)
            first = self.state.step == self._resumed_at + 1  # alone in its window: it pays for compilation
            last = self.state.step == self.numbers.steps
            log = self._due(self.p.config.log.every) or self._buffer.count == BUFFERED_STEPS
            if save or probes or first or last or log or self._evaluation_due():
                self._flush()
            if level:
                return self._stop_early(level)
            if self.state.step == step:  # else a bad step was found and left out, with those after it
                self._look(probes)
            if save and self.state.step < self.numbers.steps:
                self._save()
            if self._evaluation_due():
                self._evaluate(self.p.evalset)
            if save or probes or self._evaluation_due():
                self._restart_clock()
        return self._finish()

    def _train_step(self) -> int:
        """One step, or nothing if a stop was asked for: its level. Looked at before every micro-batch, since a step may
        take longer than a preempted job is given; the resumed run repeats the step from its start."""
        step, numbers = self.state.step, self.numbers
        micro_batches = numbers.micro_batches_of(self.p.ranks.rank)
        for hook in self.state.hooks.values():
            hook.before_step(step)
        for micro in micro_batches:
            if level := self._stop.poll(self.p.stop.level):
                self._zero_grad()
                return level
            tokens = next(self._batches)
            self._set_rng(step, micro)
            nats = self.p.micro_batch(tokens, first=micro == micro_batches[0], last=micro == micro_batches[-1])
            self._buffer.add_nats(nats)
            self.p.console.within(f"step {step + 1}", micro - micro_batches[0] + 1, len(micro_batches))
        for hook in self.state.hooks.values():
            hook.before_update(step)
        grad_norm = clip_gradients(self.state.model, self.p.config.optim.clip, self.optimizers)
        self._guard.watch(grad_norm)
        set_rates(self.optimizers, numbers.schedule, step)
        for optimizer in self.optimizers:
            optimizer.step()
        for hook in self.state.hooks.values():
            hook.after_step(step, self._guard.skip)
        self._zero_grad()
        self._buffer.end_step(grad_norm)
        self.state.step += 1
        self.state.tokens += numbers.tokens_per_step
        return 0

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _set_rng(self, step: int, micro: int) -> None:
        self.p.rng[1].fill_(step)  # fills take a scalar argument: no copy from the host, no synchronization
        self.p.rng[2].fill_(micro)
        self.p.watchdog.beat(step, f"micro-batch {micro}")

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _evaluation_due(self) -> bool:
        return 0 < self.state.step < self.numbers.steps and self._due(self.p.config.evaluate.every)

    def _evaluated(self) -> dict[str, Any] | None:
        """The row of this step's evaluation, if there is one: {loss, bpb, se, ...}."""
        rows = self.p.loggers.file.rows()
        return next((row for row in rows if row["kind"] == "eval" and row["step"] == self.state.step), None)

    def _restart_clock(self) -> None:
        self._window_start = time.perf_counter()

    def _flush(self) -> None:
        """Read the buffered steps from the device and log them, up to the first non-finite one."""
        if not self._buffer.count:
            return
        values = self._buffer.read(self.p.ranks.sum)
        now = time.perf_counter()
        ms = 1e3 * (now - self._window_start) / len(values)
        self._window_start = now
        first = self.state.step - len(values) + 1
        # What all steps share is found once: the device idles until the next one is launched.
        device = self.p.ranks.device
        memory = {"memory_gib": memory_gib(device), "others_gib": others_gib(device)}
        shared = {"ms_per_step": ms, **self._speed(ms), **memory}
        samples = self.p.sample_hashes(first - 1, len(values))
        rows = [
            self._train_row(first + i, nats, norm) | shared | {"samples": samples[i], "time": time.time()}
            for i, (nats, norm) in enumerate(values)
        ]
        bad = first_non_finite(rows)
        if bad is not None:
            return self._recover(rows[:bad], rows[bad])
        self._log(*rows)
        self.p.console.step(rows[-1])
        self._pulse.feel(rows)

    def _recover(self, good: list[dict[str, Any]], bad: dict[str, Any]) -> None:
        """The steps after the bad one did nothing (nonfinite.Guard); go on as the policy says, or raise."""
        self._log(*good)
        self._recovery.handle(bad["step"], bad["loss"], bad["grad_norm"])
        self._guard.lower()
        self._batches = self.p.batches(self.state.step)
        self._restart_clock()

    def _speed(self, ms: float) -> dict[str, Any]:
        tokens_per_second = 1e3 * self.numbers.tokens_per_step / ms
        flops = self.p.flops_per_token * tokens_per_second / self.numbers.world
        return {
            "tokens_per_second": tokens_per_second,
            "mfu": flops / self._peak if self._peak else None,
            "mfu_formula": mfu_formula(self._peak) if self._peak else None,
        }

    def _train_row(self, step: int, nats: float, grad_norm: float) -> dict[str, Any]:
        return {
            "kind": "train",
            "step": step,
            "tokens": step * self.numbers.tokens_per_step,
            "loss": nats / self.numbers.tokens_per_step,
            "grad_norm": grad_norm,
            "lr": self.numbers.schedule.lr(step - 1),
        }

    def _log(self, *rows: dict[str, Any]) -> None:
        if self.p.ranks.is_main:
            self.p.loggers.write(*rows)

    def event(self, event: str, **fields: Any) -> None:
        row = {"kind": "event", "event": event, "step": self.state.step, "tokens": self.state.tokens}
        self._log({**row, **fields, "time": time.time()})

    def _save(self, wait: bool = False) -> None:
        self.state.extra["wall_s"] = self._wall_s()
        try:
            self.p.checkpointer.save(self.state, wait=wait)
        except NonFiniteState as error:
            self._recovery.unsavable(error)
            self._batches = self.p.batches(self.state.step)
            self.p.checkpointer.save(self.state, wait=wait)

    def _saved(self, report: Saved) -> None:
        self.event("checkpoint", **{("saved_step" if k == "step" else k): v for k, v in asdict(report).items()})

    def _wall_s(self) -> float:
        return self._wall_before + time.perf_counter() - self._started

    def _score(self, evalset: EvalSet) -> np.ndarray:
        def nats_per_token(tokens: Tensor) -> Tensor:
            return self.p.loss(tokens, per_token=True)

        def before_batch(index: int) -> None:
            if level := self._stop.poll(self.p.stop.level):
                raise _Stopped(level)
            self._set_rng(self.state.step, index)
            done, batches = index - EVAL_MICRO_BASE, -(-evalset.sequences // self.numbers.micro)
            self.p.console.within(f"evaluation at step {self.state.step}", done, batches)

        return evaluate(nats_per_token, evalset, self.numbers.micro, self.p.ranks, before_batch)

    def _evaluate(self, evalset: EvalSet, at_end: bool = False) -> dict[str, float | None]:
        """Score, write eval/<step>.npz, the eval row and those of the probes; returns the row's {loss, bpb, ...}."""
        step = self.state.step
        for hook in self.state.hooks.values():
            hook.before_evaluation(step)
        nats = self._score(evalset)
        probes = self._due_probes(at_evaluation=True)
        context = self._context(Evaluation(evalset, nats, lambda: self._score(evalset)))
        summary, beside = evalset.summary(nats), {}
        for probe in probes.values():
            beside |= probe.scores(context)
        if self.p.ranks.is_main:
            save_rows(segments_file(self.p.folder.path, step), evalset, nats)
        summary |= self._evaluate_named(at_end)
        # `targets`: how much was scored, so that no reader has to open the rows of every evaluation to know it.
        scored = {"tokens": self.state.tokens, "targets": evalset.targets}
        self._log({"kind": "eval", "step": step, **scored, **summary, **beside, "time": time.time()})
        self._look(probes, context)
        about = "~" if summary.get("bpb_approximate") else ""
        error = "" if summary["se"] is None else f" +- {summary['se']:.4f}"
        others = "".join(f", {name.removeprefix('loss_')} {value:.4f}" for name, value in beside.items())
        self.p.console.say(
            f"eval at step {step}: {summary['loss']:.4f}{error} nats/token{others}, "
            f"{about}{summary['bpb']:.4f} bits/byte over {evalset.targets:,} tokens"
        )
        return summary | beside

    def _evaluate_named(self, at_end: bool) -> dict[str, float | None]:
        """Score data.val_sets; returns {loss/<name>, bpb/<name>, se/<name>}, the rows go to eval/<name>/<step>.npz."""
        found: dict[str, float | None] = {}
        for name, lists in self.p.named_evalsets.items():
            evalset = lists[at_end]
            nats = self._score(evalset)
            summary = evalset.summary(nats)
            if self.p.ranks.is_main:
                rows = segments_file(self.p.folder.path, self.state.step)
                save_rows(rows.parent / name / rows.name, evalset, nats)
            found |= {f"{key}/{name}": value for key, value in summary.items()}
            self.p.console.say(f"  {name}: {summary['loss']:.4f} nats/token over {evalset.targets:,} tokens")
        return found

    def _due_probes(self, at_evaluation: bool) -> dict[str, Probe]:
        found = {name: probe for name, probe in self.state.probes.items() if probe.at_evaluation == at_evaluation}
        return {name: probe for name, probe in found.items() if probe.due(self.state.step)}

    def _look(self, probes: dict[str, Probe], context: Context | None = None) -> None:
        """Write what the probes see, and leave no trace of their forwards and backwards."""
        for name, probe in probes.items():
            rows = probe.rows(context or self._context())
            self._zero_grad()
            step = self.state.step
            self._log(*({"kind": row["kind"], "step": step, **row, "time": time.time()} for row in rows))
            if name not in self._told and (caution := probe.caution(rows)):
                self._told.add(name)
                self.p.console.say(caution)

    def _context(self, evaluation: Evaluation | None = None) -> Context:
        return Context(
            step=self.state.step,
            folder=self.p.folder.path,
            loss=self.p.loss,
            numbers=self.numbers,
            ranks=self.p.ranks,
            hooks=self.state.hooks,
            batches=self.p.batches,
            set_rng=self._set_rng,
            accumulate=self.p.accumulate,
            release=self.p.micro_batch.release,
            graphs=self.p.micro_batch.graphs,
            evaluation=evaluation,
        )

    def _stop_early(self, level: int) -> int:
        """Save and leave. A preempted job is given 30 s: where the last save is long under way, another one would wait
        for it and take as long again, longer than the few steps since then take to be repeated."""
        if max(self.p.ranks.gather(self.p.checkpointer.writing_s())) > LONG_SAVE_S:
            self.p.checkpointer.wait()
        elif self.state.step != self._resumed_at:  # else it is on disk already, or is the initialization
            self._save(wait=True)
        self.event("interrupt", reason=NAMES[level])
        self.p.console.say(f"stopped at step {self.state.step} by {NAMES[level]}; the same command resumes")
        return StopFlag.exit_code(level)

    def _finish(self) -> int:
        """Save before the final evaluation: that one may run out of memory, the weights must not be lost."""
        if self.state.step != self._resumed_at:
            self._save(wait=True)
        # Killed between its evaluation and its result: scoring again would be a second row of one step.
        final = self._evaluated() or self._evaluate(self.p.final_evalset, at_end=True)
        self.event("finish")
        if self.p.ranks.is_main:
            result = self._result(final)
            self.p.folder.write(RESULT, result)
            if "why" in result:
                self.p.console.say(f"warning: this run is dead: {result['why']}; {REMEDY}")
        for line in filter(None, (probe.spent() for probe in self.state.probes.values())):
            self.p.console.say(line)
        self.p.console.say(f"finished: {self.p.folder.path}")
        return 0

    def _served(self, final: dict[str, float | None]) -> dict[str, dict[str, float]]:
        """{served: {forward: loss}} where evaluate.served asked for it."""
        losses = {name: final[f"loss_{name}"] for name in FORWARDS if f"loss_{name}" in final}
        return {"served": losses} if len(losses) == len(FORWARDS) else {}

    def _result(self, final: dict[str, float | None]) -> dict[str, Any]:
        rows = self.p.loggers.file.rows()
        train = [row for row in rows if row["kind"] == "train"]
        why = nothing_learned(train, final["loss"], self.state.model.config.vocab_size)
        return {
            **({"status": "dead", "why": why} if why else {"status": "finished"}),
            "step": self.state.step,
            "tokens": self.state.tokens,
            "final_loss": final["loss"],
            "final_bpb": final["bpb"],
            **({"final_bpb_approximate": True} if final.get("bpb_approximate") else {}),
            "final_se": final["se"],
            **{f"final_{key}": value for key, value in final.items() if "/" in key},
            **self._served(final),
            "wall_s": self._wall_s(),
            "train_loss_last": train[-1]["loss"] if train else None,
            "ms_per_step_median": median(row["ms_per_step"] for row in train) if train else None,
        }
