"""Settings that were typed and would have no effect: whoever types one believes that it acts."""

from collections.abc import Collection, Iterator
from typing import Any

from quant.recipe import OPERANDS
from training.config import TrainConfig

WARMUPS = ("warmup_fraction", "warmup_steps", "warmup_tokens")
RANDOM = ("sr", "ms_eden")
MANY = 10**9  # steps
# Of the data section, read beside data.path or data.mix.
OF_ANY_TEXT = ("path", "mix", "weights", "val_sets", "packing", "workers", "verify")
Unread = tuple[str, str]  # (key, why it has no effect and what to type)


def check(typed: Collection[str], config: TrainConfig) -> None:
    """Raise ValueError for the first of the `typed` keys that nothing in this configuration reads.

    Values that presets bring along may go unread: beside others they say nothing wrong.
    """
    given = {key for key in typed if key.startswith("quant.") or value_at(config, key) is not None}
    for find in (warm_ups, evaluations, operands, rotations, sources, random_bits, text, rates, sinks):
        for key, why in find(given, config):
            value = value_at(config, key)
            raise ValueError(f"{key}{'' if value is None else f'={value}'} has no effect: {why}, or leave it out")


def value_at(config: TrainConfig, key: str) -> Any:
    """The composed value of a dotted key; None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return value


def warm_ups(given: set[str], config: TrainConfig) -> Iterator[Unread]:
    found = [f"schedule.{name}" for name in WARMUPS if f"schedule.{name}" in given]
    if len(found) > 1:
        yield found[0], f"{found[1]} is given, too; set one of them to null"
    fraction = config.schedule.warmup_fraction
    if found == ["schedule.warmup_fraction"] and fraction and not round(fraction * (steps := known_steps(config))):
        yield found[0], f"of {steps} steps that is none; raise it, set it to 0"


def known_steps(config: TrainConfig) -> int:
    """Of a run whose length is given; more than enough where it follows from the model."""
    if config.steps is not None or config.tokens is None:
        return config.steps or MANY
    from training.start.derive import batch_sequences, run_steps  # here: torch takes seconds

    return run_steps(config, 0, batch_sequences(config) * config.batch.seq_len)


def evaluations(given: set[str], config: TrainConfig) -> Iterator[Unread]:
    if "evaluate.tokens" in given and config.evaluate.every is None:
        yield "evaluate.tokens", "the only evaluation is the last one; set evaluate.final_tokens or evaluate.every"


def operands(given: set[str], config: TrainConfig) -> Iterator[Unread]:
    """Fields of operands that are not quantized, and of MS-EDEN where it doesn't run."""
    for slot, spec in slots(config):
        for key in sorted(key for key in given if key.startswith(f"quant.{slot}.")):
            field = key.removeprefix(f"quant.{slot}.")
            if spec.get("grid") == "none" and field not in ("grid", "source"):
                yield key, f"{slot} is not quantized; set quant.{slot}.grid"
            elif field.startswith("eden_") and spec.get("rounding") != "ms_eden":
                yield key, f"{slot} doesn't round by it; set quant.{slot}.rounding=ms_eden"


def rotations(given: set[str], config: TrainConfig) -> Iterator[Unread]:
    for gemm in OPERANDS:
        prefix = f"quant.{gemm}.rotation"
        for key in sorted(key for key in given if key.startswith(f"{prefix}.")):
            if not is_quantized(config, gemm):
                yield key, f"no operand of {gemm} is quantized; set quant.{gemm}.{OPERANDS[gemm][0]}.grid"
            elif value_at(config, f"{prefix}.dim") is None:
                yield key, f"{gemm} isn't rotated; set {prefix}.dim"


def sources(given: set[str], config: TrainConfig) -> Iterator[Unread]:
    for slot, used in (("dgrad.w", "fprop.w"), ("wgrad.x", "fprop.x")):
        key = f"quant.{slot}.source"
        if key in given and value_at(config, key) == "fprop" and value_at(config, f"quant.{used}.grid") == "none":
            yield key, f"{used} is not quantized, so fprop used the input as it is; set quant.{used}.grid"


def random_bits(given: set[str], config: TrainConfig) -> Iterator[Unread]:
    is_plain = "scheme" not in config.quant and not config.quant.get("rules")
    if "rounding_seed" in given and config.rounding_seed != config.seed and is_plain and not draws_bits(config):
        yield "rounding_seed", f"quant={config.quant.get('name')} draws no random bits; perturb=1e-6 nudges any run"


def text(given: set[str], config: TrainConfig) -> Iterator[Unread]:
    data = config.data
    for names, is_unread, why in text_rules(data):
        for key in sorted(given & {f"data.{name}" for name in names}) if is_unread else ():
            yield key, why
    others = {key for key in given if key.startswith("data.") and key.split(".")[1] not in OF_ANY_TEXT}
    for name in ("path", "mix"):
        for key in sorted(others) if getattr(data, name) else ():
            yield key, f"data.{name} names text that is tokenized already; set data.{name}=null"


def text_rules(data: Any) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """(fields, whether they go unread, why and what to type)."""
    by_file = bool(data.val_files)
    yield (
        ("vocab_size", "tokenizer_train_bytes"),
        bool(data.tokenizer),
        "the tokenizer is given; set data.tokenizer=null",
    )
    yield ("bos",), not data.tokenizer, "a tokenizer that is trained here has its own; set data.tokenizer"
    yield ("val_rule", "val_fraction", "split_seed"), by_file, "validation text is given; set data.val_files=null"
    yield ("val_fraction",), data.val_rule == "paper", "the paper's share is fixed; set data.val_rule=hash"
    hub = ("hub_path", "hub_name", "hub_split", "hub_revision", "hub_data_files", "hub_streaming")
    yield hub, data.source != "hub", f"data.source={data.source} reads no hub; set data.source=hub"


def rates(given: set[str], config: TrainConfig) -> Iterator[Unread]:
    if {"model.lr", "optim.lr"} <= given:
        yield "model.lr", "optim.lr is given, too; set optim.lr=null"


def sinks(given: set[str], config: TrainConfig) -> Iterator[Unread]:
    for key in ("logger.wandb.project", "logger.wandb.entity"):
        if key in given and config.logger.wandb.mode == "disabled":
            yield key, "nothing is sent to W&B; set logger=wandb"


def slots(config: TrainConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """("fprop.x", its mapping), ... of a recipe of slots."""
    for gemm, names in OPERANDS.items():
        for name in names:
            spec = value_at(config, f"quant.{gemm}.{name}")
            if isinstance(spec, dict):
                yield f"{gemm}.{name}", spec


def is_quantized(config: TrainConfig, gemm: str) -> bool:
    return any(spec.get("grid") != "none" for slot, spec in slots(config) if slot.startswith(f"{gemm}."))


def draws_bits(config: TrainConfig) -> bool:
    """Whether any quantized operand rounds at random, or is multiplied by random signs."""
    for slot, spec in slots(config):
        if spec.get("grid") == "none":
            continue
        rotation = value_at(config, f"quant.{slot.split('.')[0]}.rotation") or {}
        by_signs = rotation.get("dim") is not None and rotation.get("signs", "random") == "random"
        if by_signs or {spec.get("rounding"), spec.get("scale_rounding")} & {*RANDOM}:
            return True
    return False
