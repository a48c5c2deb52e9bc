"""What is known about a run before any memory is allocated: shapes, plan, derived numbers, identity, memory."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from base.fork import Parent
from data import valsets
from data.mixture import Mixture
from data.tokens import TokenSet
from models.shape import DecoderShape
from quant import recipefile
from quant.phases import Phase, phases_of
from quant.phases import numerics as phase_numerics
from quant.plan import Plan, plan_of
from quant.recipe import mapping_at
from training import hooks, probes
from training.config import TrainConfig
from training.probes.base import Coming
from training.ranks.distributed import Dist
from training.ranks.parallel import choose
from training.records.identity import default_name, hash_of, numerics, plan_numerics
from training.start import fork, initial
from training.start.build import is_blockwise, is_graphed
from training.start.cautions import memory_of
from training.start.derive import Numbers, derive
from training.start.initial import Weights, check_data, check_model, check_tokenizer, source_of
from training.start.memory import MemoryEstimate, estimate, kept_of
from training.start.shapes import model_of, shape_of


@dataclass(frozen=True)
class Request:
    """One run as asked for. `yaml`: the composed text; `choices`: {group: option}; `command`: how it was typed."""

    config: TrainConfig
    yaml: str
    choices: dict[str, str]
    command: str


@dataclass(frozen=True)
class Checked:
    """What follows from the configuration alone. `plan`: outside of the phases. `hooks` and `probes`: {name: checked
    options}."""

    shape: DecoderShape
    plan: Plan
    phases: tuple[Phase, ...]
    numbers: Numbers
    hooks: dict[str, Any]
    probes: dict[str, Any]

    @property
    def plans(self) -> list[Plan]:
        """All that some step of the run computes by."""
        return [self.plan, *(phase.plan for phase in self.phases)]

    @property
    def label(self) -> str:
        """The recipe's and the phases', for tables."""
        steps = self.numbers.steps
        shares = [f"{phase.first / steps:.3g}-{phase.end / steps:.3g}" for phase in self.phases]
        drawn = [f" x {phase.share:.3g}" if phase.share < 1 else "" for phase in self.phases]
        later = [f"{a}{b}: {p.plan.label}" for a, b, p in zip(shares, drawn, self.phases, strict=True)]
        return "; ".join([self.plan.label, *later])

    def plan_json(self) -> dict[str, Any]:
        """plan.json: what every layer does, in every phase."""
        later = [phase.to_dict() | {"plan": phase.plan.to_dict()} for phase in self.phases]
        return self.plan.to_dict() | ({"phases": later} if later else {})


@dataclass(frozen=True)
class Description(Checked):
    """Everything known about a run before memory is allocated. `tokens` is None in a dry run without prepared data."""

    tokens: TokenSet | None
    run: dict[str, Any]
    parent: Parent | None

    @property
    def train_tokens(self) -> int | None:
        """Of the prepared text; None where it isn't prepared yet."""
        return self.tokens.train_tokens if self.tokens else None


def check(config: TrainConfig, ranks: Dist, vocab_size: int) -> Checked:
    """Check and derive, on the meta device, all that follows without the text. What is legal doesn't depend on the
    vocabulary: any `vocab_size` will do to find mistakes."""
    if source := source_of(config):
        check_model(source, config.model)
        check_data(source, config.data)
    shape = shape_of(config, vocab_size)
    with torch.device("meta"):
        model = model_of(shape)
    numbers = derive(config, shape.parameters_non_embedding, ranks.world)
    plan = plan_of(model, config.quant)
    phases = phases_of(model, config.quant, plan, numbers.steps)
    plans = [plan, *(phase.plan for phase in phases)]
    for one in plans:
        one.check_tokens(numbers.micro_tokens)
    recipes = mapping_at("quant.hooks", config.quant.get("hooks"))
    found = hooks.read(model, plan, model.hooks, recipes, config.hooks, hooks.of_optimizer(config.optim))
    looking = probes.read(config, Coming(model, plans, numbers), any(map(has_slots, plans)), bool(found))
    return Checked(shape, plan, phases, numbers, found, looking)


def has_slots(plan: Plan) -> bool:
    """Whether any layer quantizes operands that can be counted."""
    return any(operand.is_quantized for recipe in plan.recipes for operand in recipe.operands().values())


def describe(request: Request, ranks: Dist, tokens: TokenSet | None) -> Description:
    """What run it is and will compute."""
    config = request.config
    vocab_size = tokens.vocab_size if tokens else expected_vocab_size(config)
    checked = check(config, ranks, vocab_size)
    fingerprints = {"fingerprint": tokens.fingerprint if tokens else None}
    fingerprints |= {"tokenizer": tokens.tokenizer_hash if tokens else None, "packing": config.data.packing}
    around = hooks.numerics(checked.hooks)
    if source := source_of(config):
        check_tokenizer(source, vocab_size, fingerprints["tokenizer"])
        weights = Weights(source, checked.shape)
        with torch.device("meta"):
            for name, parameter in model_of(checked.shape).named_parameters():
                weights.check(name, parameter.shape)
    init = ranks.on_main(lambda: initial.identity(config))  # the file of remembered sums is one process's
    quant = plan_numerics(checked.plan) | phase_numerics(checked.phases, plan_numerics)
    flat = numerics(config, checked.numbers, quant, vocab_size, fingerprints, around, init)
    parent = fork.parent(config)
    if parent:
        fork.check(parent, flat, checked.numbers, tokens)
        flat |= parent.identity
    run = run_info(request, checked, flat, parent) | {
        "vocab_size": vocab_size,
        **({"mixture": tokens.label} if isinstance(tokens, Mixture) else {}),
        **({"val_sets": valsets.fingerprints(config.data)} if config.data.val_sets else {}),
        "data_path": str(tokens.path.resolve()) if tokens else None,
        **({"copies_of_val": tokens.copies_of_val} if tokens and tokens.copies_of_val else {}),
        "data_fingerprint": fingerprints["fingerprint"],
        "tokenizer_hash": fingerprints["tokenizer"],
    }
    return Description(**vars(checked), tokens=tokens, run=run, parent=parent)


def run_info(request: Request, checked: Checked, flat: dict[str, Any], parent: Parent | None = None) -> dict[str, Any]:
    """run.json, but for what it says of the data. `flat`: what the hash covers; without the data's fingerprint a name
    of ours ends with <hash>."""
    config, digest = request.config, hash_of(flat)
    shape, plan, numbers = checked.shape, checked.plan, checked.numbers
    shown = digest if flat["data.fingerprint"] else "<hash>"
    return {
        "name": config.run.name
        or default_name(config.model.name, plan.recipe.name, numbers.tokens, config.seed, shown),
        "hash": digest,
        "numerics": flat,
        "model": config.model.name,
        "parameters": shape.parameters,
        "parameters_non_embedding": shape.parameters_non_embedding,
        "recipe": plan.recipe.name,
        "recipe_label": fork.label(parent, checked.label) if parent else checked.label,
        **({"parent": parent.lineage} if parent else {}),
        **({"phases": [phase.to_dict() for phase in checked.phases]} if checked.phases else {}),
        "seed": config.seed,
        "tokens": numbers.tokens,
        "steps": numbers.steps,
        "tokens_per_step": numbers.tokens_per_step,
        "seq_len": numbers.seq_len,
        "experiment": request.choices.get("experiment"),
        "cell": request.choices.get("cell"),
        "command": request.command,
    }


def config_files(choices: dict[str, str], plan: Plan) -> list[Path]:
    """The YAML files that a run comes from: the options chosen, and the recipes that rules name."""
    ours = recipefile.FOLDER.parent
    chosen = [
        Path(option) if option.endswith((".yaml", ".yml")) else ours / group / f"{option}.yaml"
        for group, option in choices.items()
    ]
    recipes = [recipefile.FOLDER / f"{entry.recipe.name}.yaml" for entry in plan.entries]
    return [path for path in dict.fromkeys([*chosen, *recipes]) if path.exists()]


def expected_vocab_size(config: TrainConfig) -> int:
    """What the tokenizer will have, without preparing any text."""
    if config.data.tokenizer:
        from data.tokenizer import TextTokenizer, tokenizer_file  # needs the tokenizers package; training doesn't

        return TextTokenizer(tokenizer_file(config.data.tokenizer), config.data.bos).vocab_size
    return config.data.vocab_size


def expected_memory(
    config: TrainConfig, described: Description, ranks: Dist, mode: str, graphed: bool
) -> MemoryEstimate:
    """Of the phase or probe that takes most. Where a phase draws its steps, the graphs of both its recipes stay."""

    numbers, blockwise = described.numbers, is_blockwise(config, ranks.device)

    def of(plan: Plan, tokens: int = numbers.micro_tokens) -> MemoryEstimate:
        return estimate(
            described.shape,
            tokens,
            kept_of(plan),
            shards={"fsdp": ranks.world, "hsdp": ranks.local_world}.get(mode, 1),
            recompute=config.recompute,
            accumulates=numbers.accumulation > 1,
            replicated=mode == "ddp",
            optimizer=config.optim.name,
            mask_length=numbers.seq_len if config.batch.document_mask and not blockwise else 0,
            hooks=hooks.bytes_per_parameter(described.hooks),
        )

    usual = of(described.plan)
    found = [usual]
    for phase in described.phases:
        own = of(phase.plan)
        if graphed and phase.share < 1:
            again = own.parts["activations"] + own.parts["temporaries"] + own.parts["gradients"]
            own = MemoryEstimate(usual.parts | {"graphs of the drawn steps": again})
        found.append(own)
    largest = max(found, key=lambda estimate: estimate.total)
    looking = [
        probes.PROBES[name].memory(options, described.plan, of, graphed) for name, options in described.probes.items()
    ]
    return max([largest, *filter(None, looking)], key=lambda estimate: estimate.total)


def check_memory(config: TrainConfig, described: Description, ranks: Dist) -> None:
    """ValueError where there is memory for the run as it begins, and not for a later phase or for its probes."""
    mode = choose(config.parallel, ranks, described.shape.parameters)
    graphed = is_graphed(config, described.plan.fullgraph, mode, ranks.device)
    has = memory_of(ranks.device, ranks.local_world)

    def expected(**without: Any) -> float:
        return expected_memory(config, replace(described, **without), ranks, mode, graphed).total

    begins, alone, both = expected(phases=(), probes={}), expected(probes={}), expected()
    if begins <= has < alone:
        phase = max(described.phases, key=lambda one: expected(phases=(one,), probes={}))
        raise ValueError(
            f"quant.phases: {phase} needs {alone:.1f} GiB, this device has {has:.1f} and the run begins with "
            f"{begins:.1f}; set a smaller batch.micro, or recompute=true"
        )
    if alone <= has < both:
        raise ValueError(
            f"probes: {', '.join(described.probes)} need {both:.1f} GiB, this device has {has:.1f} and the run takes "
            f"{alone:.1f}; leave them out, or lower probes.xray.tokens and probes.xray.draws"
        )
