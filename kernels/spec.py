"""What one operand's quantizer does, as frozen plain data: no torch, hashable, comparable, JSON-able through `asdict`.

Scale chain of NVFP4, outer to inner (design.md 3, quartet2.md a.1), with v = target_max and C = scale_cap:
    T   = amax / (C * v)                    FP32, one for the tensor
    s_g = RNE_e4m3( max_g|x| / (v * T) )    one for each block; 0 is stored as 1 and the block's codes are 0
    q   = round_e2m1( x / (s_g * T) )       the code; the value is q * s_g * T
FP8 has the outer level only: scale = amax / v, code = round(x / scale).
"""

import math
from dataclasses import dataclass

TENSOR = "tensor"
ROW = "row"
NVFP4_BLOCK = 16
GEMMS = ("fprop", "dgrad", "wgrad")  # of a linear layer
ROTATION_DIMS = (16, 32, 64, 128)

GRIDS = ("none", "e2m1", "e4m3", "e5m2")
SELECTS = ("absmax", "four_over_six")
ROUNDINGS = ("rtn", "sr", "ms_eden")
EDEN_BLOCKS = (16, "rotation")
EDEN_SPACES = ("tensor", "scaled")
TENSOR_SCALES = ("fp32", "pow2")

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E5M2_MAX = 57344.0

# 17/16 is the most that rounding a block scale to nearest E4M3 can shrink it, so a target of 6*16/17 leaves no element
# beyond the grid: stochastic rounding must not clip, clipping moves the mean.
NO_CLIP_MAX = 6.0 * 16.0 / 17.0
# MS-EDEN clips on purpose: 0.93 minimises the squared error on N(0,1) (quartet2.md d.3, "Optimum total override").
MS_EDEN_CLIP = 0.93
# Scales that may still grow after this point are laid out up to 256: Four-over-Six multiplies one by 1.5 (384), the
# MS-EDEN correction by up to 1.154 (295). Both stay under E4M3's 448.
GROWING_SCALE_CAP = 256.0

# Target maximum and scale cap of each (select, rounding) of an E2M1 operand: quartet2.md, table a.1.
TABLE_A1: dict[tuple[str, str], tuple[float, float]] = {
    ("absmax", "rtn"): (E2M1_MAX, E4M3_MAX),
    ("four_over_six", "rtn"): (E2M1_MAX, GROWING_SCALE_CAP),
    ("absmax", "sr"): (NO_CLIP_MAX, E4M3_MAX),
    ("absmax", "ms_eden"): (NO_CLIP_MAX / MS_EDEN_CLIP, GROWING_SCALE_CAP),
}
FP8_MAX = {"e4m3": E4M3_MAX, "e5m2": E5M2_MAX}


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
FP8_SCALES = ((TENSOR_FP32,), (ROW_FP32,))


@dataclass(frozen=True)
class QuantSpec:
    """A resolved quantizer. Build it with `QuantSpec.resolve`, which fills target_max and scale_cap from table a.1.

    grid: none | e2m1 | e4m3 | e5m2. scales: levels from outer to inner. select: absmax | four_over_six.
    rounding: rtn | sr | ms_eden. eden_block: elements that share one MS-EDEN correction, 16 or the rotation block.
    eden_space: "tensor" weighs each group by its scale squared, which is what Algorithm 1 minimises; "scaled" sums
    the groups unweighted, as upstream's emulation does (biased by 6e-4, quartet2.md d.3).
    tensor_scale: fp32 | pow2 (rounded up to a power of two, so that a library GEMM rounds only once).
    """

    grid: str
    scales: tuple[ScaleLevel, ...] = ()
    select: str = "absmax"
    rounding: str = "rtn"
    eden_block: int | str = 16
    eden_space: str = "tensor"
    scale_rounding: str = "rtn"
    target_max: float = 1.0
    scale_cap: float = 1.0
    tensor_scale: str = "fp32"

    @property
    def is_nvfp4(self) -> bool:
        return self.scales == NVFP4_SCALES or self.is_square

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

    @classmethod
    def resolve(
        cls,
        grid: str,
        scales: tuple[ScaleLevel, ...] = (),
        select: str = "absmax",
        rounding: str = "rtn",
        eden_block: int | str = 16,
        eden_space: str = "tensor",
        scale_rounding: str = "rtn",
        target_max: float | None = None,
        scale_cap: float | None = None,
        tensor_scale: str = "fp32",
    ) -> "QuantSpec":
        """The spec with target_max and scale_cap from table a.1 where they are None.

        Raises ValueError for an unknown value, and for a combination that the table lacks unless both numbers are
        given: such a quantizer is biased (4/6 with SR) or unpublished (4/6 inside MS-EDEN), never silently so.
        """
        for field, value, allowed in (
            ("grid", grid, GRIDS),
            ("select", select, SELECTS),
            ("rounding", rounding, ROUNDINGS),
            ("eden_block", eden_block, EDEN_BLOCKS),
            ("eden_space", eden_space, EDEN_SPACES),
            ("scale_rounding", scale_rounding, ("rtn",)),
            ("tensor_scale", tensor_scale, TENSOR_SCALES),
        ):
            if value not in allowed or type(value) not in map(type, allowed):  # 16.0 is another numerics hash
                raise ValueError(f"{field}={value!r} is unknown; use one of {', '.join(map(str, allowed))}")
        if grid == "none":
            return NO_QUANT
        limits = _limits(grid, scales, select, rounding, target_max, scale_cap)
        if eden_space == "scaled" and eden_block != "rotation":
            raise ValueError("eden_space=scaled is upstream's sum over a rotation block; set eden_block=rotation")
        return cls(grid, scales, select, rounding, eden_block, eden_space, scale_rounding, *limits, tensor_scale)


NO_QUANT = QuantSpec("none")


def default_limits(grid: str, select: str, rounding: str) -> tuple[float | None, float | None]:
    """(target_max, scale_cap) where a recipe leaves them null; None for a combination that table a.1 lacks."""
    if grid in FP8_MAX:
        return FP8_MAX[grid], 1.0
    return TABLE_A1.get((select, rounding), (None, None))


def _limits(
    grid: str,
    scales: tuple[ScaleLevel, ...],
    select: str,
    rounding: str,
    target_max: float | None,
    scale_cap: float | None,
) -> tuple[float, float]:
    """(target_max, scale_cap), or ValueError where the combination has none."""
    for field, value in (("target_max", target_max), ("scale_cap", scale_cap)):
        if value is not None and not (type(value) in (int, float) and 0 < value < math.inf):
            raise ValueError(f"{field}={value!r} must be a positive number (leave it null for the value of table a.1)")
    defaults = default_limits(grid, select, rounding)
    written = ", ".join(map(str, scales))
    if grid in FP8_MAX:
        if scales not in FP8_SCALES or (select, rounding) != ("absmax", "rtn"):
            raise ValueError(
                f"grid={grid} takes select=absmax, rounding=rtn and one fp32 scale per tensor or per row; "
                f"got select={select}, rounding={rounding}, scales=[{written}]"
            )
        if (target_max or 0) > FP8_MAX[grid] or scale_cap not in (None, 1.0):
            raise ValueError(
                f"grid={grid} has no block scales to cap and ends at {FP8_MAX[grid]:g}: leave target_max and scale_cap "
                f"out, or choose a smaller target_max; got target_max={target_max}, scale_cap={scale_cap}"
            )
        return target_max or defaults[0], scale_cap or defaults[1]
    if scale_cap is not None and scale_cap > E4M3_MAX:
        raise ValueError(f"scale_cap={scale_cap}: block scales are E4M3 and end at {E4M3_MAX:.0f}")
    if scales not in (NVFP4_SCALES, NVFP4_SQUARE_SCALES):
        raise ValueError(
            f"grid=e2m1 takes scales [tensor fp32, 1x16 e4m3] or [tensor fp32, 16x16 e4m3]; got [{written}]"
        )
    if rounding == "ms_eden" and scales == NVFP4_SQUARE_SCALES:
        raise ValueError("rounding=ms_eden corrects groups of 16 along the contraction: 1x16 blocks, not 16x16")
    if None in defaults and (target_max is None or scale_cap is None):
        raise ValueError(
            f"select={select} with rounding={rounding} is not in table a.1 (a branch chosen after random rounding is "
            "biased): set select=absmax, or give both target_max and scale_cap to say that you mean it"
        )
    return target_max or defaults[0], scale_cap or defaults[1]
