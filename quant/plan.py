"""Which recipe each linear layer gets: ordered rules over module names, resolved once, saved with the run."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from base.words import suggestion
from kernels import backend
from kernels import gemm as gemms
from kernels.spec import NVFP4_BLOCK
from quant import library
from quant.library import AnyRecipe
from quant.linear import QuantLinear
from quant.recipe import FPROP_SLOT, GEMMS, SLOTS, Gemm, Operand, Recipe, mapping_at

# Stays in BF16 whatever the rules say: the loss multiplies by its weight itself (kernels/cross_entropy).
HEAD = "lm_head"
BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches the glob `match` get `recipe`."""

    match: str
    recipe: AnyRecipe


@dataclass(frozen=True)
class Precision:
    """The `quant` group of the configuration: a recipe, rules over it, and blocks kept in BF16 at either end."""

    recipe: AnyRecipe
    rules: tuple[Rule, ...] = ()
    high_precision_first: int = 0
    high_precision_last: int = 0

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "Precision":
        """From the whole group as a plain mapping (configs/quant/*.yaml). Raises ValueError that says what to type."""
        ends = mapping_at("quant.high_precision", mapping.get("high_precision"))
        rules, given = [], mapping.get("rules")
        if not isinstance(given, list | tuple | None):
            raise ValueError(f"quant.rules: got {given!r}; write '[{{match: \"blocks.0.*\", recipe: bf16}}]'")
        for rule in given or ():
            if not isinstance(rule, Mapping) or set(rule) != {"match", "recipe"}:
                raise ValueError(f"quant.rules: got {rule!r}; write '[{{match: \"blocks.0.*\", recipe: bf16}}]'")
            rules.append(Rule(str(rule["match"]), library.load(str(rule["recipe"]))))
        counts = {"first": 0, "last": 0} | dict(ends)
        if set(counts) != {"first", "last"} or not all(type(n) is int and n >= 0 for n in counts.values()):
            raise ValueError(f"quant.high_precision={dict(ends)}: give whole numbers of blocks as first and last")
        return cls(library.build(dict(mapping)), tuple(rules), counts["first"], counts["last"])


@dataclass(frozen=True)
class Entry:
    """One linear layer. index: its number among all nn.Linear of the model, part of the random counters."""

    index: int
    name: str
    shape: tuple[int, int]
    recipe: AnyRecipe
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every linear layer of a model with its recipe."""

    label: str
    entries: tuple[Entry, ...]
    recipe: AnyRecipe

    @property
    def fullgraph(self) -> bool:
        """Whether torch.compile(fullgraph=True) can take the converted model."""
        return all(getattr(entry.recipe, "fullgraph", True) for entry in self.entries)

    def check_tokens(self, micro_tokens: int) -> None:
        """Raise ValueError where blocks or rotation don't divide the tokens of a micro-batch."""
        for entry in self.entries:
            for needed in _training_divisors(entry.recipe):
                if micro_tokens % needed:
                    raise ValueError(
                        f"{entry.name}: the {micro_tokens} tokens of a micro-batch are no multiple of {needed} "
                        "(rotation or block); choose batch.micro or batch.seq_len so that they are"
                    )

    @property
    def forward_divisor(self) -> int:
        """What must divide the tokens of a batch that only goes forward, as evaluation's do: a power of two."""
        return max((_forward_divisor(entry.recipe) for entry in self.entries), default=1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for plan.json: the recipes used, resolved, and each layer's."""
        names = self._names()
        recipes = {name: recipe.to_dict() for recipe, name in names.items()}
        layers = [
            {"index": e.index, "name": e.name, "shape": list(e.shape), "recipe": names[e.recipe]} for e in self.entries
        ]
        return {"label": self.label, "recipes": recipes, "layers": layers}

    def table(self) -> str:
        """One line for the layers of the same role, recipe and reason, with their blocks, then each recipe's slots."""
        groups: dict[tuple[str, str, str], list[Entry]] = {}
        names = self._names()
        for entry in self.entries:
            role = BLOCK.sub("blocks.*.", entry.name)
            groups.setdefault((role, names[entry.recipe], entry.reason), []).append(entry)
        wide = min(48, max(len(name) for _, name, _ in groups))
        lines = [f"{'layers':28} {'blocks':>8}  {'recipe':{wide}}  why"]
        lines += [
            f"{role:28} {_numbers(found):>8}  {name:{wide}}  {why}" for (role, name, why), found in groups.items()
        ]
        return "\n".join(lines + [line for recipe, name in names.items() for line in describe(name, recipe)])

    def _names(self) -> dict[AnyRecipe, str]:
        """{recipe: its label}; a label takes reading a file, which the layers share."""
        return {recipe: library.label(recipe) for recipe in dict.fromkeys(entry.recipe for entry in self.entries)}


def unusual(operand: Operand) -> str:
    """The fields that a slot's line names only where they have another value than almost everywhere."""
    usual = {"eden_space": "tensor", "scale_rounding": "rtn", "tensor_scale": "fp32"}
    found = {key: getattr(operand.spec, key) for key in usual if getattr(operand.spec, key) != usual[key]}
    found |= {"amax": operand.amax} if operand.amax != "exact" else {}
    return "".join(f", {key} {value}" for key, value in found.items())


def describe(name: str, recipe: AnyRecipe) -> list[str]:
    """Lines that spell out a recipe's slots; one line for a scheme, or for a recipe that quantizes nothing."""
    if not isinstance(recipe, Recipe):
        return [f"{name}: {', '.join(f'{key} {value}' for key, value in recipe.to_dict().items())}"]
    if not recipe.is_quantized:
        return [f"{name}: all six operands unquantized"]
    lines = [f"{name}:"]
    for slot in SLOTS:
        operand, spec = recipe.operand(slot), recipe.operand(slot).spec
        rotation = recipe.gemm(slot.split(".")[0]).rotation
        turned = f", rotation {rotation.dim} {rotation.signs}" if rotation.dim else ""
        if not operand.is_quantized:
            lines.append(f"  {slot:9} bf16, source {operand.source}")
            continue
        if operand.source == "fprop_transposed":
            lines.append(f"  {slot:9} codes of fprop.{FPROP_SLOT[slot]}")
            continue
        eden = f" per {spec.eden_block}" if spec.rounding == "ms_eden" else ""
        how = f"{spec.grid} {str(spec.scales[-1]).split()[0]} {spec.select} {spec.rounding}{eden}"
        limits = f"max {spec.target_max:g} cap {spec.scale_cap:g}"
        lines.append(f"  {slot:9} {how}, {limits}, source {operand.source}{turned}{unusual(operand)}")
    return lines


def resolve(model: nn.Module, precision: Precision) -> Plan:
    """Assign a recipe to every nn.Linear: the base recipe, then BF16 end blocks, then the rules; the last match wins.

    Raises ValueError for a rule that matches no layer (with the nearest name) and for more BF16 blocks than there are.
    """
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    eligible = [name for name, _ in linears if name != HEAD]
    bf16 = library.load("bf16")
    chosen = {name: (precision.recipe, "recipe") for name in eligible}
    chosen |= {name: (bf16, "quant.high_precision") for name in _end_blocks(eligible, precision)}
    for rule in precision.rules:
        matched = [name for name in eligible if fnmatchcase(name, rule.match)]
        if not matched:
            near = suggestion(rule.match, eligible, f"layers: {', '.join(eligible[:6])}")
            raise ValueError(f"quant.rules: {rule.match!r} matches no layer that can be quantized{near}")
        chosen |= {name: (rule.recipe, f"rule {rule.match}") for name in matched}
    chosen[HEAD] = (bf16, "the head stays in bf16")
    entries = [
        Entry(index, name, (module.out_features, module.in_features), *chosen[name])
        for index, (name, module) in enumerate(linears)
    ]
    for entry in entries:
        _check_shape(entry)
    return Plan(_label(precision), tuple(entries), precision.recipe)


def convert(model: nn.Module, plan: Plan, rng: Tensor) -> nn.Module:
    """Replace every nn.Linear by a QuantLinear (or a scheme's layer) with the same Parameter and name, in place.

    rng: int64 [3] on the model's device, shared by all layers: (seed, step, micro-batch), updated in place by the
    trainer. Call it after the model is built and on its device, before compile and DDP/FSDP. Returns model.
    Raises RuntimeError where this machine can't run a scheme, and ValueError where the chosen GEMM back end multiplies
    packed 4-bit operands and a layer's GEMM has only one: emulating it is a choice to be made, not a fallback.
    """
    if backend.IMPL and gemms.wants() == "packed":
        for entry in plan.entries:
            _check_packed(entry)
    for entry in plan.entries:
        parent_name, _, child = entry.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, _layer(getattr(parent, child), entry, rng))
    return model


def _check_packed(entry: Entry) -> None:
    if not isinstance(entry.recipe, Recipe):
        return
    for name in GEMMS:
        if sum(operand.spec.is_nvfp4 for operand in entry.recipe.gemm(name).operands) == 1:
            raise ValueError(
                f"{entry.name}: one operand of {name} is NVFP4 and the other is not; 4-bit tensor cores need both. "
                f"Quantize both or neither (quant.{name}=none), or emulate: backend=triton"
            )


def plan_of(model: nn.Module, mapping: Mapping[str, Any]) -> Plan:
    """The plan of the whole `quant` group as a plain mapping."""
    return resolve(model, Precision.from_dict(mapping))


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """{name: layer} of all that run under a recipe of six slots."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@contextmanager
def changed(model: nn.Module, change: Callable[[Recipe], Recipe]) -> Iterator[None]:
    """Within it every QuantLinear runs under change(its recipe)."""
    before = {layer: layer.recipe for layer in quant_linears(model).values()}
    try:
        for layer, recipe in before.items():
            layer.recipe = change(recipe)
        yield
    finally:
        for layer, recipe in before.items():
            layer.recipe = recipe


def unquantized(model: nn.Module) -> AbstractContextManager[None]:
    """Within it every QuantLinear multiplies in BF16, as the `bf16` recipe does: to report what quantization costs."""
    bf16 = library.load("bf16")
    return changed(model, lambda recipe: bf16)


def _layer(linear: nn.Linear, entry: Entry, rng: Tensor) -> nn.Module:
    if isinstance(entry.recipe, Recipe):
        return QuantLinear(linear, entry.recipe, entry.index, rng)
    entry.recipe.require()
    return entry.recipe.build(linear, entry.index, rng)


def _check_shape(entry: Entry) -> None:
    """Raise ValueError where blocks or rotation don't divide the features of a layer."""
    rows, columns = entry.shape
    if not isinstance(entry.recipe, Recipe):
        return entry.recipe.check(entry.name, columns, rows)
    recipe = entry.recipe
    for what, features, needed in (
        ("fprop", columns, _divisor(recipe.fprop)),
        ("dgrad", rows, _divisor(recipe.dgrad)),
        ("fprop.w", rows, _square(recipe, "fprop.w")),
        ("dgrad.w", columns, _square(recipe, "dgrad.w")),
        ("wgrad.dy", rows, _square(recipe, "wgrad.dy")),
        ("wgrad.x", columns, _square(recipe, "wgrad.x")),
    ):
        if features % needed:
            raise ValueError(
                f"{entry.name}: {features} features are no multiple of {needed} (rotation or block of {what}); keep "
                f"it in BF16 with quant.rules='[{{match: {entry.name}, recipe: bf16}}]'"
            )
    return None


def _divisor(gemm: Gemm) -> int:
    """What must divide the contraction of a GEMM: its rotation, or NVFP4's block."""
    return gemm.rotation_dim or (NVFP4_BLOCK if any(operand.spec.is_nvfp4 for operand in gemm.operands) else 1)


def _training_divisors(recipe: AnyRecipe) -> list[int]:
    """What must divide the tokens of a micro-batch, forward and backward."""
    if not isinstance(recipe, Recipe):
        return [_forward_divisor(recipe)]
    return [_divisor(recipe.wgrad), _forward_divisor(recipe), _square(recipe, "dgrad.dy")]


def _forward_divisor(recipe: AnyRecipe) -> int:
    return _square(recipe, "fprop.x") if isinstance(recipe, Recipe) else recipe.tokens_multiple


def _square(recipe: Recipe, slot: str) -> int:
    """What must divide the other dimension of an operand than its contraction: the side of a 16x16 block."""
    return NVFP4_BLOCK if recipe.operand(slot).spec.is_square else 1


def _numbers(entries: list[Entry]) -> str:
    """Block numbers of the entries, runs as "0-5"."""
    runs: list[list[int]] = []
    for number in sorted(int(found[1]) for entry in entries if (found := BLOCK.search(entry.name))):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _end_blocks(names: list[str], precision: Precision) -> list[str]:
    first, last = precision.high_precision_first, precision.high_precision_last
    if not first and not last:
        return []
    numbers = {name: int(found[1]) for name in names if (found := BLOCK.search(name))}
    blocks = max(numbers.values(), default=-1) + 1
    if first + last > blocks:
        raise ValueError(f"quant.high_precision: first={first} and last={last} of a model with {blocks} blocks")
    return [name for name, number in numbers.items() if number < first or number >= blocks - last]


def _label(precision: Precision) -> str:
    """The recipe's label, plus what rules and BF16 blocks change."""
    ends = {"first": precision.high_precision_first, "last": precision.high_precision_last}
    parts = [library.label(precision.recipe)]
    parts += [f"{rule.match}={library.label(rule.recipe)}" for rule in precision.rules]
    return " ".join(parts + [f"{end}{count}=bf16" for end, count in ends.items() if count])
