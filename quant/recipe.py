"""A recipe: how the operands of a linear layer's three GEMMs are quantized. Frozen plain data, built from a mapping.

The GEMMs and their operands: quant/names.py. What a recipe computes: quant/slots.py.
Source: docs/concepts.md#three-gemms-six-slots.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from base.words import suggestion
from kernels.rotation import ROUNDS
from kernels.spec import (
    BF16_BITS,
    NO_QUANT,
    ROTATION_DIMS,
    SPEC_FIELDS,
    QuantSpec,
    default_limits,
    default_scales,
    frozen,
    read_level,
)
from quant.names import FPROP_SLOT, GEMMS, OPERANDS, SLOTS
from quant.slots import Slots

SOURCES = ("input", "fprop", "fprop_transposed")
SIGNS = ("random", "fixed", "none")


@dataclass(frozen=True)
class Rotation:
    """The random Hadamard transform of both operands of a GEMM along the contraction; dim None: no rotation.

    signs: random (fresh per step and micro-batch), fixed (one vector for ever), none (all +1). rounds: 1, 2, 3, or
    auto: two where blocks with few large elements hold much of an operand, else one (kernels/rotation.py).
    """

    dim: int | None = None
    rounds: int | str = 1
    signs: str = "random"

    def __post_init__(self):
        if self.dim is not None and (type(self.dim) is not int or self.dim not in ROTATION_DIMS):
            raise ValueError(f"rotation.dim={self.dim!r}; use null or one of {', '.join(map(str, ROTATION_DIMS))}")
        if self.signs not in SIGNS:
            raise ValueError(f"rotation.signs={self.signs!r}; use one of {', '.join(SIGNS)}")
        if type(self.rounds) not in (int, str) or self.rounds not in ROUNDS:
            raise ValueError(f"rotation.rounds={self.rounds!r}; use one of {', '.join(map(str, ROUNDS))}")
        if self.rounds != 1 and self.signs == "none":
            raise ValueError(
                f"rotation.rounds={self.rounds} with rotation.signs=none: two rounds without signs undo each other; "
                "use rotation.signs=random"
            )


@dataclass(frozen=True)
class Operand:
    """One slot: its quantizer, where its tensor comes from, and how its amax is found: "exact" or a fixed value.

    A fixed value is compared with what is quantized: behind a rotation with the rotated, unnormalised tensor, whose
    elements are sqrt(dim) times larger for each round.
    """

    spec: QuantSpec
    source: str = "input"
    amax: str | float = "exact"

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"source={self.source!r} is unknown; use one of {', '.join(SOURCES)}")
        if not (self.amax == "exact" or (isinstance(self.amax, float) and 0 < self.amax < math.inf)):
            raise ValueError(f"amax={self.amax!r}: use exact, or a positive number (delayed amax is not built)")

    @property
    def is_quantized(self) -> bool:
        return self.spec.grid != "none"


@dataclass(frozen=True)
class Gemm:
    """One product: its two operands in slot order and the rotation that both share."""

    rotation: Rotation
    operands: tuple[Operand, Operand]

    @property
    def is_quantized(self) -> bool:
        return any(operand.is_quantized for operand in self.operands)

    @property
    def unquantized(self) -> "Gemm":
        """Both operands as they come, from the sources that they have."""
        return Gemm(Rotation(), tuple(Operand(NO_QUANT, operand.source) for operand in self.operands))

    @property
    def rotation_dim(self) -> int | None:
        """dim of the rotation that runs: none where neither operand is quantized."""
        return self.rotation.dim if self.is_quantized else None

    @property
    def alpha(self) -> float:
        """What undoes the unnormalised rotation, on the accumulator: 1/dim for each round; `auto` counts as two."""
        rounds = 2 if self.rotation.rounds == "auto" else self.rotation.rounds
        return 1.0 / self.rotation_dim**rounds if self.rotation_dim else 1.0


@dataclass(frozen=True)
class Recipe(Slots):
    """The six slots. Raises ValueError for combinations that would compute something else than they say."""

    name: str
    fprop: Gemm
    dgrad: Gemm
    wgrad: Gemm

    def __post_init__(self):
        for slot in SLOTS:
            try:
                _check_slot(self, slot)
            except ValueError as error:
                raise ValueError(f"recipe {self.name}: {slot}: {error}") from None

    def gemm(self, name: str) -> Gemm:
        return getattr(self, name)

    def operand(self, slot: str) -> Operand:
        """The operand of a slot such as "dgrad.w"."""
        gemm, name = slot.split(".")
        return self.gemm(gemm).operands[OPERANDS[gemm].index(name)]

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "Recipe":
        """Build a recipe from `{name, fprop: {rotation, x, w}, dgrad: {...}, wgrad: {...}}`.

        A GEMM may be the string "none": both grids are none and each `source` is "input".
        Fields left out have their defaults, but operands and their `grid` can't be: BF16 is said, not assumed. Raises
        ValueError that names the nearest known key or the allowed values.
        """
        _check_keys(mapping, ("name", *GEMMS), "quant")
        gemms = {}
        for gemm in GEMMS:
            if gemm not in mapping:
                raise ValueError(f"quant.{gemm} is missing; give {{rotation, {', '.join(OPERANDS[gemm])}}} or none")
            gemms[gemm] = _gemm_from(mapping[gemm], gemm)
        name = mapping.get("name", "unnamed")
        if type(name) not in (str, int):
            raise ValueError(f"quant.name={name!r}: give a word")
        return cls(str(name), **gemms)

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides the numerics, resolved (target_max and scale_cap as numbers), JSON-able."""
        out: dict[str, Any] = {"name": self.name}
        for gemm in GEMMS:
            out[gemm] = {"rotation": asdict(self.gemm(gemm).rotation)}
            for name, operand in zip(OPERANDS[gemm], self.gemm(gemm).operands, strict=True):
                out[gemm][name] = operand.spec.to_dict() | {"amax": operand.amax, "source": operand.source}
        return out


def _gemm_from(mapping: Any, gemm: str) -> Gemm:
    if mapping == "none":
        return Gemm(Rotation(), (Operand(NO_QUANT),) * 2)
    if not isinstance(mapping, Mapping):
        raise ValueError(f"quant.{gemm}={mapping!r}: give a mapping, or none")
    _check_keys(mapping, ("rotation", *OPERANDS[gemm]), f"quant.{gemm}")
    rotation = mapping_at(f"quant.{gemm}.rotation", mapping.get("rotation"))
    _check_keys(rotation, [field.name for field in fields(Rotation)], f"quant.{gemm}.rotation")
    try:
        turned = Rotation(**rotation)
    except ValueError as error:
        raise ValueError(f"quant.{gemm}.{error}") from None
    for name in OPERANDS[gemm]:
        if name not in mapping:
            raise ValueError(f"quant.{gemm}.{name} is missing; give {{grid: ...}}, or {{grid: none}} for BF16")
    operands = (_operand_from(mapping[name], f"quant.{gemm}.{name}") for name in OPERANDS[gemm])
    return Gemm(turned, tuple(operands))


def _operand_from(mapping: Any, path: str) -> Operand:
    values = dict(mapping_at(path, mapping))
    _check_keys(values, (*SPEC_FIELDS, "amax", "source"), path)
    if "grid" not in values:
        raise ValueError(f"{path}.grid is missing; give e2m1, e4m3, e5m2, or none for BF16")
    try:
        for name in {"target_max", "scale_cap", "prescale"} & values.keys():
            values[name] = _number(values[name])
        grid = values["grid"] = _grid(values["grid"])
        levels = values.get("scales")
        if not isinstance(levels, list | tuple | None):
            raise ValueError(f"scales={levels!r}: give a list, such as '[tensor fp32,1x16 e4m3]'")
        default = default_scales(grid) if isinstance(grid, str | tuple) else ()
        values["scales"] = default if levels is None else tuple(map(read_level, levels))
        if "search" in values:
            values["search"] = frozen(values["search"])
        amax, source = values.pop("amax", "exact"), values.pop("source", "input")
        return Operand(QuantSpec.resolve(**values), source, float(amax) if type(amax) is int else amax)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _grid(given: Any) -> Any:
    """A name as it is; one table of numbers or a list of tables as tuples of floats."""
    if not isinstance(given, list | tuple) or all(isinstance(word, str) for word in given):
        return given
    tables = given if given and all(isinstance(table, list | tuple) for table in given) else [given]
    numbers = all(type(level) in (int, float) and math.isfinite(level) for table in tables for level in table)
    if not numbers:
        raise ValueError(f"grid={given!r}: give a name, 16 numbers, or a list of such lists")
    return tuple(tuple(map(float, table)) for table in tables)


def _number(value: Any) -> Any:
    """A whole number or one that YAML takes for text (1e-3) as float; anything else as it is, to be refused by name."""
    try:
        return float(value) if type(value) in (int, str) else value
    except ValueError:
        return value


def mapping_at(path: str, value: Any) -> Mapping[str, Any]:
    """`value`, {} for null; ValueError for anything but a mapping."""
    if not isinstance(value, Mapping | None):
        last = path.rsplit(".", 1)[-1]
        raise ValueError(
            f"{path}={value!r} must be a mapping: in a file {last}: {{<field>: <value>}}, else {path}.<field>=<value>"
        )
    return {} if value is None else value


def _check_keys(mapping: Mapping[str, Any], known: Any, path: str) -> None:
    for key in mapping:
        if key not in known:
            near = suggestion(key, known, f"known: {', '.join(known)}")
            raise ValueError(f"{path}: unknown field {key!r}{near}")


def _check_slot(recipe: Recipe, slot: str) -> None:
    """What a slot's own fields can't tell: what it asks of the rotation and of fprop."""
    gemm = recipe.gemm(slot.split(".")[0])
    operand = recipe.operand(slot)
    spec = operand.spec
    if spec.significant_bits > BF16_BITS:
        raise ValueError(
            f"grid={spec.label} under {spec.scales[-1]} has values of {spec.significant_bits} significant bits, "
            f"and BF16 holds {BF16_BITS}: FP32 operands are not built for training; choose levels of fewer bits"
        )
    if spec.is_blocked and not spec.scaling.has_tensor_scale and operand.amax != "exact":
        scales = ", ".join(map(str, spec.scales))
        raise ValueError(f"amax={operand.amax}: scales [{scales}] don't depend on it; leave it out")
    if spec.rounding == "ms_eden" and (gemm.rotation.dim is None or gemm.rotation.signs == "none"):
        raise ValueError(
            "rounding=ms_eden is unbiased only behind a random rotation; set its GEMM's rotation.dim, say 128, and "
            "rotation.signs=random"
        )
    if gemm.rotation.rounds == "auto" and gemm.rotation.dim is not None:
        _check_auto(operand, slot)
    if spec.is_square and gemm.rotation.dim is not None and operand.source != "fprop_transposed":
        raise ValueError(
            "16x16 blocks can't be rotated along one axis; use scales [tensor fp32, 1x16 e4m3] here, or set its GEMM's "
            "rotation.dim=null"
        )
    if operand.source == "input":
        return
    if slot not in FPROP_SLOT:
        raise ValueError(f"source={operand.source}: only {' and '.join(FPROP_SLOT)} can reuse what fprop made")
    used = recipe.operand(f"fprop.{FPROP_SLOT[slot]}").spec
    if used.grid != "none" and recipe.fprop.rotation.dim is not None:
        raise ValueError(f"source={operand.source}: fprop's operand is rotated along its own contraction; use input")
    unscaled = used.grid != "none" and not (used.is_blocked and not used.scaling.has_tensor_scale)
    if spec.is_blocked and spec.scaling.is_narrow and unscaled:
        raise ValueError(
            f"source={operand.source}: codes of fprop without their tensor scale are beyond scales [{spec.scales[0]}, "
            "...], which have none; use input"
        )
    if used.per_row:
        raise ValueError(f"source={operand.source}: fprop's operand has a scale per row of the other axis; use input")
    if operand.source == "fprop_transposed" and operand.is_quantized:
        if gemm.rotation.dim is not None:
            raise ValueError(
                "source=fprop_transposed reuses fprop's codes, which are not rotated; set rotation.dim=null"
            )
        _check_reused(operand, recipe.operand(f"fprop.{FPROP_SLOT[slot]}"), slot)


def _check_auto(operand: Operand, slot: str) -> None:
    """Whether a second round is needed is known when both operands are there, and their sizes with it."""
    if operand.amax != "exact":
        raise ValueError(
            f"amax={operand.amax} and rotation.rounds=auto: how large rotated elements are is not fixed; use 2"
        )
    if slot == "wgrad.x" and operand.source == "input" and operand.is_quantized:
        raise ValueError(
            "rotation.rounds=auto looks at dY and X together, but this X is quantized in the forward; set source=fprop "
            "here, or rotation.rounds=2"
        )


def _check_reused(operand: Operand, made: Operand, slot: str) -> None:
    """A slot that reuses the codes of `made` says of them what is true, or leaves it at the default."""
    spec, used, origin = operand.spec, made.spec, f"quant.fprop.{FPROP_SLOT[slot]}"
    if used.grid == "none":
        raise ValueError(
            f"source=fprop_transposed, but {origin.removeprefix('quant.')}.grid=none; set quant.{slot}.source=input"
        )
    if (used.grid, used.scales) != (spec.grid, spec.scales) or not (used.is_square or not used.is_blocked):
        raise ValueError("source=fprop_transposed reuses fprop's codes: it needs fprop's grid and scales, 16x16 blocks")
    if spec.rounding != used.rounding:
        raise ValueError(f"rounding={spec.rounding} can't act on fprop's codes as they are; use source=input or fprop")
    target_max, scale_cap = default_limits(spec.grid, spec.scales, spec.select, spec.rounding)
    for field, here, there, default in (
        ("select", spec.select, used.select, "absmax"),
        ("target_max", spec.target_max, used.target_max, target_max),
        ("scale_cap", spec.scale_cap, used.scale_cap, scale_cap),
        ("tensor_scale", spec.tensor_scale, used.tensor_scale, "fp32"),
        ("random_bits", spec.random_bits, used.random_bits, 24),
        ("amax", operand.amax, made.amax, "exact"),
    ):
        if here not in (there, default):
            raise ValueError(f"{field}={here} can't act on fprop's codes as they are; set {origin}.{field}")
