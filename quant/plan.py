"""Which recipe each linear layer gets: ordered rules over module names, resolved once, saved with the run."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from base.words import suggestion
from quant import library
from quant.linear import QuantLinear
from quant.product import Product
from quant.recipe import mapping_at

# Stays in BF16 whatever the rules say: the loss multiplies by its weight itself (kernels/cross_entropy).
HEAD = "lm_head"
BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
FROM_THE_END = re.compile(r"\bblocks\.-(\d+)\.")


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches the glob `match` get `recipe`."""

    match: str
    recipe: Product


@dataclass(frozen=True)
class Precision:
    """The `quant` group of the configuration: a recipe, rules over it, and blocks kept in BF16 at either end."""

    recipe: Product
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
    recipe: Product
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every linear layer of a model with its recipe."""

    label: str
    entries: tuple[Entry, ...]
    recipe: Product

    @property
    def fullgraph(self) -> bool:
        """Whether torch.compile(fullgraph=True) can take the converted model."""
        return all(entry.recipe.fullgraph for entry in self.entries)

    @property
    def recipes(self) -> list[Product]:
        """Those in use, in the order of layers."""
        return list(dict.fromkeys(entry.recipe for entry in self.entries))

    def check_tokens(self, micro_tokens: int) -> None:
        """Raise ValueError where blocks or rotation don't divide the tokens of a micro-batch."""
        for entry in self.entries:
            for divisor in entry.recipe.divisors():
                if divisor.size == "tokens" and micro_tokens % divisor.number:
                    raise ValueError(
                        f"{entry.name}: the {micro_tokens} tokens of a micro-batch are no multiple of {divisor.number} "
                        f"({divisor.what}); choose batch.micro or batch.seq_len so that they are"
                    )

    @property
    def forward_divisor(self) -> int:
        """What must divide the tokens of a batch that only goes forward, as evaluation's do: a power of two."""
        divisors = (divisor for recipe in self.recipes for divisor in recipe.divisors())
        return max((d.number for d in divisors if d.size == "tokens" and d.forward), default=1)

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
        return "\n".join(lines + [line for recipe, name in names.items() for line in recipe.describe(name)])

    def _names(self) -> dict[Product, str]:
        """{recipe: its label}; a label takes reading a file, which the layers share."""
        return {recipe: library.label(recipe) for recipe in self.recipes}


def resolve(model: nn.Module, precision: Precision) -> Plan:
    """Assign a recipe to every nn.Linear: the base recipe, then BF16 end blocks, then the rules; the last match wins.

    `blocks.-1.` in a rule is the last block, as in Python. Raises ValueError for a rule that matches no layer (with the
    nearest name) and for more BF16 blocks than there are.
    """
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    eligible = [name for name, _ in linears if name != HEAD]
    bf16, blocks = library.load("bf16"), 1 + max(_block_numbers(eligible).values(), default=-1)
    chosen = {name: (precision.recipe, "recipe") for name in eligible}
    chosen |= {name: (bf16, "quant.high_precision") for name in _end_blocks(eligible, precision, blocks)}
    for rule in precision.rules:
        glob = FROM_THE_END.sub(lambda found: f"blocks.{blocks - int(found[1])}.", rule.match)
        matched = [name for name in eligible if fnmatchcase(name, glob)]
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


def check_supported(plan: Plan) -> None:
    """RuntimeError where this machine can't run a recipe, ValueError where the chosen back ends can't multiply a
    layer's operands."""
    for entry in plan.entries:
        if reason := entry.recipe.unsupported():
            raise ValueError(f"{entry.name}: {reason}")
    for recipe in plan.recipes:
        recipe.require()


def convert(model: nn.Module, plan: Plan, rng: Tensor) -> nn.Module:
    """Replace every nn.Linear by its recipe's layer with the same Parameter and name, in place.

    rng: int64 [3] on the model's device, shared by all layers: (seed, step, micro-batch), updated in place by the
    trainer. Call it after the model is built and on its device, before compile and DDP/FSDP. Returns model.
    Raises RuntimeError where this machine can't run a recipe, and ValueError where the chosen back ends can't multiply
    a layer's operands, before any layer is replaced.
    """
    check_supported(plan)
    for entry in plan.entries:
        parent_name, _, child = entry.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, entry.recipe.build(getattr(parent, child), entry.index, rng))
    return model


def plan_of(model: nn.Module, mapping: Mapping[str, Any]) -> Plan:
    """The plan of the whole `quant` group as a plain mapping."""
    return resolve(model, Precision.from_dict(mapping))


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """{name: layer} of all that run under a recipe."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@contextmanager
def replaced(model: nn.Module, recipes: Mapping[str, Product]) -> Iterator[None]:
    """Within it the named layers run under these recipes."""
    layers = quant_linears(model)
    before = {name: layers[name].recipe for name in recipes}
    try:
        for name, recipe in recipes.items():
            layers[name].recipe = recipe
        yield
    finally:
        for name, recipe in before.items():
            layers[name].recipe = recipe


def changed(model: nn.Module, change: Callable[[Product], Product]) -> AbstractContextManager[None]:
    """Within it every QuantLinear runs under change(its recipe)."""
    return replaced(model, {name: change(layer.recipe) for name, layer in quant_linears(model).items()})


def unquantized(model: nn.Module) -> AbstractContextManager[None]:
    """Within it every layer multiplies in BF16, as the `bf16` recipe does: to report what quantization costs."""
    return changed(model, lambda recipe: recipe.plain())


def _check_shape(entry: Entry) -> None:
    """Raise ValueError where a recipe's blocks, say, don't divide the features of a layer."""
    sizes = dict(zip(("out_features", "in_features"), entry.shape, strict=True))
    for divisor in entry.recipe.divisors():
        features = sizes.get(divisor.size, 0)
        if features % divisor.number:
            raise ValueError(
                f"{entry.name}: {features} features are no multiple of {divisor.number} ({divisor.what}); keep "
                f"it in BF16 with quant.rules='[{{match: {entry.name}, recipe: bf16}}]'"
            )


def _numbers(entries: list[Entry]) -> str:
    """Block numbers of the entries, runs as "0-5"."""
    runs: list[list[int]] = []
    for number in sorted(int(found[1]) for entry in entries if (found := BLOCK.search(entry.name))):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _block_numbers(names: list[str]) -> dict[str, int]:
    return {name: int(found[1]) for name in names if (found := BLOCK.search(name))}


def _end_blocks(names: list[str], precision: Precision, blocks: int) -> list[str]:
    first, last = precision.high_precision_first, precision.high_precision_last
    if first + last > blocks:
        raise ValueError(f"quant.high_precision: first={first} and last={last} of a model with {blocks} blocks")
    return [name for name, number in _block_numbers(names).items() if number < first or number >= blocks - last]


def _label(precision: Precision) -> str:
    """The recipe's label, plus what rules and BF16 blocks change."""
    ends = {"first": precision.high_precision_first, "last": precision.high_precision_last}
    parts = [library.label(precision.recipe)]
    parts += [f"{rule.match}={library.label(rule.recipe)}" for rule in precision.rules]
    return " ".join(parts + [f"{end}{count}=bf16" for end, count in ends.items() if count])
