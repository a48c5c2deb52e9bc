"""AdamW that clips gradients while it updates, on a GPU."""

from importlib.util import find_spec

import torch
from torch import Tensor

from training.ranks.distributed import local

if find_spec("triton"):  # every torch for CUDA brings it
    from kernels import adamw as kernel


class ClippingAdamW(torch.optim.AdamW):
    """torch's fused AdamW. A `factor`, FP32 [], multiplies the gradients of the next step inside its kernel, to the bit
    as if they had been scaled before; they themselves stay as they are."""

    def __init__(self, *arguments, **named) -> None:
        super().__init__(*arguments, **named)
        self.factor: Tensor | None = None
        self._tables: dict[int, tuple[list[tuple[int, ...]], kernel.Table]] = {}

    def can_clip(self) -> bool:
        """Whether the next step can take a factor: all on a GPU, FP32, contiguous."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        tensors = [local(t) for p in parameters for t in (p, p.grad)]
        fit = all(t.is_cuda and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        return bool(tensors) and fit and kernel.has_torchs_bits(tensors[0].device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        factor, self.factor = self.factor, None
        if factor is None:
            super().step()
            return
        skip = getattr(self, "found_inf", None)
        skip = torch.zeros((), device=factor.device) if skip is None else skip
        for number, group in enumerate(self.param_groups):
            weights, gradients, means, squares, _, steps = lists = tuple([] for _ in range(6))
            self._init_group(group, *lists)
            if weights:
                torch._foreach_add_(steps, 1)
                table = self._table(number, weights, gradients, means, squares, steps)
                beta1, beta2 = group["betas"]
                settings = kernel.Settings(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
                kernel.update(table, factor, skip, settings)
                torch._foreach_sub_(steps, [skip] * len(steps))

    def _table(self, number: int, weights: list[Tensor], *others: list[Tensor]) -> "kernel.Table":
        """Of the group `number`, made anew where a tensor has moved: under CUDA graphs never."""
        lists = [[local(tensor) for tensor in each] for each in (weights, *others)]
        pointers = [tuple(tensor.data_ptr() for tensor in row) for row in zip(*lists, strict=True)]
        held = self._tables.get(number)
        if held is None or held[0] != pointers:
            sizes = [weight.numel() for weight in lists[0]]
            held = self._tables[number] = pointers, kernel.Table.of(pointers, sizes, lists[0][0].device)
        return held[1]
