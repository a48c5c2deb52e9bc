"""AdamW with the published runs' groups, and gradient clipping that never waits for the device."""

import torch
from torch import Tensor, nn

from training.config import OptimSection


def decays(name: str) -> bool:
    """Weight decay applies to the linear weights of the blocks: not to the embedding, lm_head and norms."""
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def build_optimizer(model: nn.Module, config: OptimSection, lr: float) -> torch.optim.AdamW:
    """AdamW over the FP32 master weights; one fused kernel per group where torch has one for the device."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(n)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n)], "weight_decay": 0.0},
    ]
    devices = {parameter.device.type for _, parameter in named}
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=devices <= {"cuda", "cpu"},
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most `max_norm`; returns the norm before, FP32 [].

    No device synchronization. A sharded model (DTensor gradients) gives the norm over all shards.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm
