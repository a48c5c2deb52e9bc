"""A loss or gradient that is NaN or infinite: frozen on the device, named by replay, then stop, skip or roll back.

The losses are read only every few steps, so by the time a bad step is seen, others have followed. `Guard` keeps them
from doing harm: a flag on the device, raised by the first non-finite gradient norm and never lowered by itself, makes
the fused optimizer leave weights and moments alone. When the host sees the bad step b, the state is still exactly the
one after step b - 1: the step can be replayed, skipped, or saved for a look at it. No step waits for the device.

    stop      save the state of step b - 1 and end with the culprit's name (default)
    skip      go on with step b + 1; the batch of step b is left out
    rollback  load the last good checkpoint, of step c, and go on with step b + 1: batches c + 1 to b are left out

An update can make a state non-finite while losses and gradients stay finite: rows of an embedding that no text uses,
moments that overflow. Saves notice it (checkpoint.non_finite), and nothing of it reaches a disk.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant.names import GEMMS
from quant.plan import changed, quant_linears, unquantized
from training.checkpoint.manifest import latest_good, step_of
from training.checkpoint.state import load, non_finite, state_tensors
from training.checkpoint.storage import NonFiniteState, first_names

if TYPE_CHECKING:
    from training.loop import Parts

# A batch that can't be trained on is bad luck; more of them one after the other are a broken run.
MOST_IN_A_ROW = 3
SMALLER_STEPS = "start another run with a lower optim.lr, with optim.clip=1 or a larger optim.eps"


class NonFiniteError(RuntimeError):
    """The run was stopped at a non-finite step. The message names step, layer, GEMM and tensor."""


class Guard:
    """Makes optimizers skip their update, on the device, from the first non-finite gradient norm on.

    Uses the `found_inf` of torch's fused optimizers, made for loss scaling: a true skip, moments and step count
    included. Raises ValueError for an optimizer without it.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], device: torch.device) -> None:
        self._raised = torch.zeros((), device=device)
        for optimizer in optimizers:
            if not getattr(optimizer, "_step_supports_amp_scaling", False):
                raise ValueError(f"{type(optimizer).__name__} can't skip a step on the device; use fused=True")
            optimizer.found_inf = self._raised

    def watch(self, grad_norm: Tensor) -> None:
        """Before optimizer.step()."""
        self._raised.copy_(torch.maximum(self._raised, (~torch.isfinite(grad_norm)).to(self._raised.dtype)))

    @property
    def skip(self) -> Tensor:
        """FP32 [] on the device: not 0 where nothing of the run may change."""
        return self._raised

    def lower(self) -> None:
        self._raised.zero_()


@dataclass
class Finding:
    """First non-finite tensor of one micro-batch's replay, in the order of execution; None: the replay was finite."""

    micro: int
    first: dict[str, str] | None
    bf16_is_finite: bool | None = None  # None: not tried, the recipe's own replay was finite
    gemms: dict[str, bool] = field(default_factory=dict)  # GEMM quantized alone -> its replay is finite


class Recovery:
    """Carries out the policy for the run made of `parts`; `event` writes an event row to metrics.jsonl."""

    def __init__(self, policy: str, parts: "Parts", event: Callable[..., None]) -> None:
        self._policy, self._p, self._event = policy, parts, event
        self._in_a_row, self._last = 0, -1
        self._rolled_back_at = -1  # the step whose state couldn't be saved

    def handle(self, step: int, loss: float, grad_norm: float) -> None:
        """Set the state to where training goes on. Collective. Raises NonFiniteError to stop."""
        state, numbers = self._p.state, self._p.numbers
        self._set_step(step - 1)
        findings = [found for rank in self._p.ranks.gather(self._diagnose(step)) for found in rank]
        bad = non_finite(state_tensors(state), self._p.ranks.group)
        cause = describe(findings, bad)
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}. {cause}"
        self._event("nonfinite", bad_step=step, loss=str(loss), grad_norm=str(grad_norm), cause=cause)
        self._in_a_row = self._in_a_row + 1 if step == self._last + 1 else 1
        self._last = step
        if self._policy == "stop":
            self._stop(what, bad)
        if self._in_a_row > MOST_IN_A_ROW:
            raise NonFiniteError(f"{what} Stopped: {self._in_a_row} such steps in a row, in spite of {self._policy}")
        if self._policy == "skip" and bad:
            raise NonFiniteError(f"{what} Stopped: skipping a batch doesn't mend the state. {self._way_out(step)}")
        if self._policy == "rollback":
            self._roll_back(what, step)
        self._set_step(step)
        self._event(self._policy, bad_step=step)
        self._p.console.say(f"{what} Policy {self._policy}: going on with step {step + 1} of {numbers.steps}")

    def unsavable(self, error: NonFiniteState) -> None:
        """A save met a state that isn't finite, and wrote nothing: roll back, or end the run. Collective.

        Raises NonFiniteError to stop; at the second time without a whole save in between, too.
        """
        step, what = self._p.state.step, f"step {self._p.state.step}: {describe([], error.names)}"
        self._event("nonfinite", bad_step=step, loss=None, grad_norm=None, cause=what)
        if self._policy != "rollback":
            raise NonFiniteError(f"{what} Stopped; nothing was saved. {self._way_out(step)}")
        found = self._roll_back(what, step)
        if step_of(found) == self._rolled_back_at:
            raise NonFiniteError(f"{what} Stopped: it came back after a rollback; {SMALLER_STEPS}")
        self._rolled_back_at = step
        self._set_step(step)
        self._event("rollback", bad_step=step)
        self._p.console.say(f"{what} Policy rollback: going on with {found.name}'s state at step {step}")

    def _way_out(self, step: int) -> str:
        """What to type where the state itself isn't finite: a rollback needs a checkpoint to go back to."""
        found = self._last_good(step)
        if found is None:
            return SMALLER_STEPS.capitalize()
        return f"Add nonfinite=rollback to go on from {found.name} without the batches since, or {SMALLER_STEPS}"

    def _last_good(self, step: int) -> Path | None:
        self._p.checkpointer.wait()
        return self._p.ranks.on_main(lambda: latest_good(self._p.folder.path, before=step))

    def _set_step(self, step: int) -> None:
        self._p.state.step, self._p.state.tokens = step, step * self._p.numbers.tokens_per_step

    def _stop(self, what: str, bad: list[str]) -> None:
        if bad:
            way_out = self._way_out(self._p.state.step + 1)
            raise NonFiniteError(f"{what} Stopped (nonfinite=stop); nothing was saved. {way_out}")
        self._p.checkpointer.save(self._p.state, wait=True)
        raise NonFiniteError(
            f"{what} Stopped (nonfinite=stop); the state before it is saved as step {self._p.state.step}. To go on "
            "without this batch, add nonfinite=skip to the command"
        )

    def _roll_back(self, what: str, step: int) -> Path:
        found = self._last_good(step)
        if found is None:
            raise NonFiniteError(f"{what} Stopped: no checkpoint to roll back to yet; lower checkpoint.every")
        load(found, self._p.state, self._p.ranks.group)
        return found

    def _diagnose(self, step: int) -> list[Finding]:
        """Replay this rank's micro-batches of the bad step, eagerly."""
        parts, share = self._p, self._p.numbers.micro_batches_of(self._p.ranks.rank)
        parts.micro_batch.release()
        for hook in parts.state.hooks.values():
            hook.before_step(step - 1)
        batches, findings = parts.batches(step - 1), []
        for micro in share:
            tokens = next(batches)

            def replay(tokens: Tensor = tokens, micro: int = micro) -> dict[str, str] | None:
                parts.rng[1].fill_(step - 1)
                parts.rng[2].fill_(micro)
                return first_bad(parts.loss, parts.state.model, tokens, parts.accumulate)

            findings.append(examine(parts.state.model, micro, replay))
        for optimizer in parts.state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return findings


def examine(model: nn.Module, micro: int, replay: Callable[[], dict[str, str] | None]) -> Finding:
    """Replay with the recipe, in BF16, and with one GEMM quantized at a time where a recipe can be parted so. The same
    number of replays whatever they find: under FSDP a replay is a collective."""
    finding = Finding(micro, replay())
    with unquantized(model):
        finding.bf16_is_finite = replay() is None
    recipes = {layer.recipe for layer in quant_linears(model).values() if layer.recipe.is_quantized}
    for gemm in (gemm for gemm in GEMMS if any(gemm in recipe.alone() for recipe in recipes)):
        with changed(model, lambda recipe, gemm=gemm: recipe.alone().get(gemm) or recipe.plain()):
            finding.gemms[gemm] = replay() is None
    return finding


def first_bad(loss: nn.Module, model: nn.Module, tokens: Tensor, accumulate: Callable) -> dict[str, str] | None:
    """Forward and backward of one micro-batch, looking at every linear layer's tensors; the first that isn't finite."""
    found: list[dict[str, str]] = []

    def look(layer: str, gemm: str, name: str, tensor: Tensor) -> None:
        if not found and not bool(torch.isfinite(tensor).all()):
            found.append({"layer": layer, "gemm": gemm, "tensor": name})

    handles: list[Any] = []
    for layer, module in quant_linears(model).items():
        _observe(layer, module, look, handles)
    try:
        with torch.compiler.set_stance("force_eager"), accumulate(True):
            nats = loss(tokens)
            look("loss", "cross-entropy", "nats", nats)
            nats.backward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _observe(layer: str, module: nn.Module, look: Callable, handles: list[Any]) -> None:
    """`handles` collects what has to be removed; hooks on activations die with them, one on a weight wouldn't."""

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        look(layer, "fprop", "x", inputs[0])
        look(layer, "fprop", "w", module.weight)
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: look(layer, "dgrad", "dx", gradient))
        handles.append(module.weight.register_hook(lambda gradient: look(layer, "wgrad", "dw", gradient)))

    def after(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        look(layer, "fprop", "y", y)
        y.register_hook(lambda gradient: look(layer, "dgrad", "dy", gradient))

    handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def describe(findings: list[Finding], state: list[str]) -> str:
    """One sentence or two for a person. `state`: stored names of its tensors that are not finite."""
    if weights := [name.removeprefix("model.") for name in state if name.startswith("model.")]:
        return f"Weights that are not finite: {first_names(weights)}."
    if state:
        return f"State beside the weights that is not finite: {first_names(state)}."
    bad = [finding for finding in findings if finding.first is not None]
    if not bad:
        return "The replay is finite: not a property of the data or the recipe (a hardware fault, or a transient one)."
    first = bad[0].first
    where = f"{first['tensor']} of {first['gemm']} in {first['layer']}, micro-batch {bad[0].micro}"
    text = f"First in {where} ({len(bad)} of {len(findings)} micro-batches are bad)."
    if not bad[0].bf16_is_finite:
        return f"{text} So it is in BF16: the recipe isn't the cause."
    text += " In BF16 it is finite: the recipe is the cause."
    guilty = [gemm for gemm, finite in bad[0].gemms.items() if not finite]
    if guilty:
        return f"{text} {' and '.join(guilty)} quantized alone shows it too."
    return f"{text} No GEMM quantized alone shows it." if bad[0].gemms else text


def first_non_finite(rows: list[dict[str, Any]]) -> int | None:
    """Index of the first row whose loss or gradient norm isn't finite."""
    bad = (i for i, row in enumerate(rows) if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])))
    return next(bad, None)
