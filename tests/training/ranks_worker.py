"""One rank of the multi-process tests: `torchrun ranks_worker.py FOLDER MODE...` trains, saves and loads in each mode.

Rank 0 writes FOLDER/<mode>-<world>.json. World size 1, without torchrun, gives the results to compare with.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.llama import Llama, LlamaConfig
from training import distributed, parallel
from training.checkpoint import Checkpointer, TrainState, load, state_tensors
from training.manifest import latest_good
from training.optim import clip_gradients

# Odd sizes: 97 and 3 x 33 rows don't divide by 2 or 4, so that shards are uneven.
CONFIG = LlamaConfig(layers=2, width=66, heads=3, hidden=33, vocab_size=97, max_seq_len=32)
MICRO_BATCHES, SEQUENCES, STEPS = 4, 2, 4


class Bf16Linear(nn.Linear):
    """What quant's BF16 baseline computes: operands rounded to BF16, FP32 accumulation, dW in FP32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16().float(), self.weight.bfloat16().float())


class TinyLoss(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits = F.linear(self.model.hidden(tokens[:, :-1]), self.model.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def build(mode: str, ranks: distributed.Dist) -> tuple[TinyLoss, parallel.Parallel, TrainState]:
    model = Llama(CONFIG, torch.float32)
    model.init_weights(0)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Bf16Linear
    loss = TinyLoss(model)
    wrapped = parallel.parallelize(loss, parallel.choose(mode, ranks, 0), ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return loss, wrapped, TrainState(model, [optimizer])


def micro_batch(step: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randint(0, CONFIG.vocab_size, (SEQUENCES, CONFIG.max_seq_len + 1), generator=generator)


def train(loss: TinyLoss, wrapped: parallel.Parallel, state: TrainState, ranks: distributed.Dist, steps: int) -> list:
    """[loss, gradient norm] of each step."""
    share = MICRO_BATCHES // ranks.world
    tokens = MICRO_BATCHES * SEQUENCES * CONFIG.max_seq_len
    rows = []
    for _ in range(steps):
        nats = torch.zeros((), dtype=torch.float64)
        for i in range(share):
            with wrapped.accumulate(i == share - 1):
                value = loss(micro_batch(state.step, ranks.rank * share + i))
                (value / tokens).backward()
            nats += value.detach()
        norm = clip_gradients(state.model, 1.0)
        state.optimizers[0].step()
        state.optimizers[0].zero_grad()
        state.step += 1
        rows.append([ranks.sum(nats).item() / tokens, norm.item()])
    return rows


def whole(state: TrainState) -> dict[str, Tensor]:
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
        for name, tensor in state_tensors(state).items()
    }


def straight_and_saved(folder: Path, mode: str, ranks: distributed.Dist) -> dict:
    """Train half, save, train on; load the half into a new state and train on: both second halves must agree."""
    loss, wrapped, state = build(mode, ranks)
    rows = train(loss, wrapped, state, ranks, STEPS // 2)
    run = folder / f"run-{mode}-{ranks.world}"
    saver = Checkpointer(run, group=ranks.group)
    saver.save(state)
    rows += train(loss, wrapped, state, ranks, STEPS // 2)
    saver.wait()
    again, wrapped_again, resumed = build(mode, ranks)
    load(ranks.on_main(lambda: latest_good(run)), resumed, ranks.group)
    resumed_rows = train(again, wrapped_again, resumed, ranks, STEPS // 2)
    same = all(a.equal(b) for a, b in zip(whole(state).values(), whole(resumed).values(), strict=True))
    return {"rows": rows, "resumed": resumed_rows, "same_state": bool(same)}


def resumed_from(source: Path, mode: str, ranks: distributed.Dist) -> dict:
    """Second half from another world's checkpoint."""
    loss, wrapped, state = build(mode, ranks)
    load(source, state, ranks.group)
    return {"step": state.step, "rows": train(loss, wrapped, state, ranks, STEPS // 2)}


def main() -> None:
    folder, modes = Path(sys.argv[1]), sys.argv[2:]
    ranks = distributed.setup("cpu")
    if "hsdp" in modes:
        ranks = replace(ranks, local_world=ranks.world // 2)  # as if on two nodes
    for mode in modes:
        results = {"straight": straight_and_saved(folder, mode, ranks)}
        for source in sorted(folder.glob("run-*/checkpoints/step_*")):
            if source.parents[1].name != f"run-{mode}-{ranks.world}":
                results[source.parents[1].name] = resumed_from(source, mode, ranks)
        if ranks.is_main:
            (folder / f"{mode}-{ranks.world}.json").write_text(json.dumps(results))
        ranks.barrier()
    distributed.teardown()


if __name__ == "__main__":
    main()
