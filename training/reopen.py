"""A run taken up again to be looked at: its model under its recipe, its text and its random state, nothing to train.

Uncompiled, on one device; the weights are those of the initialization until a checkpoint is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.evalset import EvalSet
from data.loader import Loader
from data.mixture import open_tokens
from kernels import backend
from quant.phases import scored
from quant.plan import Plan
from training.config import TrainConfig
from training.probes import PROBES
from training.ranks.distributed import Dist
from training.start.build import build_model, check_recipes, mask_documents, open_texts, set_torch_flags
from training.start.cautions import memory_of
from training.start.derive import Numbers
from training.start.describe import Checked, check
from training.start.memory import BYTES_FP32, GIB, MemoryEstimate, estimate, kept_of


@dataclass(frozen=True)
class Reopened:
    """`evalset`: of the run's last evaluation. `rng`: int64 [3], its seed and step set, the micro-batch 0. `probes`:
    {name: checked options}."""

    model: nn.Module
    numbers: Numbers
    train: Loader
    evalset: EvalSet
    rng: Tensor
    probes: Mapping[str, Any]


def reopen(config: TrainConfig, run: Mapping[str, Any], step: int, ranks: Dist) -> Reopened:
    """The run as it computes after `step` steps: a phase of its recipe counts.

    config: the run's own; data.path, where it is given, is where its tokens lie now. run: its run.json. Raises
    ValueError for other text than the run's and for too little memory, RuntimeError for what the machine can't do.
    """
    set_torch_flags(config)
    backend.use(config.backend, ranks.device.type)
    tokens = open_tokens(config.data, config.data.path or run["data_path"])
    if tokens.fingerprint != run["data_fingerprint"]:
        raise ValueError(f"{tokens.path} is other text than {run['name']} was trained on; give its folder by --data")
    checked = check(config, ranks, tokens.vocab_size)
    plan = checked.plans[scored(checked.phases, step)]
    check_recipes(plan, recompute=False)
    check_room(config, checked, plan, ranks)
    rng = torch.zeros(3, dtype=torch.int64, device=ranks.device)
    rng[0] = config.seed if config.rounding_seed is None else config.rounding_seed
    rng[1] = step
    model, _ = build_model(checked.shape, plan, config.seed, rng)
    mask_documents(model, config, tokens)
    texts = open_texts(config, tokens)
    return Reopened(model, checked.numbers, texts.train, texts.final, rng, checked.probes)


def check_room(config: TrainConfig, checked: Checked, plan: Plan, ranks: Dist) -> None:
    """ValueError where the model, or what a probe does with it, needs more memory than there is. There
    are no moments."""

    def of(plan: Plan, tokens: int = checked.numbers.micro_tokens) -> MemoryEstimate:
        parts = estimate(checked.shape, tokens, kept_of(plan)).parts
        return MemoryEstimate(parts | {"weights, moments": weights})

    weights = BYTES_FP32 * checked.shape.parameters / GIB
    looking = (PROBES[name].memory(given, plan, of, False) for name, given in checked.probes.items())
    needed = max([weights, *(estimate.total for estimate in looking if estimate)])
    has = memory_of(ranks.device, ranks.local_world)
    if needed > has:
        raise ValueError(
            f"{config.model.name} needs {needed:.1f} GiB here, this device has {has:.1f}; take fewer tokens, slices or "
            "draws where they are asked for, or a larger device"
        )
