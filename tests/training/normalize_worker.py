"""One rank of test_normalize.py: `torchrun normalize_worker.py FOLDER MODE...` trains a small nGPT in each mode.

Rank 0 writes FOLDER/<mode>.pt, what `train` returns. Odd sizes: 3 x 66, 66, 33 and 97 rows don't divide by 4.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ngpt import Ngpt, NgptConfig
from training.hooks.base import Run
from training.hooks.normalize import Normalize
from training.ranks import distributed, parallel
from training.ranks.distributed import local

SHAPE = NgptConfig(layers=2, width=66, heads=3, hidden=33, vocab_size=97, max_seq_len=16)
SEQUENCES, STEPS = 4, 3


class Bf16Linear(nn.Linear):
    """Rounds its weight to BF16 as every recipe's layer does, which is what FSDP gathers."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.bfloat16().float())


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Ngpt(SHAPE, compute_dtype=torch.float32)
        self.model.init_weights(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.01)  # as if perturbed: the hook's beginning has to mend it
        for module in self.model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = Bf16Linear

    def forward(self, tokens: Tensor) -> Tensor:
        logits = F.linear(self.model.hidden(tokens[:, :-1]), self.model.head_weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(mode: str, ranks: distributed.Dist) -> dict:
    """{losses, weights: as they are whole, skipped: whether the hook changed no weight where it had to keep them}."""
    loss = Loss()
    wrapped = parallel.parallelize(loss, mode, ranks)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)  # Adam makes steps of roundings
    options = Normalize.Options(**loss.model.hooks["normalize"])
    hook = Normalize(options, Run(loss, [optimizer], STEPS))
    hook.begin(0)
    losses, share = [], SEQUENCES // ranks.world
    for step in range(STEPS):
        tokens = torch.randint(0, 97, (SEQUENCES, 17), generator=torch.Generator().manual_seed(step))
        with wrapped.accumulate(True):
            nats = loss(tokens[ranks.rank * share : (ranks.rank + 1) * share])
            (nats / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        hook.after_step(step, torch.zeros(()))
        losses.append(ranks.sum(nats.detach()).item())
    weights = {name: whole(parameter) for name, parameter in loss.model.named_parameters()}
    mine = [local(parameter.detach()) for parameter in loss.model.parameters()]
    for tensor in mine:
        tensor.mul_(1.1)
    before = [tensor.clone() for tensor in mine]
    hook.after_step(STEPS, torch.ones(()))
    return {"losses": losses, "weights": weights, "skipped": all(map(torch.equal, before, mine))}


def main() -> None:
    folder, modes = Path(sys.argv[1]), sys.argv[2:]
    ranks = distributed.setup("cpu")
    for mode in modes:
        found = train(mode, replace(ranks, local_world=ranks.world // 2) if mode == "hsdp" else ranks)
        if ranks.is_main:
            torch.save(found, folder / f"{mode}.pt")
        ranks.gather(None)
    distributed.teardown()
    distributed.leave(0)


if __name__ == "__main__":
    main()
