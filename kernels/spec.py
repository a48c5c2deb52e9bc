"""What one operand's quantizer does, as frozen plain data: hashable, comparable, JSON-able through `to_dict`.

A quantizer of blocks is four choices (kernels/formats):
    scaling      how a block's scale is wanted and rounded (scales.py), from `scales`
    candidates   which levels compete for the block, and with which target (grids.py, selects.py), from `grid`, `select`
    rounding     to nearest, or stochastic
    correction   none, or MS-EDEN's of the block's scale
Scale chain of NVFP4, outer to inner (docs/numerics.md), with v = target_max and C = scale_cap:
    T   = amax / (C * v)                    FP32, one for the tensor
    s_g = RNE_e4m3( max_g|x| / (v * T) )    one for each block; 0 is stored as 1 and the block's codes are 0
    q   = round_e2m1( x / (s_g * T) )       the code; the value is q * s_g * T
FP8 has the outer level only: scale = amax / v, code = round(x / scale).
"""

import json
import math
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from kernels.formats.grids import E2M1_FAMILY, FAMILIES, Family, family_of, significant_bits
from kernels.formats.minifloat import E4M3_MAX, E5M2_MAX
from kernels.formats.scales import E4M3Blocks, HiFloat4, PowersOfTwo, Scaling, UE5M3Blocks
from kernels.formats.selects import Candidate, candidates, default_cap, default_target

TENSOR = "tensor"
ROW = "row"
NVFP4_BLOCK = 16
GEMMS = ("fprop", "dgrad", "wgrad")  # of a linear layer
ROTATION_DIMS = (16, 32, 64, 128)

NO_CLIP_MAX = default_target(E2M1_FAMILY, "sr")  # of E2M1: 6 * 16/17
FP8_MAX = {"e4m3": E4M3_MAX, "e5m2": E5M2_MAX}
GRIDS = ("none", *FP8_MAX, *FAMILIES)
SELECTS = ("absmax", "four_over_six", "search")
ROUNDINGS = ("rtn", "sr", "ms_eden")
EDEN_BLOCKS = (16, "rotation")
EDEN_SPACES = ("tensor", "scaled")
TENSOR_SCALES = ("fp32", "pow2")
SCALE_RULES = ("floor", "even", "ceil", "rms")
RANDOM_BITS = (24, 8)
BF16_BITS = 8  # of a significand
SEARCH_REACH = 8  # E4M3 steps: a factor of two
MACRO_BLOCK = 128

Tables = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ScaleLevel:
    """One level of scales: a block ("tensor", "row" along the contraction, or (rows, columns)) and a format."""

    block: str | tuple[int, int]
    format: str

    def __str__(self) -> str:
        """As recipe files write it: "tensor fp32", "1x16 e4m3"."""
        return f"{self.block if isinstance(self.block, str) else 'x'.join(map(str, self.block))} {self.format}"


TENSOR_FP32 = ScaleLevel(TENSOR, "fp32")
ROW_FP32 = ScaleLevel(ROW, "fp32")
NVFP4_SCALES = (TENSOR_FP32, ScaleLevel((1, NVFP4_BLOCK), "e4m3"))
NVFP4_SQUARE_SCALES = (TENSOR_FP32, ScaleLevel((NVFP4_BLOCK, NVFP4_BLOCK), "e4m3"))
UE5M3_SCALES = (ScaleLevel((1, 16), "ue5m3"),)
MXFP4_SCALES = (ScaleLevel((1, 32), "e8m0"),)
HIF4_SCALES = (ScaleLevel((1, 64), "e6m2"), ScaleLevel((1, 8), "e1"), ScaleLevel((1, 4), "e1"))
FP8_SCALES = ((TENSOR_FP32,), (ROW_FP32,))
SCALINGS: dict[tuple[ScaleLevel, ...], Scaling] = {
    NVFP4_SCALES: E4M3Blocks(),
    NVFP4_SQUARE_SCALES: E4M3Blocks(rows=NVFP4_BLOCK, bits=8 / NVFP4_BLOCK**2),
    (TENSOR_FP32, *UE5M3_SCALES): UE5M3Blocks(has_tensor_scale=True),
    UE5M3_SCALES: UE5M3Blocks(is_narrow=True),
    MXFP4_SCALES: PowersOfTwo(),
    HIF4_SCALES: HiFloat4(),
}


def default_scales(grid: str | Tables) -> tuple[ScaleLevel, ...]:
    """What `scales` are where a recipe leaves them out."""
    if grid in FP8_MAX:
        return (TENSOR_FP32,)
    return {"none": (), "hif4": HIF4_SCALES}.get(grid, NVFP4_SCALES)


def read_level(text: str) -> ScaleLevel:
    """ "tensor fp32", "row fp32", "1x16 e4m3", "16x16 e4m3" -> ScaleLevel; str() writes it again."""
    block, _, number_format = str(text).partition(" ")
    rows, _, columns = block.partition("x")
    if rows.isdigit() and columns.isdigit():
        return ScaleLevel((int(rows), int(columns)), number_format)
    if block not in (TENSOR, ROW) or not number_format:
        raise ValueError(f"scale level {text!r}; write 'tensor fp32', 'row fp32', '1x16 e4m3' or '16x16 e4m3'")
    return ScaleLevel(block, number_format)


@dataclass(frozen=True)
class QuantSpec:
    """A resolved quantizer. Build it with `QuantSpec.resolve`, which checks it and fills target_max and scale_cap.

    grid: none, e4m3, e5m2, a family of kernels/formats/grids.py, or the levels of one to four tables.
    scales: levels from outer to inner. select: absmax | four_over_six | search. rounding: rtn | sr | ms_eden.
    eden_block: elements that share one MS-EDEN correction, 16 or the rotation block.
    eden_space: "tensor" weighs each group by its scale squared, which is what Algorithm 1 minimises; "scaled" sums
    the groups unweighted, as upstream's emulation does (biased by 6e-4).
    tensor_scale: fp32 | pow2 (rounded up to a power of two, so that a library GEMM rounds only once).
    search: (first, last) E4M3 step of select=search. Of MXFP4: scale_rule floor | even | ceil | rms; prescale, a factor
    on what is quantized, undone on the product; macro_bits, of a factor for each 128 elements (scales.PowersOfTwo).
    random_bits: an element's in sr, 24 or 8 (philox.random24).
    """

    grid: str | Tables
    scales: tuple[ScaleLevel, ...] = ()
    select: str = "absmax"
    rounding: str = "rtn"
    eden_block: int | str = 16
    eden_space: str = "tensor"
    scale_rounding: str = "rtn"
    target_max: float = 1.0
    scale_cap: float = 1.0
    tensor_scale: str = "fp32"
    search: tuple[int, int] = (-1, 5)
    scale_rule: str = "floor"
    prescale: float = 1.0
    macro_bits: int | None = None
    random_bits: int = 24
    # What follows from the fields, found once: torch.compile then meets constants.
    family: Family | None = field(init=False, compare=False, repr=False, default=None)
    scaling: Scaling | None = field(init=False, compare=False, repr=False, default=None)
    candidates: tuple[Candidate, ...] = field(init=False, compare=False, repr=False, default=())
    key: str = field(init=False, compare=False, repr=False, default="")

    def __post_init__(self):
        if self.scales in SCALINGS:
            family = family_of(self.grid)
            found = {"family": family, "scaling": scaling_of(self.scales, self.scale_rule, self.macro_bits)}
            found["candidates"] = candidates(self.select, family, self.search)
        else:
            found = {}
        for name, value in found.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "key", json.dumps(self.to_dict()))

    @property
    def label(self) -> str:
        """The grid in a word."""
        return self.family.name if self.is_blocked else self.grid

    @property
    def is_blocked(self) -> bool:
        """Whether blocks have scales of their own; such a quantizer has a packed form of 4-bit codes."""
        return self.scaling is not None

    @property
    def is_square(self) -> bool:
        """One scale for 16x16 tiles: the transposed operand has the same codes."""
        return self.scales == NVFP4_SQUARE_SCALES

    @property
    def per_row(self) -> bool:
        return len(self.scales) > 0 and self.scales[0].block == ROW

    @property
    def draws_random_bits(self) -> bool:
        return self.rounding != "rtn"

    @property
    def tensor_core(self) -> bool:
        """Whether Blackwell's NVFP4 tensor cores multiply its codes: E2M1 under E4M3 scales."""
        return self.grid == "e2m1" and isinstance(self.scaling, E4M3Blocks)

    @property
    def multiple(self) -> int:
        """What must divide the contraction."""
        return self.scaling.multiple if self.is_blocked else 1

    @property
    def rows(self) -> int:
        """What must divide the other dimension."""
        return self.scaling.rows if self.is_blocked else 1

    @property
    def bits(self) -> float:
        """Stored bits a value."""
        if self.grid in FP8_MAX:
            return 8.0
        if not self.is_blocked:
            return 16.0
        named = 2.0 / (NVFP4_BLOCK * self.rows) if len(self.family.members) > 2 else 0.0
        return 4.0 + self.scaling.bits + named

    @property
    def significant_bits(self) -> int:
        """Of the widest value, level times block scale: BF16 holds 8, so more would need an FP32 GEMM."""
        if not self.is_blocked:
            return BF16_BITS
        levels = tuple(level for grid in self.family.members for level in grid.levels)
        return significant_bits(levels, self.scaling.significands)

    @property
    def rounds_every_candidate(self) -> bool:
        """Of one grid with SR: each candidate rounds by words of its own. With several candidates (4/6) the choice then
        sees random bits and is biased: kept as the example of it. Families choose by rounding to nearest first."""
        return self.rounding == "sr" and len(self.family.members) == 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, part of a run's hash. The rule: fields of the first version are always there, later ones only
        where they are not at their default, so that every kept run keeps its hash."""
        later = {name: getattr(self, name) for name, usual in LATER_FIELDS.items() if getattr(self, name) != usual}
        out = {name: getattr(self, name) for name in FIRST_FIELDS} | later
        tables = {} if isinstance(self.grid, str) else {"grid": [list(table) for table in self.grid]}
        return out | tables | {"scales": list(map(str, self.scales))}

    @classmethod
    def resolve(
        cls,
        grid: str | Tables,
        scales: tuple[ScaleLevel, ...] = (),
        select: str = "absmax",
        rounding: str = "rtn",
        eden_block: int | str = 16,
        eden_space: str = "tensor",
        scale_rounding: str = "rtn",
        target_max: float | None = None,
        scale_cap: float | None = None,
        tensor_scale: str = "fp32",
        search: tuple[int, int] = (-1, 5),
        scale_rule: str = "floor",
        prescale: float = 1.0,
        macro_bits: int | None = None,
        random_bits: int = 24,
    ) -> "QuantSpec":
        """The spec with target_max and scale_cap where they are None (docs/numerics.md, limits).

        Raises ValueError for an unknown value, and for a combination that has no limits unless both numbers are given:
        such a quantizer is biased (4/6 with SR) or unmeasured, never silently so.
        """
        for name, value, allowed in (
            ("select", select, SELECTS),
            ("rounding", rounding, ROUNDINGS),
            ("eden_block", eden_block, EDEN_BLOCKS),
            ("eden_space", eden_space, EDEN_SPACES),
            ("scale_rounding", scale_rounding, ("rtn",)),
            ("tensor_scale", tensor_scale, TENSOR_SCALES),
            ("scale_rule", scale_rule, SCALE_RULES),
            ("random_bits", random_bits, RANDOM_BITS),
        ):
            _check_word(name, value, allowed)
        if not isinstance(grid, tuple):
            _check_word("grid", grid, GRIDS)
        if grid == "none":
            return NO_QUANT
        later = search, scale_rule, prescale, macro_bits
        _check_numbers(target_max, scale_cap)
        if random_bits != LATER_FIELDS["random_bits"] and rounding != "sr":
            raise ValueError(f"random_bits={random_bits} is for rounding=sr; got rounding={rounding}: leave it out")
        if grid in FP8_MAX:
            limits = _fp8_limits(grid, scales, select, rounding, target_max, scale_cap)
        else:
            _check_blocks(grid, scales, select, rounding, eden_space, tensor_scale, *later)
            limits = _block_limits(grid, scales, select, rounding, target_max, scale_cap)
        if later != tuple(LATER_FIELDS.values())[: len(later)]:
            _check_later(grid, scales, select, rounding, *later)
        if eden_space == "scaled" and eden_block != "rotation":
            raise ValueError("eden_space=scaled is upstream's sum over a rotation block; set eden_block=rotation")
        chosen = select, rounding, eden_block, eden_space, scale_rounding
        return cls(grid, scales, *chosen, *limits, tensor_scale, *later, random_bits)


_SPEC_FIELDS = {f.name: f.default for f in fields(QuantSpec) if f.init}
FIRST_FIELDS = tuple(_SPEC_FIELDS)[:10]
LATER_FIELDS = {name: usual for name, usual in _SPEC_FIELDS.items() if name not in FIRST_FIELDS}
SPEC_FIELDS = (*FIRST_FIELDS, *LATER_FIELDS)
NO_QUANT = QuantSpec("none")


@lru_cache
def from_key(key: str) -> QuantSpec:
    """The spec whose `key` this is: how one crosses the border of a torch operator, as a string."""
    values = json.loads(key)
    values["scales"] = tuple(map(read_level, values["scales"]))
    return QuantSpec(**{name: frozen(value) for name, value in values.items()})


def frozen(value: Any) -> Any:
    """Lists as tuples, also within lists."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def scaling_of(scales: tuple[ScaleLevel, ...], rule: str, macro_bits: int | None) -> Scaling:
    """The scaling of a recipe's `scales`; MXFP4's with its own fields."""
    scaling = SCALINGS[scales]
    if not isinstance(scaling, PowersOfTwo):
        return scaling
    if macro_bits is None:
        return replace(scaling, rule=rule)
    significands = range(2**macro_bits, 2 ** (macro_bits + 1))
    macro = {"multiple": MACRO_BLOCK, "bits": scaling.bits + 8 / MACRO_BLOCK, "significands": significands}
    return replace(scaling, rule=rule, macro_bits=macro_bits, **macro)


def default_limits(
    grid: str | Tables, scales: tuple[ScaleLevel, ...], select: str, rounding: str
) -> tuple[float | None, float | None]:
    """(target_max, scale_cap) where a recipe leaves them null; None for a combination that has none.

    target_max: the level that the largest element is scaled to; scale_cap: the block scale that it then has, 1 where no
    scale of the tensor lies over the blocks'."""
    if grid in FP8_MAX:
        return FP8_MAX[grid], 1.0
    if scales not in SCALINGS:
        return None, None
    family = family_of(grid)
    cap = default_cap(family, select, rounding)
    if cap is None:
        return None, None
    return default_target(family, rounding), cap if SCALINGS[scales].has_tensor_scale else 1.0


def _check_word(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed or type(value) not in map(type, allowed):  # 16.0 is another numerics hash
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(str, allowed))}")


def _check_numbers(target_max: float | None, scale_cap: float | None) -> None:
    for name, value in (("target_max", target_max), ("scale_cap", scale_cap)):
        if value is not None and not (type(value) in (int, float) and 0 < value < math.inf):
            raise ValueError(f"{name}={value!r} must be a positive number (leave it null for the usual one)")


def _fp8_limits(
    grid: str,
    scales: tuple[ScaleLevel, ...],
    select: str,
    rounding: str,
    target_max: float | None,
    scale_cap: float | None,
) -> tuple[float, float]:
    if scales not in FP8_SCALES or (select, rounding) != ("absmax", "rtn"):
        raise ValueError(
            f"grid={grid} takes select=absmax, rounding=rtn and one fp32 scale per tensor or per row; "
            f"got select={select}, rounding={rounding}, scales=[{_written(scales)}]"
        )
    if (target_max or 0) > FP8_MAX[grid] or scale_cap not in (None, 1.0):
        raise ValueError(
            f"grid={grid} has no block scales to cap and ends at {FP8_MAX[grid]:g}: leave target_max and scale_cap "
            f"out, or choose a smaller target_max; got target_max={target_max}, scale_cap={scale_cap}"
        )
    return target_max or FP8_MAX[grid], 1.0


def _check_blocks(
    grid: str | Tables, scales: tuple[ScaleLevel, ...], select: str, rounding: str, eden_space: str, tensor_scale: str,
    search: tuple[int, int], scale_rule: str, prescale: float, macro_bits: int | None,
) -> None:  # fmt: skip
    """Which scales a grid takes, and what they allow."""
    family, scaling = family_of(grid), SCALINGS.get(scales)
    named = f"grid={family.name}"
    if (family.name == "hif4") != isinstance(scaling, HiFloat4):
        need = _written(HIF4_SCALES) if family.name == "hif4" else "tensor fp32, 1x16 e4m3] or [tensor fp32, 16x16 e4m3"
        raise ValueError(f"{named} takes scales [{need}]; got [{_written(scales)}]")
    if scaling is None:
        raise ValueError(
            f"{named} takes scales [tensor fp32, 1x16 e4m3] or [tensor fp32, 16x16 e4m3]"
            f"{', or [1x32 e8m0], [1x16 ue5m3]' if grid == 'e2m1' else ''}; got [{_written(scales)}]"
        )
    if not isinstance(scaling, E4M3Blocks | HiFloat4) and grid != "e2m1":
        raise ValueError(f"scales=[{_written(scales)}] are built for grid=e2m1; {named} needs [tensor fp32, 1x16 e4m3]")
    if tensor_scale != "fp32" and not scaling.has_tensor_scale:
        raise ValueError(f"tensor_scale={tensor_scale}: scales [{_written(scales)}] have none over them; leave it out")
    if rounding == "ms_eden" and not scaling.corrected:
        raise ValueError(
            f"rounding=ms_eden corrects E4M3 scales; [{_written(scales)}] can't carry a correction: use "
            f"{'rtn' if isinstance(scaling, HiFloat4) else 'rtn or sr'}"
        )
    if rounding == "ms_eden" and scaling.rows > 1:
        raise ValueError(
            "rounding=ms_eden corrects groups of 16 along the contraction, not 16x16 blocks; use scales [tensor fp32, "
            "1x16 e4m3]"
        )
    if eden_space == "scaled" and grid != "e2m1":
        raise ValueError("eden_space=scaled is upstream's for grid=e2m1; use eden_space=tensor")
    if isinstance(scaling, HiFloat4) and (select, rounding) != ("absmax", "rtn"):
        raise ValueError(f"grid=hif4 takes select=absmax and rounding=rtn; got select={select}, rounding={rounding}")
    if select == "search" and isinstance(scaling, UE5M3Blocks):
        raise ValueError(
            f"select=search steps from one E4M3 scale to the next; [{_written(scales)}] are none: use scales [tensor "
            "fp32, 1x16 e4m3], or select=absmax or four_over_six"
        )
    if isinstance(scaling, PowersOfTwo):
        if select != "absmax":
            raise ValueError(f"select={select} needs E4M3 scales; with [1x32 e8m0] use select=absmax")
        if rounding == "sr" and scale_rule != "ceil" and prescale == 1.0:
            raise ValueError(
                f"rounding=sr with scale_rule={scale_rule} clips, which moves the mean; set scale_rule=ceil or "
                "prescale=0.75"
            )


def _check_later(
    grid: str | Tables, scales: tuple[ScaleLevel, ...], select: str, rounding: str, search: tuple[int, int],
    scale_rule: str, prescale: float, macro_bits: int | None,
) -> None:  # fmt: skip
    """Fields that only some quantizers have."""
    if search != LATER_FIELDS["search"]:
        if select != "search":
            raise ValueError(
                f"search={list(search)} is for select=search; got select={select}: set that, or leave search out"
            )
        whole = len(search) == 2 and all(type(step) is int for step in search)
        if not whole or not -SEARCH_REACH <= search[0] <= 0 <= search[1] <= SEARCH_REACH:
            raise ValueError(
                f"search={list(search)}: give the first and the last step, [-1, 5] say, 0 among them and none beyond "
                f"{SEARCH_REACH}"
            )
    mxfp4 = {"scale_rule": scale_rule, "prescale": prescale, "macro_bits": macro_bits}
    changed = [name for name, value in mxfp4.items() if value != LATER_FIELDS[name]]
    if changed and scales != MXFP4_SCALES:
        raise ValueError(
            f"{changed[0]}={mxfp4[changed[0]]} is for scales [1x32 e8m0]; got [{_written(scales)}]: use those, or "
            f"leave {changed[0]} out"
        )
    if prescale not in (0.75, 1.0) or type(prescale) is not float:
        raise ValueError(f"prescale={prescale!r}: use 0.75, which no element clips under floor scales, or 1.0")
    if macro_bits is not None and (type(macro_bits) is not int or not 1 <= macro_bits <= 8):
        raise ValueError(f"macro_bits={macro_bits!r}: give 1 to 8, or null for no macro block (5 is the most in BF16)")
    if scale_rule == "rms" and (rounding != "rtn" or prescale != 1.0):
        raise ValueError(
            f"scale_rule=rms clips on purpose, which is for rounding=rtn and prescale=1.0; got rounding={rounding} and "
            f"prescale={prescale}: use scale_rule=floor with prescale=0.75 for sr"
        )
    if macro_bits is not None and scale_rule != "ceil":
        raise ValueError(f"macro_bits={macro_bits} needs scale_rule=ceil; got scale_rule={scale_rule}")


def _block_limits(
    grid: str | Tables, scales: tuple[ScaleLevel, ...], select: str, rounding: str,
    target_max: float | None, scale_cap: float | None,
) -> tuple[float, float]:  # fmt: skip
    """(target_max, scale_cap), or ValueError where the combination has none."""
    target, cap = default_limits(grid, scales, select, rounding)
    if not SCALINGS[scales].has_tensor_scale and (target_max, scale_cap) not in ((None, None), (target, cap)):
        raise ValueError(
            f"scales [{_written(scales)}] have no tensor scale to lay out: leave target_max and scale_cap out"
        )
    if scale_cap is not None and scale_cap > E4M3_MAX:
        raise ValueError(
            f"scale_cap={scale_cap}: block scales are E4M3 and end at {E4M3_MAX:.0f}; use a number up to that"
        )
    family = family_of(grid)
    if select == "four_over_six" and not family.floats:
        raise ValueError(f"select=four_over_six fits E2M1 levels; grid={family.name} has none: use select=absmax")
    if select == "search" and (grid, rounding) != ("e2m1", "rtn"):
        raise ValueError(
            f"select=search is for grid=e2m1, rounding=rtn; got grid={family.name}, rounding={rounding}: use absmax"
        )
    if target is None and (target_max is None or scale_cap is None):
        raise ValueError(
            f"select={select} with rounding={rounding} has no limits (a branch chosen after random rounding is "
            "biased): set select=absmax, or give both target_max and scale_cap to say that you mean it"
        )
    return target_max or target, scale_cap or cap


def _written(scales: tuple[ScaleLevel, ...]) -> str:
    return ", ".join(map(str, scales))
