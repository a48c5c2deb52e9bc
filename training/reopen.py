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
from training.config import TrainConfig
from training.ranks.distributed import Dist
from training.start.build import build_model, check_recipes, mask_documents, open_texts, set_torch_flags
from training.start.derive import Numbers
from training.start.describe import check


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
    ValueError for other text than the run's, RuntimeError for what the machine can't do.
    """
    set_torch_flags(config)
    backend.use(config.backend, ranks.device.type)
    tokens = open_tokens(config.data, config.data.path or run["data_path"])
    if tokens.fingerprint != run["data_fingerprint"]:
        raise ValueError(f"{tokens.path} is other text than {run['name']} was trained on; give its folder by --data")
    checked = check(config, ranks, tokens.vocab_size)
    plan = checked.plans[scored(checked.phases, step)]
    check_recipes(plan, recompute=False)
    rng = torch.zeros(3, dtype=torch.int64, device=ranks.device)
    rng[0] = config.seed if config.rounding_seed is None else config.rounding_seed
    rng[1] = step
    model, _ = build_model(checked.shape, plan, config.seed, rng)
    mask_documents(model, config, tokens)
    texts = open_texts(config, tokens)
    return Reopened(model, checked.numbers, texts.train, texts.final, rng, checked.probes)
