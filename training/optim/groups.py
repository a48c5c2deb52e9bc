"""AdamW with the published runs' groups, or Muon beside it, and gradient clipping that never waits for the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.config import OptimSection
from training.optim.adamw import ClippingAdamW
from training.optim.muon import Muon, PlainMuon
from training.optim.schedule import Schedule
from training.start.derive import MUON_IS_FOR

# The model that its rates and weight decay were tuned on.
REFERENCE_WIDTH, REFERENCE_LAYERS = 768, 12


def build_optimizer(model: nn.Module, config: OptimSection, lr: float) -> ClippingAdamW:
    """AdamW over the FP32 master weights."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in named if model.decays(n)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not model.decays(n)], "weight_decay": 0.0},
    ]
    return adamw([group for group in groups if group["params"]], config, lr)


def adamw(groups: list[dict[str, Any]], config: OptimSection, lr: float) -> ClippingAdamW:
    """One fused kernel per group where there is one for the device."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    beta1, beta2 = config.betas
    fused = devices <= {"cuda", "cpu"}
    return ClippingAdamW(groups, lr=lr, betas=(beta1, beta2), eps=config.eps, weight_decay=0.0, fused=fused)


def build_optimizers(model: nn.Module, config: OptimSection, lr: float) -> list[torch.optim.Optimizer]:
    """[AdamW] or [AdamW, Muon]; `lr` is the peak. A group's `lr_scale` multiplies the schedule's rate."""
    build = {"adamw": lambda *given: [build_optimizer(*given)], "muon": build_muon, "muon_rms": build_plain_muon}
    return build[config.name](model, config, lr)


def build_muon(model: nn.Module, config: OptimSection, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW without decay for the rest, with nanochat's rates.

    Rates of embedding and head fall as width^-1/2 from 768, Muon's weight decay as (12 / layers)^2.
    """
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2]
    by_width = (model.config.width / REFERENCE_WIDTH) ** -0.5
    rates = {"embed.weight": config.embed_lr * by_width, "lm_head.weight": config.head_lr * by_width}
    rates |= {name: config.scalar_lr * share for name, share in model.scalar_rates.items()}
    others = {name for name, p in named.items() if not any(p is matrix for matrix in matrices)}
    if others != set(rates):
        raise ValueError(MUON_IS_FOR)  # a parameter without a rate would stay as it is, without a word
    groups = [{"params": [named[name]], "lr_scale": rate / lr} for name, rate in rates.items()]
    return [
        adamw(groups, config, lr),
        Muon(matrices, lr, config.weight_decay * (REFERENCE_LAYERS / model.config.layers) ** 2),
    ]


def build_plain_muon(model: nn.Module, config: OptimSection, lr: float) -> list[torch.optim.Optimizer]:
    """Muon at AdamW's rate and decay for the matrices of the blocks, AdamW without decay for the rest."""
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2}
    rows = {p: held for name, p in matrices.items() if (held := model.stacked_rows(name))}
    rest = {"params": [p for name, p in named.items() if name not in matrices], "weight_decay": 0.0}
    return [adamw([rest], config, lr), PlainMuon(list(matrices.values()), lr, config.weight_decay, rows)]


def set_rates(optimizers: list[torch.optim.Optimizer], schedule: Schedule, step: int) -> None:
    """Everything that follows a schedule, before step number `step` (from 0)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(step) * group.get("lr_scale", 1.0)
        if isinstance(optimizer, Muon):
            optimizer.set_progress(step, schedule.steps)


@torch.no_grad()
def clip_gradients(
    model: nn.Module, max_norm: float | None, optimizers: Sequence[torch.optim.Optimizer] = ()
) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most `max_norm`; returns the norm before, FP32 [].

    Those of `optimizers` that can do so scale theirs in their next step, to the same bits: no pass over the gradients.
    No device synchronization. A sharded model (DTensor gradients) gives the norm over all shards.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    if max_norm is None:
        return norm
    later = set()
    for optimizer in optimizers:
        if isinstance(optimizer, ClippingAdamW) and optimizer.can_clip():
            optimizer.factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch's clip_grads_with_norm_
            later |= {parameter for group in optimizer.param_groups for parameter in group["params"]}
    torch.nn.utils.clip_grads_with_norm_([p for p in parameters if p not in later], max_norm, norm)
    return norm


def create_state(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let every optimizer that has no state yet allocate it, by one step with zero gradients that is skipped: fused
    AdamW and Muon (`build_optimizers`) can, and leave weights and counters as they are."""
    for optimizer in optimizers:
        if optimizer.state:
            continue
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        held = getattr(optimizer, "found_inf", None)
        optimizer.found_inf = torch.ones((), device=parameters[0].device)
        optimizer.step()
        optimizer.found_inf = held
        optimizer.zero_grad(set_to_none=True)
