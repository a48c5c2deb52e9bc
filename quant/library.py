"""The recipe files of configs/quant, read without Hydra: for tests, scripts, and rules that name another recipe."""

from typing import Any

from base.tree import flatten
from base.words import suggestion
from kernels.spec import LATER_FIELDS, SPEC_FIELDS, default_limits, default_scales, frozen, read_level
from quant import recipefile
from quant.names import GEMMS, OPERANDS, SLOTS
from quant.product import Product
from quant.products import PRODUCTS
from quant.recipe import Recipe
from quant.recipefile import names

# Keys of a recipe file that aren't the recipe's: of the precision plan (quant/plan.py), and the hooks around a step.
PLAN_KEYS = ("rules", "high_precision", "hooks", "phases")


def mapping(name: str) -> dict[str, Any]:
    """The file of recipe `name` as a plain mapping. Raises ValueError that names the nearest recipe, or file
    and line of a mistake in YAML."""
    known = names()
    if name not in known:
        near = suggestion(name, known, f"recipes: {', '.join(known)}")
        raise ValueError(f"no recipe {name!r} in configs/quant{near}")
    return recipefile.read(recipefile.FOLDER / f"{name}.yaml")


def load(name: str) -> Product:
    """Recipe `name` of configs/quant."""
    return build(mapping(name))


def build(values: dict[str, Any]) -> Product:
    """A recipe from a mapping in the form of a recipe file, possibly overridden; a GEMM may be "none".

    Raises ValueError for such a GEMM under a name that no file has: which sources it should keep is not known.
    """
    fields = {key: value for key, value in values.items() if key not in PLAN_KEYS}
    scheme = _product(str(fields["scheme"])) if "scheme" in fields else Recipe
    for gemm in GEMMS:
        if fields.get(gemm) == "none":
            fields[gemm] = _none(gemm, fields.get("name"))
    return scheme.from_dict(fields)


def _none(gemm: str, name: Any) -> dict[str, Any] | str:
    """Both operands of a GEMM unquantized, with their sources in the file of recipe `name`, if it has slots."""
    if name not in names():
        raise ValueError(
            f"quant.{gemm}=none keeps the sources of a recipe file, but there is no file {name!r}: "
            f"give both operands as {{grid: none, source: ...}}, or the name of a file"
        )
    operands = mapping(name).get(gemm)
    if operands is None:
        return "none"
    return {operand: {"grid": "none", "source": operands[operand].get("source", "input")} for operand in OPERANDS[gemm]}


def label(recipe: Product) -> str:
    """The recipe's name and each field that differs from its file: "quartet2 fprop.x.select=absmax"."""
    if recipe.label is not None:
        return recipe.label
    if recipe.name not in names():
        return recipe.name
    base, own = _all_fields(load(recipe.name)), _all_fields(recipe)
    expected = base | _what_follows(base, own)
    changed = {key: value for key, value in own.items() if expected.get(key) != value}
    for gemm in GEMMS:
        _drop_unquantized(changed, own, gemm)
    return " ".join([recipe.name, *(f"{key}={_short(value)}" for key, value in changed.items())])


def _all_fields(recipe: Recipe) -> dict[str, Any]:
    """{"fprop.x.grid": ...}: also the later fields, which `to_dict` leaves out at their defaults."""
    said = flatten(recipe.to_dict())
    usual = {f"{slot}.{name}": value for slot in SLOTS for name, value in LATER_FIELDS.items()}
    return said | {key: value for key, value in usual.items() if key not in said}


def _short(value: Any) -> str:
    return "+".join(map(_short, value)) if isinstance(value, list | tuple) else str(value)


def _what_follows(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Fields that other fields, changed from `base`, bring with them: limits, and scales from the grid."""
    follows: dict[str, Any] = {}
    for slot in SLOTS:
        decides = [f"{slot}.{field}" for field in ("grid", "scales", "select", "rounding")]
        grid, scales, select, rounding = (own[key] for key in decides)
        if any(own[key] != base[key] for key in decides):
            limits = default_limits(frozen(grid), tuple(map(read_level, scales)), select, rounding)
            follows |= dict(zip((f"{slot}.target_max", f"{slot}.scale_cap"), limits, strict=True))
        if grid != base[f"{slot}.grid"]:
            follows[f"{slot}.scales"] = list(map(str, default_scales(frozen(grid))))
    return follows


def _drop_unquantized(changed: dict[str, Any], own: dict[str, Any], gemm: str) -> None:
    """Leave out of `changed` what doesn't act: all but grid and source of an unquantized operand; a whole GEMM as
    "none"."""
    slots = [slot for slot in SLOTS if slot.startswith(gemm)]
    unquantized = [slot for slot in slots if own[f"{slot}.grid"] == "none"]
    for slot in unquantized:
        for name in SPEC_FIELDS[1:]:
            changed.pop(f"{slot}.{name}", None)
    if unquantized == slots and any(f"{slot}.grid" in changed for slot in slots):
        changed[gemm] = "none"
        for key in (f"{gemm}.rotation.dim", *(f"{slot}.grid" for slot in slots)):
            changed.pop(key, None)


def _product(scheme: str) -> Any:
    if scheme not in PRODUCTS:
        raise ValueError(f"quant.scheme={scheme!r} is unknown; schemes: {', '.join(PRODUCTS)}")
    return PRODUCTS[scheme]
