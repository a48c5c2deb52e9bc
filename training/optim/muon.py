"""Muon as the published nanochat runs used it: orthogonalized momentum for the matrices of the blocks.

    m   <- lerp(m, g, 1 - momentum);  u = lerp(g, m, momentum)                          (Nesterov)
    u   <- polar(u): five Polar Express steps, X <- a X + (b X X^T + c (X X^T)^2) X     (nearest orthogonal matrix)
    u   <- u / rms of each row (or column) over time, norm of the whole kept            (variance reduction)
    w   <- w - lr s (u + decay w [u w >= 0]),  s = sqrt(max(1, rows / columns))         (cautious decay)

torch.optim.Muon has the momentum and Newton-Schulz with one set of coefficients for all steps; it lacks the Polar
Express coefficients, the variance reduction, the cautious decay and the on-device skip of a non-finite step.
Of the matrices of one shape each rank orthogonalizes its share, and gathers those of the others. Under FSDP the
momentum is sharded like its weight: u is gathered before, and each rank takes its own rows of the result. The numbers
are those of one process (on a GPU, as far as a library multiplies fewer matrices by the same kernel).
Sources: docs/published.md#5-nanochat-protocol; arXiv 2505.16932 (coefficients); arXiv 2510.05491 (variance reduction).
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from training.ranks.distributed import local

# Five steps for singular values in [1e-3, 1] (arXiv 2505.16932). The input is divided by 1.02 times its norm, the
# paper's safety factor, so that rounding in BF16 can't push a singular value over 1.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.02
MOMENTUM = (0.85, 0.95)  # from the first step to step MOMENTUM_STEPS
MOMENTUM_STEPS = 300
VARIANCE_BETA = 0.95
ADAMW_RMS = 0.2  # of an update, over the rate (arXiv 2502.16982)


def rounded(matrices: Tensor) -> Tensor:
    """As they are multiplied: BF16 on a GPU, FP32 on a CPU."""
    return matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)


def polar(matrices: Tensor) -> Tensor:
    """The orthogonal polar factor of each `rounded` matrix [L, m, n], approximately, in its dtype."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) * SAFETY + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if is_tall else x @ x.mT  # the smaller one
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, *((x, factor) if is_tall else (factor, x)), beta=a)
    return x


def shared_polar(matrices: Tensor) -> Tensor:
    """FP32 `polar` of `rounded` matrices [L, m, n] that every rank has: each rank makes its share of them."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return polar(matrices).float()
    share = math.ceil(len(matrices) / world)
    own = matrices[dist.get_rank() * share :][:share]
    part = matrices.new_zeros(share, *matrices.shape[1:])
    if len(own):
        part[: len(own)] = polar(own)
    whole = part.new_empty(world * share, *part.shape[1:])
    dist.all_gather_into_tensor(whole, part)
    return whole[: len(matrices)].float()


class Muon(torch.optim.Optimizer):
    """`params`: 2-D, whole or sharded, FP32. Hyper-parameters of the moment come from `set_progress`."""

    # The non-finite guard raises this flag on the device; then nothing is updated (training/nonfinite.py).
    _step_supports_amp_scaling = True

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float):
        wrong = [tuple(p.shape) for p in params if p.ndim != 2]
        if wrong:
            raise ValueError(f"Muon needs matrices, got shape {wrong[0]}; use optim=adamw")
        shapes = sorted({tuple(p.shape) for p in params})
        groups = [{"params": [p for p in params if tuple(p.shape) == shape]} for shape in shapes]  # one batch a shape
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM[0]})
        self._weight_decay = weight_decay

    def set_progress(self, step: int, steps: int) -> None:
        """Before step `step` of `steps`: momentum warms up, weight decay falls linearly to zero."""
        share = min(step / MOMENTUM_STEPS, 1.0)
        for group in self.param_groups:
            group["momentum"] = MOMENTUM[0] + share * (MOMENTUM[1] - MOMENTUM[0])
            group["weight_decay"] = self._weight_decay * (1 - step / steps)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient; nothing changes while `found_inf` is raised."""
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group, skip)

    def _update(self, params: list[Tensor], group: dict, skip: Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                rows, columns = p.shape
                self.state[p]["momentum"] = torch.zeros_like(p)
                shape = (rows, 1) if rows >= columns else (1, columns)
                self.state[p]["variance"] = torch.zeros(shape, device=p.device)  # whole, on every rank
        old = [torch.stack([local(self.state[p][key]) for p in params]) for key in ("momentum", "variance")]
        weights, gradients = (torch.stack([local(t) for t in ts]) for ts in (params, [p.grad for p in params]))
        momentum = torch.lerp(old[0], gradients, 1 - group["momentum"])
        nesterov = gathered(rounded(torch.lerp(gradients, momentum, group["momentum"])), params[0])
        whole, variance = reduce_variance(shared_polar(nesterov), old[1])
        update = own_rows(whole, params[0])
        rows, columns = params[0].shape
        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        decay = group["weight_decay"] * weights * (update * weights >= 0)
        new = (weights - lr * (update + decay), momentum, variance)
        if skip is not None:
            kept = skip > 0
            new = tuple(torch.where(kept, before, after) for before, after in zip((weights, *old), new, strict=True))
        for i, p in enumerate(params):
            local(p).copy_(new[0][i])
            local(self.state[p]["momentum"]).copy_(new[1][i])
            self.state[p]["variance"].copy_(new[2][i])


class PlainMuon(Muon):
    """Muon at AdamW's rate and decay (arXiv 2502.16982), without variance reduction and cautious decay:

        w <- w - lr (0.2 sqrt(max(m, n)) polar(u) + decay w)

    so that an update has about the rms that AdamW's have. `rows`: of weights that hold several matrices one below the
    other, such as q, k and v, the rows of each; every matrix is orthogonalized by itself.
    """

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, rows: dict[Tensor, tuple[int, ...]]):
        alike: dict[tuple, list[Tensor]] = {}
        for p in params:
            alike.setdefault((tuple(p.shape), rows.get(p, (p.shape[0],))), []).append(p)
        groups = [{"params": alike[key], "rows": key[1]} for key in sorted(alike)]
        super(Muon, self).__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    def set_progress(self, step: int, steps: int) -> None:
        """Momentum and decay stay what they are."""

    def _update(self, params: list[Tensor], group: dict, skip: Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        moments = [self.state[p]["momentum"] for p in params]
        old, weights, gradients = (
            torch.stack([local(t) for t in ts]) for ts in (moments, params, [p.grad for p in params])
        )
        momentum = torch.lerp(old, gradients, 1 - MOMENTUM[1])
        nesterov = gathered(rounded(torch.lerp(gradients, momentum, MOMENTUM[1])), params[0])
        matrices = nesterov.split(group["rows"], dim=1)
        whole = torch.cat([ADAMW_RMS * max(m.shape[1:]) ** 0.5 * shared_polar(m) for m in matrices], dim=1)
        update = own_rows(whole, params[0]) + group["weight_decay"] * weights
        new = (weights - group["lr"] * update, momentum)
        if skip is not None:
            new = tuple(torch.where(skip > 0, before, after) for before, after in zip((weights, old), new, strict=True))
        for p, moment, weight, after in zip(params, moments, *new, strict=True):
            local(p).copy_(weight)
            local(moment).copy_(after)


def gathered(parts: Tensor, like: Tensor) -> Tensor:
    """The whole matrices [L, m, n] of which every rank gives `parts`, each sharded as `like` is."""
    if not isinstance(like, DTensor):
        return parts
    rows, columns = like.shape
    whole = {"shape": torch.Size((len(parts), rows, columns)), "stride": (rows * columns, columns, 1)}
    return DTensor.from_local(parts, like.device_mesh, stacked(like), run_check=False, **whole).full_tensor()


def own_rows(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of matrices [L, m, n] that every rank has, each sharded as `like` is. No communication."""
    if not isinstance(like, DTensor):
        return whole
    everywhere = [Replicate()] * like.device_mesh.ndim
    tensor = DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
    return tensor.redistribute(placements=stacked(like)).to_local()


def stacked(like: DTensor) -> list[Placement]:
    """The placements of a stack of matrices placed as `like` is: sharded one dimension further on."""
    return [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in like.placements]


def reduce_variance(update: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row (or column) by its running rms; keep each matrix's norm. Returns the update and new variance.

    update [L, m, n]; variance [L, m, 1] or [L, 1, n], the running mean square along the dimension of size 1.
    """
    along = -1 if variance.shape[-1] == 1 else -2
    count = update.shape[along]
    square = update.square().mean(dim=along, keepdim=True)
    variance = torch.lerp(variance, square, 1 - VARIANCE_BETA)
    scale = variance.clamp_min(1e-10).rsqrt()
    norm = (square.sum(dim=(-2, -1), keepdim=True) * count).sqrt()
    scaled_norm = ((square * count) * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return update * scale * (norm / scaled_norm.clamp_min(1e-10)), variance
