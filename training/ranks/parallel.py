"""Data parallelism over ranks: which mode, how gradients are summed, how weights are sharded and gathered.

    none   one process
    ddp    every rank holds everything; gradients are summed in buckets while the last backward still runs
    fsdp   FSDP2: weights, gradients and moments sharded over all ranks, weights gathered block by block
    hsdp   FSDP2 within a node, replicas across nodes

All modes produce the same gradient up to the order of FP32 summation: each rank sums its micro-batches in FP32, already
weighted by the tokens of the global batch, and the ranks' sums are added, never averaged. Communication waits for the
last micro-batch of a step. amax and tensor scales are taken after the gather, on whole weights
(docs/numerics.md#3-scope).
Gathered weights stay for the whole step, since its gradients are kept whole as well; where memory is worth more than
time (recompute=true) every forward and backward gathers anew. Both are the same bits.

torch's DistributedDataParallel isn't used: its reducer only works through its own forward, splits compiled graphs, and
renames parameters; what is left of it, buckets that are reduced when full, is `ReplicaSync`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from quant.linear import QuantLinear
from training.ranks.distributed import Dist

# Above it the 16 bytes a parameter of replicated FP32 state take more than a fifth of an 80 GB GPU.
FSDP_FROM_PARAMETERS = 1_000_000_000
# Large enough for NVLink's bandwidth, small enough that all but the last bucket hide behind the backward.
BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Parallel:
    """`accumulate(last)` surrounds forward and backward of one micro-batch; after the last one of a step the gradients
    are the sum over all ranks."""

    mode: str
    accumulate: Callable[[bool], AbstractContextManager]


def choose(parallel: str, ranks: Dist, parameters: int) -> str:
    """none, ddp, fsdp or hsdp. Raises ValueError when hsdp is asked for and all ranks are on one node."""
    if ranks.world == 1:
        return "none"
    nodes = ranks.world // ranks.local_world
    if parallel == "auto":
        if parameters < FSDP_FROM_PARAMETERS:
            return "ddp"
        return "hsdp" if nodes > 1 else "fsdp"
    if parallel == "hsdp" and nodes < 2:
        raise ValueError("parallel=hsdp needs at least 2 nodes, this is 1; use parallel=fsdp")
    return parallel


def parallelize(loss: nn.Module, mode: str, ranks: Dist, regather: bool = False) -> Parallel:
    """Wrap in place. `loss` is the LossModel around a model with `blocks`; its weights are on the device, and equal on
    all ranks. After quant.plan.convert and torch.compile of the blocks, before the optimizer is built. `regather`: of
    sharded weights only the blocks at work are held whole."""
    if mode == "none":
        return Parallel(mode, lambda last: nullcontext())
    if mode == "ddp":
        return Parallel(mode, ReplicaSync(loss, ranks).accumulate)
    shards = ranks.world if mode == "fsdp" else ranks.local_world
    shard(loss, ranks, shards, regather)
    return Parallel(mode, lambda last: _sharded_accumulation(loss, last, regather))


@dataclass
class Bucket:
    parameters: list[nn.Parameter] = field(default_factory=list)
    nbytes: int = 0
    missing: int = 0
    flat: Tensor | None = None
    work: Any = None


class ReplicaSync:
    """Sums gradients over ranks, bucket by bucket in reverse order of use, during the last backward of a step."""

    def __init__(self, module: nn.Module, ranks: Dist) -> None:
        self._buckets = [Bucket()]
        self._of: dict[nn.Parameter, Bucket] = {}
        self._launched = 0
        self._active = False
        for parameter in reversed([p for p in module.parameters() if p.requires_grad]):
            if self._buckets[-1].nbytes >= BUCKET_BYTES:
                self._buckets.append(Bucket())
            bucket = self._buckets[-1]
            bucket.parameters.append(parameter)
            bucket.nbytes += parameter.numel() * parameter.element_size()
            self._of[parameter] = bucket
            parameter.register_post_accumulate_grad_hook(self._ready)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self._active, self._launched = last, 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        yield
        if last:
            self._finish()

    def _ready(self, parameter: nn.Parameter) -> None:
        if not self._active:
            return
        self._of[parameter].missing -= 1
        # In order on every rank: collectives pair up by the order in which they are started.
        while self._launched < len(self._buckets) and self._buckets[self._launched].missing == 0:
            self._launch(self._buckets[self._launched])

    def _launch(self, bucket: Bucket) -> None:
        for parameter in bucket.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        bucket.flat = torch.cat([parameter.grad.reshape(-1) for parameter in bucket.parameters])
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)
        self._launched += 1

    def _finish(self) -> None:
        while self._launched < len(self._buckets):  # a parameter that took no part in the loss
            self._launch(self._buckets[self._launched])
        self._active = False
        for bucket in self._buckets:
            bucket.work.wait()
            gradients = [parameter.grad for parameter in bucket.parameters]
            parts = bucket.flat.split([gradient.numel() for gradient in gradients])
            views = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
            torch._foreach_copy_(gradients, views)
            bucket.flat = bucket.work = None


def shard(loss: nn.Module, ranks: Dist, shards: int, regather: bool) -> None:
    """fully_shard every block, then the rest (embedding, last norm, lm_head) as the root, which stays gathered."""
    kind = ranks.device.type
    if shards == ranks.world:
        mesh = init_device_mesh(kind, (ranks.world,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(kind, (ranks.world // shards, shards), mesh_dim_names=("replicate", "shard"))
    for block in loss.model.blocks:
        spans = exact_spans(block, shards)
        fully_shard(block, mesh=mesh, reshard_after_forward=regather)
        block.set_custom_all_gather(Bf16Gather(spans))
    fully_shard(loss, mesh=mesh, reshard_after_forward=False)
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def _sharded_accumulation(loss: nn.Module, last: bool, regather: bool) -> Iterator[None]:
    loss.set_requires_gradient_sync(last)
    loss.set_is_last_backward(last)
    loss.set_reshard_after_backward(last or regather)
    yield


def is_sharded(loss: nn.Module) -> bool:
    """Whether weights are gathered for a forward and its backward."""
    return any(isinstance(module, FSDPModule) for module in loss.modules())


def reshard(loss: nn.Module) -> None:
    """Drop weights that were gathered whole: the next forward gathers what the shards hold then."""
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def exact_spans(block: nn.Module, shards: int) -> list[tuple[int, int]]:
    """Where, in a rank's flat shard of the block, the parameters lie that are used in FP32: all but the linear layers'
    weights, so norm gains for the most part."""
    linears = {module.weight for module in block.modules() if isinstance(module, nn.Linear | QuantLinear)}
    spans, begin = [], 0
    for parameter in block.parameters():
        rows = math.ceil(parameter.shape[0] / shards)
        end = begin + rows * parameter.numel() // parameter.shape[0]
        if parameter not in linears:
            spans.append((begin, end))
        begin = end
    return spans


class Bf16Gather:
    """All-gather for fully_shard that sends linear weights in BF16 and gives FP32 tensors holding the BF16 values.

    Every linear layer rounds its weight to BF16 first (docs/numerics.md#2-dtypes), so this is exact, at half the
    traffic.
    FSDP2's own MixedPrecisionPolicy(param_dtype=bfloat16) is not: autograd would then round dW to the weight's BF16.
    Everything else (norm gains) travels in FP32.
    """

    def __init__(self, exact: list[tuple[int, int]]) -> None:
        self._exact = exact

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        world = group.size()
        rounded = input_tensor.to(torch.bfloat16)
        gathered = rounded.new_empty(world * rounded.numel())
        dist.all_gather_into_tensor(gathered, rounded, group=group)
        parts = [input_tensor[begin:end] for begin, end in self._exact]
        exact = torch.cat(parts) if parts else input_tensor[:0].clone()
        gathered_exact = exact.new_empty(world * exact.numel())
        if parts:
            dist.all_gather_into_tensor(gathered_exact, exact, group=group)
        output_tensor.copy_(gathered)  # input_tensor is a part of output_tensor: read before it is overwritten
        rows, exact_rows, column = output_tensor.view(world, -1), gathered_exact.view(world, -1), 0
        for begin, end in self._exact:
            rows[:, begin:end] = exact_rows[:, column : column + end - begin]
            column += end - begin
