"""Who a run is: a hash over everything that changes its numbers, and its default name."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from base.tree import flatten
from models import FIRST
from quant import library
from quant.plan import HEAD, Plan
from training.config import FOLDER_NAME, MUON_ONLY, TrainConfig
from training.start.derive import Numbers

LATER_SIZES = {"kv_heads": None, "tied": False, "rope_llama3": []}
SHOWN = 12  # differing keys that an error lists


class IdentityError(ValueError):
    """The folder belongs to a run with other numerics."""


def numerics(
    config: TrainConfig,
    numbers: Numbers,
    plan: dict[str, Any],
    vocab_size: int,
    data: dict[str, str],
    hooks: Mapping[str, Any] | None = None,
    init: str | None = None,
) -> dict[str, Any]:
    """The flat dict that is hashed. `plan`: what each layer does; `data`: fingerprints of token set and tokenizer;
    `hooks`: as training.hooks.numerics gives them; `init`: fingerprint of the checkpoint begun with.

    Left out on purpose: world size, parallel mode, back end, compile, logging, evaluation and checkpoint intervals,
    paths. They may change the last bits of a sum, never what is computed.
    """
    defaults = ("name", "lr", "batch_tokens", "micro_tokens")  # what follows from them is below
    model = {key: value for key, value in asdict(config.model).items() if key not in defaults}
    # The rate is the schedule's, what is trained a hook's.
    optim = {k: v for k, v in asdict(config.optim).items() if k not in ("lr", "train", "train_from")}
    # Fields that came later appear only where they are used, so that older runs keep their hash.
    if config.model.family == FIRST:
        del model["family"]
    model = {key: value for key, value in model.items() if key not in LATER_SIZES or value != LATER_SIZES[key]}
    if config.optim.name != "muon":
        optim = {key: value for key, value in optim.items() if key not in MUON_ONLY}
    nudges = {} if config.rounding_seed in (None, config.seed) else {"rounding_seed": config.rounding_seed}
    nudges |= {"perturb": config.perturb} if config.perturb else {}
    nudges |= {"init": {"from": init}} if init else {}
    masked = {"document_mask": True} if config.batch.document_mask else {}
    return flatten(
        {
            "model": {**model, "vocab_size": vocab_size},
            "dtypes": {"compute": "bfloat16", "master": "float32", "gradients": "float32"},
            "quant": plan,
            "data": data,
            "seed": config.seed,
            **nudges,
            **(hooks or {}),
            "optim": optim,
            "schedule": numbers.schedule.to_dict(),
            "batch": {"seq_len": numbers.seq_len, "sequences": numbers.sequences, "micro": numbers.micro, **masked},
        }
    )


def plan_numerics(plan: Plan) -> dict[str, Any]:
    """The precision plan for `numerics`: the base recipe's fields, then every layer that has another recipe.

    Names of recipes don't count: two ways to write the same six slots are the same run.
    """
    slots = plan.recipe.numerics()
    others = {e.name: e.recipe for e in plan.entries if e.name != HEAD and e.recipe.numerics() != slots}
    used = {library.label(recipe): recipe.numerics() for recipe in others.values()}
    layers = {name.replace(".", "/"): library.label(recipe) for name, recipe in others.items()}
    return {**slots, "recipes": used, "layers": layers}


def hash_of(numerics: dict[str, Any]) -> str:
    """16 hex digits over the sorted dict."""
    return hashlib.sha256(json.dumps(numerics, sort_keys=True).encode()).hexdigest()[:16]


def default_name(model: str, recipe: str, tokens: int, seed: int, digest: str) -> str:
    """llama_30m-quartet2-0.1B-s0-1a2b3c4d. ValueError for names that make no folder beside the others."""
    for option, word in (("model.name", model), ("quant.name", recipe)):
        if not FOLDER_NAME.fullmatch(word):
            raise ValueError(f"{option}={word}: part of a folder's name; letters, digits and . _ + - are possible")
    return f"{model}-{recipe}-{short_count(tokens)}-s{seed}-{digest[:8]}"


def short_count(number: int) -> str:
    """750_000_000 -> '0.75B', 153_600 -> '154K': three significant digits."""
    for limit, unit, scale in ((10**8, "B", 10**9), (10**6, "M", 10**6), (10**3, "K", 10**3)):
        if number >= limit:
            return f"{number / scale:.3g}{unit}"
    return str(number)


def refuse_other(stored: dict[str, Any], wanted: dict[str, Any], folder: str, name: str) -> None:
    """Raise IdentityError if the folder's numerics differ, with the differing keys and what to type."""
    old, new = stored["numerics"], wanted["numerics"]
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key, "-") != new.get(key, "-")]
    if not differing:
        return
    lines = [f"  {key}: {old.get(key, '-')} (stored) -> {new.get(key, '-')} (now)" for key in differing[:SHOWN]]
    if len(differing) > SHOWN:
        lines.append(f"  and {len(differing) - SHOWN} more")
    raise IdentityError(
        f"{folder} holds a run with other numerics:\n" + "\n".join(lines) + "\n"
        f"To resume it, type its own values again (stored in {folder}/config.yaml); to start a new run, leave out "
        f"run.name or give another one, such as run.name={name}-2"
    )
