"""The ranks of the multi-process tests: `ranks_worker.py FOLDER` trains, saves and loads on 1, 2 and 4 ranks.

Ranks are forked, as torchrun would start them, from this process, which has imported everything. Rank 0 writes
FOLDER/<mode>-<world>.json. World size 1 gives the results to compare with. A mode is a parallel mode, or with a recipe
mode:recipe; fsdp+regather holds no block's weights between forward and backward.
"""

import hashlib
import json
import os
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import backend
from launcher.compose import compose
from models.llama import Llama, LlamaConfig
from quant.plan import convert, plan_of
from tests.faults.forked import become, free_port
from training import hooks
from training.checkpoint.manifest import latest_good
from training.checkpoint.state import Checkpointer, TrainState, load, state_tensors
from training.hooks.base import Run
from training.optim.groups import clip_gradients
from training.ranks import distributed, parallel

# Odd sizes: 97 and 3 x 33 rows don't divide by 2 or 4, so that shards are uneven.
ODD = LlamaConfig(layers=2, width=66, heads=3, hidden=33, vocab_size=97, max_seq_len=32)
# Rotations take multiples of 128 along every contraction, the tokens of a micro-batch (2 x 64) included.
EVEN = LlamaConfig(layers=1, width=128, heads=2, hidden=128, vocab_size=97, max_seq_len=64)
MICRO_BATCHES, SEQUENCES, STEPS = 4, 2, 4
STARTS = [
    (1, ["auto", "auto:quartet2"]),
    (2, ["ddp", "fsdp", "fsdp+regather", "ddp:quartet2", "fsdp:quartet2"]),
    (4, ["fsdp", "hsdp"]),
    (1, ["fsdp"]),  # again alone, now from every checkpoint of the others
]


class Bf16Linear(nn.Linear):
    """What quant's BF16 baseline computes: operands rounded to BF16, FP32 accumulation, dW in FP32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16().float(), self.weight.bfloat16().float())


class TinyLoss(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits = F.linear(self.model.hidden(tokens[:, :-1]).float(), self.model.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


@dataclass
class Job:
    """What one rank trains: odd shapes with plain linears, or a recipe's own layers."""

    loss: TinyLoss
    wrapped: parallel.Parallel
    state: TrainState
    config: LlamaConfig
    rng: Tensor


def build(case: str, ranks: distributed.Dist) -> Job:
    way, _, recipe = case.partition(":")
    mode, _, regather = way.partition("+")
    config = EVEN if recipe else ODD
    model = Llama(config, torch.bfloat16 if recipe else torch.float32)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1.003)  # a gain that BF16 can't hold: a gather that rounded it would show
    rng = torch.zeros(3, dtype=torch.int64)
    plan = plan_of(model, compose([f"quant={recipe or 'bf16'}"]).config.quant)
    if recipe:
        backend.use("reference", "cpu")
        convert(model, plan, rng)
    else:
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = Bf16Linear
    loss = TinyLoss(model)
    wrapped = parallel.parallelize(loss, parallel.choose(mode, ranks, 0), ranks, bool(regather))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    around = hooks.build(hooks.read(model, plan, {"ema": {}}), Run(loss, [optimizer], STEPS))
    around["ema"].begin(0)
    return Job(loss, wrapped, TrainState(model, [optimizer], around), config, rng)


def micro_batch(config: LlamaConfig, step: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randint(0, config.vocab_size, (SEQUENCES, config.max_seq_len + 1), generator=generator)


def forward_backward(job: Job, index: int, tokens: int, last: bool) -> Tensor:
    job.rng.copy_(torch.tensor([0, job.state.step, index]))
    with job.wrapped.accumulate(last):
        nats = job.loss(micro_batch(job.config, job.state.step, index))
        (nats / tokens).backward()
    return nats.detach()


def train(job: Job, ranks: distributed.Dist, steps: int) -> list:
    """[loss, gradient norm] of each step."""
    share, state = MICRO_BATCHES // ranks.world, job.state
    tokens = MICRO_BATCHES * SEQUENCES * job.config.max_seq_len
    rows = []
    for _ in range(steps):
        nats = torch.zeros((), dtype=torch.float64)
        for i in range(share):
            nats += forward_backward(job, ranks.rank * share + i, tokens, last=i == share - 1)
        norm = clip_gradients(state.model, 1.0)
        state.optimizers[0].step()
        state.hooks["ema"].after_step(state.step, torch.zeros(()))
        state.optimizers[0].zero_grad()
        state.step += 1
        rows.append([ranks.sum(nats).item() / tokens, norm.item()])
    return rows


def whole(state: TrainState) -> dict[str, Tensor]:
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
        for name, tensor in state_tensors(state).items()
    }


def average(state: TrainState) -> str:
    """A hash of the moving average's bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(whole(state).items()):
        if name.startswith("hooks."):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def scores(job: Job) -> list[float]:
    """Nats of one micro-batch under the weights, under their average, and under the weights again."""
    tokens = micro_batch(job.config, 0, 0)
    own = job.loss(tokens).item()
    with job.state.hooks["ema"].weights(job.state.step):
        averaged = job.loss(tokens).item()
    return [own, averaged, job.loss(tokens).item()]


def straight_and_saved(folder: Path, case: str, ranks: distributed.Dist) -> dict:
    """Train half, save, train on; load the half into a new state and train on: both second halves must agree. One of
    them is then stopped between two micro-batches, as a preempted job is: nothing of that may be in its state."""
    job = build(case, ranks)
    rows = train(job, ranks, STEPS // 2)
    run = folder / f"run-{case}-{ranks.world}"
    saver = Checkpointer(run, group=ranks.group)
    saver.save(job.state)
    saved = average(job.state)
    rows += train(job, ranks, STEPS // 2)
    saver.wait()
    again = build(case, ranks)
    load(ranks.on_main(lambda: latest_good(run)), again.state, ranks.group)
    resumed_rows = train(again, ranks, STEPS // 2)
    forward_backward(job, 0, tokens=1, last=False)
    job.state.optimizers[0].zero_grad()
    same = whole(job.state).keys() == whole(again.state).keys() and all(
        a.equal(b) for a, b in zip(whole(job.state).values(), whole(again.state).values(), strict=True)
    )
    told = {"average": saved, "scores": scores(job)}
    return {"rows": rows, "resumed": resumed_rows, "same_state": bool(same), **told}


def resumed_from(source: Path, case: str, ranks: distributed.Dist) -> dict:
    """Second half from another world's checkpoint."""
    job = build(case, ranks)
    load(source, job.state, ranks.group)
    loaded = average(job.state)
    return {"step": job.state.step, "rows": train(job, ranks, STEPS // 2), "average": loaded}


def rank(folder: Path, cases: list[str]) -> None:
    ranks = distributed.setup("cpu")
    if "hsdp" in cases:
        ranks = replace(ranks, local_world=ranks.world // 2)  # as if on two nodes
    for case in cases:
        recipe = case.partition(":")[2]
        results = {"straight": straight_and_saved(folder, case, ranks)}
        for source in sorted(folder.glob("run-*/checkpoints/step_*")):
            name = source.parents[1].name
            if name != f"run-{case}-{ranks.world}" and name.rpartition("-")[0].partition(":")[2] == recipe:
                results[name] = resumed_from(source, case, ranks)
        if ranks.is_main:
            (folder / f"{case}-{ranks.world}.json").write_text(json.dumps(results))
        ranks.gather(None)
    distributed.teardown()


def forked(folder: Path, cases: list[str], number: int, world: int, port: int) -> int:
    """The process of one rank; exit code 1 after a traceback."""
    if process := os.fork():
        return process
    code = 1
    try:
        become(number, world, port)
        rank(folder, cases)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> int:
    folder = Path(sys.argv[1])
    for world, cases in STARTS:
        port = free_port()
        processes = [forked(folder, cases, number, world, port) for number in range(world)]
        if any([os.waitpid(process, 0)[1] for process in processes]):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
