"""From a typed configuration to a running trainer: what is checked, built and written, and in which order.

Nothing is written before everything that can be known in advance has been checked: the numbers divide, the recipe is
legal on every layer, the data exists, the folder is ours.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.evalset import EvalSet
from data.loader import Loader
from data.prepare import ensure
from data.tokens import TokenSet
from kernels import backend
from models.llama import Llama, LlamaConfig
from quant import library
from quant.plan import Plan, convert, plan_of, unquantized
from quant.stats import slot_stats
from training.checkpoint import Checkpointer, SaveReport, TrainState, load
from training.config import TrainConfig
from training.console import Console
from training.derive import Numbers, derive
from training.distributed import Dist, setup, teardown
from training.identity import default_name, hash_of, numerics
from training.loggers import Loggers, build_sinks
from training.loop import Parts, Trainer
from training.loss import LossModel
from training.manifest import latest_good, remove_temporary
from training.memory import estimate
from training.metrics import MetricsFile
from training.optim import build_optimizer
from training.parallel import choose, parallelize
from training.report import StartScreen
from training.runfolder import RunFolder, environment
from training.signals import RunLock, StopFlag


@dataclass(frozen=True)
class Request:
    """One run as asked for. `yaml`: the composed text; `choices`: {group: option}; `command`: how it was typed."""

    config: TrainConfig
    yaml: str
    choices: dict[str, str]
    command: str


@dataclass(frozen=True)
class Sketch:
    """Everything known about a run before memory is allocated. `tokens` is None in a dry run without prepared data."""

    shape: LlamaConfig
    plan: Plan
    recipe_label: str
    numbers: Numbers
    tokens: TokenSet | None
    run: dict[str, Any]


def launch(request: Request) -> int:
    """Run, resume or describe one training run. Returns the process's exit code.

    Raises ValueError for mistakes in the configuration, RuntimeError for what the machine can't do, OSError for files.
    """
    ranks = setup()
    try:
        if request.config.dry_run:
            sketch = describe(request, ranks, tokens=None)
            if ranks.is_main:
                print(screen(request, sketch, ranks))
            return 0
        return train(request, ranks)
    finally:
        teardown()


def describe(request: Request, ranks: Dist, tokens: TokenSet | None) -> Sketch:
    """Check and derive everything, on the meta device."""
    config = request.config
    vocab_size = tokens.vocab_size if tokens else expected_vocab_size(config)
    m = config.model
    shape = LlamaConfig(
        m.layers, m.width, m.heads, m.hidden, vocab_size, config.batch.seq_len, m.norm_eps, m.rope_theta, m.residual_dtype
    )
    with torch.device("meta"):
        model = Llama(shape)
    numbers = derive(config, shape.parameters_non_embedding, ranks.world)
    plan = plan_of(model, config.quant)
    plan.check_tokens(numbers.micro_tokens)
    label = library.label(plan.recipe)
    fingerprints = {"fingerprint": tokens.fingerprint if tokens else None}
    fingerprints |= {"tokenizer": tokens.tokenizer_hash if tokens else None, "packing": config.data.packing}
    flat = numerics(config, numbers, plan.numerics(), vocab_size, fingerprints)
    digest = hash_of(flat)
    run = {
        "name": config.run.name or default_name(m.name, plan.recipe.name, numbers.tokens, config.seed, digest),
        "hash": digest,
        "numerics": flat,
        "model": m.name,
        "parameters": shape.parameters,
        "parameters_non_embedding": shape.parameters_non_embedding,
        "recipe": plan.recipe.name,
        "recipe_label": label,
        "seed": config.seed,
        "tokens": numbers.tokens,
        "steps": numbers.steps,
        "tokens_per_step": numbers.tokens_per_step,
        "seq_len": numbers.seq_len,
        "vocab_size": vocab_size,
        "data_fingerprint": fingerprints["fingerprint"],
        "tokenizer_hash": fingerprints["tokenizer"],
        "experiment": request.choices.get("experiment"),
        "cell": None,
        "command": request.command,
    }
    return Sketch(shape, plan, label, numbers, tokens, run)


def expected_vocab_size(config: TrainConfig) -> int:
    """What the tokenizer will have, without preparing any text."""
    if config.data.path:
        return TokenSet(config.data.path).vocab_size
    if config.data.tokenizer:
        from data.tokenizer import TextTokenizer, tokenizer_file  # needs the tokenizers package; training doesn't

        return TextTokenizer(tokenizer_file(config.data.tokenizer), config.data.bos).vocab_size
    return config.data.vocab_size
