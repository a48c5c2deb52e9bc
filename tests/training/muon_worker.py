"""One rank of test_muon.py: `torchrun muon_worker.py FILE` takes three steps on whole weights, several ranks also on
weights sharded over them; the last rank writes weights and moments, whole, and how many matrices it orthogonalized
to FILE (safetensors)."""

import sys

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from training.optim import muon
from training.optim.muon import polar
from training.ranks import distributed

SHAPES = [(12, 8), (8, 12), (12, 8), (12, 8), (5, 4), (1, 6)]  # 5 rows and 1 row don't divide by two


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().contiguous()


def three_steps(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    generator, made = torch.Generator().manual_seed(0), []

    def draw(shape: tuple[int, int]) -> Tensor:
        tensor = torch.randn(shape, generator=generator)
        return distribute_tensor(tensor, mesh, [Shard(0)]) if mesh else tensor

    def counted(matrices: Tensor) -> Tensor:
        made.append(len(matrices))
        return polar(matrices)

    muon.polar = counted
    params = [nn.Parameter(draw(shape)) for shape in SHAPES]
    optimizer = muon.Muon(params, lr=0.02, weight_decay=0.1)
    for step in range(3):
        optimizer.set_progress(step, 10)
        for parameter, shape in zip(params, SHAPES, strict=True):
            parameter.grad = draw(shape)
        optimizer.step()
    found = {f"weight {i}": whole(p) for i, p in enumerate(params)}
    found |= {f"{key} {i}": whole(value) for i, p in enumerate(params) for key, value in optimizer.state[p].items()}
    return found | {"made": torch.tensor(made)}


def main() -> None:
    ranks = distributed.setup("cpu")
    found = {f"whole {name}": value for name, value in three_steps(None).items()}
    if ranks.world > 1:
        sharded = three_steps(init_device_mesh("cpu", (ranks.world,)))
        found |= {f"sharded {name}": value for name, value in sharded.items()}
    if ranks.rank == ranks.world - 1:
        save_file(found, sys.argv[1])
    distributed.teardown()
    distributed.leave(0)


if __name__ == "__main__":
    main()
