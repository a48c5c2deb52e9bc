"""Save and load a run's whole state: weights, optimizer state, step. Sharded, asynchronous, atomic, checksummed.

Built on torch.distributed.checkpoint's planners, so that what N ranks saved can be loaded by M, under DDP, FSDP or
neither. Names don't depend on any wrapper: `model.<name>`, `optim.<i>.<parameter>.<state>`, `hooks.<hook>.<key>`,
`probes.<probe>.<key>`. Hyper-parameters (learning rate, decay) are not stored: they are functions of the config and of
the step, and the config's hash is checked.
There is no generator state to store (docs/numerics.md#5-random-bits). Format and what counts as damaged: storage.py
and manifest.py.
"""

import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from base.runfolder import CHECKPOINTS
from base.words import some
from quant.plan import quant_linears
from training.checkpoint.manifest import read_meta, step_name
from training.checkpoint.publish import Job, PublishThread
from training.checkpoint.storage import (
    NAMES_SHOWN,
    CheckpointError,
    NonFiniteState,
    ShardReader,
    StagingBuffers,
    StagingWriter,
    dtype_named,
    first_names,
    read_index,
)
from training.optim.groups import create_state
from training.ranks.distributed import local

# What index, manifest and the file system's own records take beside the tensors.
SPARE_BYTES = 64 * 2**20


class HasState(Protocol):
    """A hook or a probe: tensors by key, whose names and shapes follow from the step (training/hooks/base.py)."""

    def state(self, step: int) -> dict[str, Tensor]: ...


@dataclass
class TrainState:
    """What a checkpoint holds. `extra` must be JSON-able; `hash` is the numerics hash of the run."""

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    hooks: Mapping[str, HasState] = field(default_factory=dict)
    probes: Mapping[str, HasState] = field(default_factory=dict)
    step: int = 0
    tokens: int = 0
    hash: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A finished save: how long training stood still, how long writing took in the background, GB of all ranks."""

    step: int
    path: str
    stall_s: float
    write_s: float
    gigabytes: float


def state_tensors(state: TrainState, step: int | None = None) -> dict[str, Tensor]:
    """Every tensor of the state by its stored name; DTensors stay DTensors. The tensors themselves, not copies.
    `step`: that of a checkpoint to be loaded, whose hooks may hold other tensors than now."""
    tensors = {f"model.{name}": value for name, value in state.model.state_dict(keep_vars=True).items()}
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    for i, optimizer in enumerate(state.optimizers):
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                if not isinstance(value, Tensor):
                    raise CheckpointError(f"optimizer {i} keeps {key!r} as {type(value).__name__}; make it a tensor")
                tensors[f"optim.{i}.{names[parameter]}.{key}"] = value
    for kind, owners in (("hooks", state.hooks), ("probes", state.probes)):
        for name, owner in owners.items():
            own = owner.state(state.step if step is None else step)
            tensors |= {f"{kind}.{name}.{key}": value for key, value in own.items()}
    return tensors


def non_finite(tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> list[str]:
    """Names of the tensors with a NaN or an infinity, in any rank's part where a group is given (collective)."""
    bad = _non_finite_here(tensors)
    if group is None:
        return bad
    found: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(found, bad, group=group)
    return sorted({name for names in found for name in names})


@torch.no_grad()
def _non_finite_here(tensors: dict[str, Tensor]) -> list[str]:
    """One fused pass and one wait for the device: a finite sum of magnitudes has finite terms only. Where it isn't
    finite (large values overflow it, too), each tensor is looked at exactly."""
    parts = {name: local(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    parts = {name: part for name, part in parts.items() if part.numel()}
    for device in {part.device for part in parts.values()}:
        sums = torch._foreach_norm([part for part in parts.values() if part.device == device], 1)
        if not bool(torch.stack([s.float() for s in sums]).isfinite().all()):
            return [name for name, part in parts.items() if not bool(torch.isfinite(part).all())]
    return []


@contextmanager
def _one_process_notice_hidden() -> Any:
    """DCP warns at each call that it runs without a process group; that is how we run at world size 1."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is.*")
        yield


def _describe(error: CheckpointException) -> CheckpointError:
    """The first rank's own error, in place of DCP's list of formatted tracebacks."""
    rank, failure = next(iter(error.failures.items()))
    inner = failure[0] if isinstance(failure, tuple) else failure
    where = f"rank {rank}: " if len(error.failures) > 1 or rank else ""
    return CheckpointError(f"{where}{inner}")


class Checkpointer:
    """Saves a run's checkpoints into run_dir/checkpoints, keeping the last `keep_last` and every `keep_every`-th step.

    Every method is collective: all ranks call it at the same step. `group` is a CPU (gloo) process group; None at
    world size 1. `on_saved` gets a Saved on every rank, from the thread that calls `save` or `wait`. `before_save`
    may raise, to keep a state from being saved. `newest`: a step that is on disk already, just loaded. `at`: steps that
    are never deleted either.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        asynchronous: bool = True,
        group: dist.ProcessGroup | None = None,
        on_saved: Callable[[Saved], None] = lambda report: None,
        before_save: Callable[[], None] = lambda: None,
        newest: int | None = None,
        at: frozenset[int] = frozenset(),
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={keep_last}: at least 1, or nothing could be resumed")
        if keep_every < 0:
            raise ValueError(f"checkpoint.keep_every={keep_every}: a number of steps, or 0 for none")
        self.root = Path(run_dir) / CHECKPOINTS
        self.keep_last, self.keep_every, self.at = keep_last, keep_every, at
        self.asynchronous, self.group, self.on_saved, self.before_save = asynchronous, group, on_saved, before_save
        self._world = 1 if group is None else dist.get_world_size(group)
        self._buffers = StagingBuffers()
        self._pending: tuple[PublishThread, Saved] | None = None
        self._newest = newest

    def reserve(self, state: TrainState) -> None:
        """Allocate this rank's host buffers in the background: a third of the state are weights, AdamW's moments the
        rest, shared out evenly over the ranks. Only for tensors on a GPU, whose buffers are pinned."""
        weights = [p for p in state.model.parameters() if p.is_cuda]
        if weights and self.asynchronous:
            self._buffers.reserve(3 * sum(p.numel() * p.element_size() for p in weights) // self._world)

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Save `state` as step state.step. Returns once the state is copied; writing goes on in a thread, unless
        `wait` or the Checkpointer isn't asynchronous. The previous save is waited for first.

        Raises CheckpointError (disk full, folder not writable, a rank's failure), for the previous save or this one,
        and NonFiniteState, on every rank, where a value isn't finite: such a state never reaches the disk.
        """
        self.wait()
        if state.step == self._newest:
            return  # written by us already; to replace it would leave a moment without it
        self.before_save()
        if bad := non_finite(state_tensors(state), self.group):
            raise NonFiniteState(state.step, bad)
        begin = time.perf_counter()
        writer = StagingWriter(self.root, step_name(state.step), self._buffers, self._check_space)
        try:
            with _one_process_notice_hidden():
                dcp.save(
                    state_tensors(state),
                    storage_writer=writer,
                    planner=DefaultSavePlanner(flatten_state_dict=False),
                    process_group=self.group,
                    no_dist=self.group is None,
                )
        except CheckpointException as error:
            raise _describe(error) from error
        stall_s = time.perf_counter() - begin
        thread = PublishThread(self._job(state, writer))
        report = Saved(state.step, str(thread.job.final), stall_s, 0.0, writer.total_bytes / 1e9)
        self._pending = (thread, report)
        thread.start()
        if wait or not self.asynchronous:
            self.wait()

    def writing_s(self) -> float:
        """Seconds since the save in progress on this rank began to be written; 0 without one."""
        if self._pending is None or not self._pending[0].is_alive():
            return 0.0
        return time.perf_counter() - self._pending[0].begin

    def wait(self) -> None:
        """Wait until the save in progress, if any, is on disk. Raises CheckpointError on every rank if it failed on
        one."""
        if self._pending is None:
            return
        (thread, report), self._pending = self._pending, None
        error, write_s = None, 0.0
        try:
            write_s = thread.result()
        except CheckpointError as failure:
            error = failure
        if self.group is not None:
            errors: list[str | None] = [None] * self._world
            dist.all_gather_object(errors, None if error is None else str(error), group=self.group)
            # Rank 0 meets every rank's failure, and then removes the folder under those that still write.
            error = next((CheckpointError(e) for e in errors if e), None)
        if error is not None:
            raise error
        self._newest = report.step
        self.on_saved(Saved(report.step, report.path, report.stall_s, write_s, report.gigabytes))

    def _job(self, state: TrainState, writer: StagingWriter) -> Job:
        meta = {"step": state.step, "tokens": state.tokens, "hash": state.hash, "world_size": self._world}
        meta |= {"torch": torch.__version__, "saved_at": time.time(), "extra": state.extra}
        return Job(
            folder=writer.folder,
            final=self.root / step_name(state.step),
            files=writer.files,
            rank=0 if self.group is None else dist.get_rank(self.group),
            world=self._world,
            index=writer.index,
            meta=meta,
            keep_last=self.keep_last,
            keep_every=self.keep_every,
            at=self.at,
        )

    def _check_space(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.root).free
        if free < nbytes + SPARE_BYTES:
            raise CheckpointError(
                f"{self.root}: a checkpoint takes {(nbytes + SPARE_BYTES) / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. "
                "Free some space, lower checkpoint.keep_last, or move the run and set paths.runs; then run the same "
                "command again to resume"
            )


def load(
    path: str | Path, state: TrainState, group: dist.ProcessGroup | None = None, parent: str | None = None
) -> list[str]:
    """Fill `state` in place from the checkpoint folder `path` (verify it first: manifest.latest_good). Collective.

    Works for any world size and wrapper, whatever they were at the save. Raises CheckpointError if the checkpoint is of
    another run (hash), or its tensors aren't exactly the state's (names, shapes, dtypes), and nothing is loaded then;
    or if it holds a value that isn't finite (written before saves were checked). Only probes may come and go between
    two starts of a run: one that the checkpoint doesn't know begins anew.

    `parent`: the hash of the run that this one is a fork of, whose checkpoint it is; then hooks may be others too.
    Returns the names of the hooks that the checkpoint holds nothing of.
    """
    path = Path(path)
    meta = read_meta(path)
    if state.hash and meta["hash"] != (parent or state.hash):
        raise CheckpointError(
            f"{path} belongs to a run with numerics hash {meta['hash']}, this one has {state.hash}. Give this run "
            "another run.name, or move that folder away"
        )
    weights = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    index = read_index(path)
    _check_same(path, {k: v for k, v in index.items() if k.startswith("model.")}, weights)
    create_state(state.optimizers)
    tensors = state_tensors(state, meta["step"])
    free = ("probes.", "hooks.") if parent else ("probes.",)
    known = {name: value for name, value in tensors.items() if not name.startswith(free) or name in index}
    _check_same(path, {k: v for k, v in index.items() if not k.startswith(free) or k in known}, known)
    read_tensors(path, known, group)
    _refuse_bad(path, known, group)
    state.step, state.tokens, state.extra = meta["step"], meta["tokens"], meta["extra"]
    return [name for name in state.hooks if not any(key.startswith(f"hooks.{name}.") for key in index)]


def load_model(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """Fill only the weights, and what training fitted for their quantizers, for evaluation, export and generation.
    Returns the checkpoint's meta."""
    path = Path(path)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    index = read_index(path)
    _check_same(path, {k: v for k, v in index.items() if k.startswith("model.")}, tensors)
    fitted = fitted_tensors(model)
    _check_same(path, {k: v for k, v in index.items() if k in fitted}, fitted)
    tensors |= fitted
    read_tensors(path, tensors)
    _refuse_bad(path, tensors)
    return read_meta(path)


def fitted_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What hooks have fitted for the layers' quantizers (quant.linear.QuantLinear.fitted), by stored name."""
    return {
        f"hooks.{layer.hook}.{name}.{key}": value
        for name, layer in quant_linears(model).items()
        for key, value in layer.fitted().items()
    }


def _refuse_bad(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    if bad := non_finite(tensors, group):
        raise CheckpointError(
            f"{path} holds values that are not finite ({first_names(bad)}). Move that folder away, or give an earlier "
            "step: an earlier checkpoint may be whole"
        )


def read_tensors(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill the given tensors (a subset of the checkpoint's, by stored name) in place."""
    try:
        with _one_process_notice_hidden(), torch.no_grad():
            dcp.load(
                {name: value.detach() for name, value in tensors.items()},
                storage_reader=ShardReader(path),
                planner=DefaultLoadPlanner(flatten_state_dict=False),
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as error:
        raise _describe(error) from error


def _check_same(path: Path, index: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    stored = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in index.items()}
    wanted = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    faults = [f"{name} is missing" for name in sorted(wanted.keys() - stored.keys())]
    faults += [f"{name} is not in the model" for name in sorted(stored.keys() - wanted.keys())]
    both = sorted(wanted.keys() & stored.keys())
    faults += [f"{n}: stored {stored[n]}, needed {wanted[n]}" for n in both if stored[n] != wanted[n]]
    if faults:
        raise CheckpointError(f"{path} is not of this model or optimizer: {some(faults, NAMES_SHOWN, '; ')}")


def read_all(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, on the CPU, in one process."""
    index = read_index(Path(path))
    tensors = {name: torch.empty(entry["shape"], dtype=dtype_named(entry["dtype"])) for name, entry in index.items()}
    read_tensors(Path(path), tensors)
    return tensors
