"""One rank of test_muon.py: `torchrun muon_worker.py FILE` takes three steps on weights sharded over the ranks, alone
on whole ones; rank 0 writes weights and moments, whole, to FILE (safetensors)."""

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from training.optim.muon import Muon
from training.ranks import distributed

SHAPES = [(12, 8), (8, 12), (12, 8), (5, 4), (1, 6)]  # 5 rows and 1 row don't divide by two


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().contiguous()


def main() -> None:
    ranks = distributed.setup("cpu")
    mesh = init_device_mesh("cpu", (ranks.world,)) if ranks.world > 1 else None
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, int]) -> Tensor:
        tensor = torch.randn(shape, generator=generator)
        return distribute_tensor(tensor, mesh, [Shard(0)]) if mesh else tensor

    params = [nn.Parameter(draw(shape)) for shape in SHAPES]
    optimizer = Muon(params, lr=0.02, weight_decay=0.1)
    for step in range(3):
        optimizer.set_progress(step, 10)
        for parameter, shape in zip(params, SHAPES, strict=True):
            parameter.grad = draw(shape)
        optimizer.step()
    found = {f"weight {i}": whole(p) for i, p in enumerate(params)}
    found |= {f"{key} {i}": whole(value) for i, p in enumerate(params) for key, value in optimizer.state[p].items()}
    if ranks.is_main:
        save_file(found, sys.argv[1])
    distributed.teardown()
    distributed.leave(0)


if __name__ == "__main__":
    main()
