"""A cell's numerics before its run exists, and the name that follows from them.

A cell as the grid's file has it keeps its plain name. Overrides beside it add eight digits of a hash of what they
change in the numerics, as composed: spelling, order and the place of a file don't matter, only what it computes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from base.files import json_hash
from base.fork import ForkError, parent_of
from launcher import cells as experiments
from training.config import TrainConfig

# Sections and keys that no numerics hold: where they alone differ, torch isn't needed to say so.
HARMLESS = ("paths", "run", "log", "logger", "evaluate", "probes", "checkpoint")
HARMLESS += ("parallel", "backend", "compile", "cuda_graphs", "watchdog_s", "deterministic", "dry_run", "recompute")
HARMLESS += ("nonfinite", "profile")
# Of the data section: where text lies and what it is called, and what is only looked at; `path` and `mix` name text by
# themselves.
ASIDE = ("name", "path", "mix", "weights", "files", "val_files", "val_sets", "workers", "verify")


@dataclass(frozen=True)
class Text:
    """What is known of a text: fingerprints where its tokens exist, else None; the vocabulary as far as it is known.

    `key`: the end of its token folder's name, made of the contents of its files; None where they are not known.
    """

    vocab_size: int
    fingerprint: str | None = None
    tokenizer: str | None = None
    key: str | None = None


class Numerics:
    """What the hash of a run covers, of many cells; each shape and recipe is resolved once."""

    def __init__(self) -> None:
        self._plans: dict[str, tuple[list[Any], dict[str, Any], dict[str, Any]]] = {}

    def of(self, config: TrainConfig, text: Text) -> dict[str, Any]:
        """As run.json has it; ValueError for numbers that don't fit each other."""
        from training.records.identity import numerics  # here: torch takes seconds
        from training.start.derive import derive
        from training.start.initial import identity
        from training.start.shapes import shape_of

        shape = shape_of(config, text.vocab_size)
        numbers = derive(config, shape.parameters_non_embedding, world=1)
        data = {"fingerprint": text.fingerprint, "tokenizer": text.tokenizer, "packing": config.data.packing}
        _, plan, around = self._plan(config, shape, numbers.steps)
        flat = numerics(config, numbers, plan, text.vocab_size, data, around, identity(config)) | fork_identity(config)
        return json.loads(json.dumps(flat))  # tuples are lists there

    def plans(self, config: TrainConfig, shape: Any, steps: int) -> list[Any]:
        """The precision plan, then those of its phases; what they say of a layer doesn't depend on the vocabulary."""
        return self._plan(config, shape, steps)[0]

    def _plan(self, config: TrainConfig, shape: Any, steps: int) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
        """(precision plans, their part of the numerics over these steps, that of the hooks)."""
        import torch

        from quant.phases import numerics as phase_numerics
        from quant.phases import phases_of
        from quant.plan import plan_of
        from quant.recipe import mapping_at
        from training import hooks
        from training.records.identity import plan_numerics
        from training.start.shapes import model_of

        of_optimizer = hooks.of_optimizer(config.optim)
        parts = [asdict(config.model), config.batch.seq_len, config.quant, config.hooks, of_optimizer]
        key = json.dumps([*parts, steps if config.quant.get("phases") else 0], sort_keys=True)
        if key not in self._plans:
            with torch.device("meta"):
                model = model_of(shape)
            plan = plan_of(model, config.quant)
            own = mapping_at("quant.hooks", config.quant.get("hooks"))
            found = hooks.read(model, plan, model.hooks, own, config.hooks, of_optimizer)
            phases = phases_of(model, config.quant, plan, steps)
            quant = plan_numerics(plan) | phase_numerics(phases, plan_numerics)
            self._plans[key] = [plan, *(phase.plan for phase in phases)], quant, hooks.numerics(found)
        return self._plans[key]


def fork_identity(config: TrainConfig) -> dict[str, Any]:
    """What a fork adds to the numerics; its parent's name where the parent isn't there yet."""
    if not config.fork:
        return {}
    try:
        return parent_of(config.fork, config.paths.runs).identity
    except ForkError:
        return {"fork.parent": config.fork}


def cell_name(
    resolved: experiments.Resolved, config: TrainConfig, plain: TrainConfig | None, numerics: Numerics
) -> str:
    """The run folder of a cell with the `config` of its overrides; `plain`: without the extra ones, None where that is
    no configuration."""
    name = experiments.folder_name(resolved.experiment, resolved.cell)
    if plain is not None and _outside(config) == _outside(plain):
        return name
    text = Text(config.data.vocab_size)
    now = numerics.of(config, text) | _text_fields(config)
    before = {} if plain is None else numerics.of(plain, Text(plain.data.vocab_size)) | _text_fields(plain)
    given = [side.data.path or side.data.mix for side in (config, plain) if side is not None]
    if plain is not None and any(given):  # whose text is only known when it is opened
        now, before = ({k: v for k, v in side.items() if not k.startswith("text.")} for side in (now, before))
    changed = {key: now.get(key) for key in now.keys() | before.keys() if now.get(key) != before.get(key)}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name}-{digest}" if changed else name


def _outside(config: TrainConfig) -> dict[str, Any]:
    """The configuration without what is harmless."""
    values = {key: value for key, value in asdict(config).items() if key not in HARMLESS}
    values["data"] = {key: value for key, value in values["data"].items() if key not in ASIDE}
    return values


def _text_fields(config: TrainConfig) -> dict[str, Any]:
    """What of a text decides its tokens, but for its files' contents, which the run itself looks at."""
    spec = config.data
    fields = {f"text.{key}": value for key, value in asdict(spec).items() if key not in (*ASIDE, "tokenizer")}
    if not spec.tokenizer:
        return fields
    fields = {k: v for k, v in fields.items() if k not in ("text.vocab_size", "text.tokenizer_train_bytes")}
    return fields | {"text.tokenizer": tokenizer_hash(spec.tokenizer)}


def tokenizer_hash(path: str) -> str:
    """SHA-256 of a tokenizer.json as a run records it; where there is none, the path: the run says what is wrong."""
    from data.tokenizer import tokenizer_file

    try:
        file = tokenizer_file(path)
        at = file.stat()
        return _json_hash(file, at.st_mtime_ns, at.st_ctime_ns)
    except (ValueError, OSError):
        return path


@cache
def _json_hash(file: Path, *times: int) -> str:
    return json_hash(json.loads(file.read_text(encoding="utf-8")))
