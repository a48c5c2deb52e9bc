"""What competes for a block: the candidates of each `select`, and how far each combination may be laid out.

A candidate is a member of the family with the ends that its scale fits the block to. Of each block the candidate with
the lowest squared error wins, the earlier on a tie.

    absmax          each member once: the block's extent is fitted to the member's ends
    four_over_six   after each E2M1 member, the same fitted to 4 instead of 6 (Four-over-Six, arXiv 2512.02010)
    search          the E4M3 scale of absmax and its neighbours, from search[0] to search[1] steps away
"""

from dataclasses import dataclass

from kernels.formats.grids import Family, Float4, Grid
from kernels.formats.minifloat import E4M3_MAX

# 17/16 is the most that rounding a block scale to nearest E4M3 can shrink it, so a target of 16/17 of the largest level
# leaves no element beyond the grid: stochastic rounding must not clip, clipping moves the mean.
UNCLIPPED = 16.0, 17.0
# MS-EDEN clips on purpose: 0.93 minimises the squared error on N(0,1) (Quartet II's "optimum total override").
MS_EDEN_CLIP = 0.93
# Scales that may still grow after this point are laid out up to 256: Four-over-Six multiplies one by 1.5 (384), the
# MS-EDEN correction by up to 1.154 (295). Both stay under E4M3's 448.
GROWING_SCALE_CAP = 256.0
# A grid shifted by 1/2 has a short side of 5.5, or of 3.5 where 6 becomes 4: 384 * 6/5.5 = 419, 256 * 6/3.5 = 439, and
# 208 * 6/3.5 * 1.14 = 407.
SHIFTED_CAPS = {
    "absmax": {"rtn": 384.0, "sr": 384.0, "ms_eden": GROWING_SCALE_CAP},
    "four_over_six": {"rtn": GROWING_SCALE_CAP, "sr": GROWING_SCALE_CAP, "ms_eden": 208.0},
}


@dataclass(frozen=True)
class Candidate:
    """member: its number in the family. up, down: the levels that the block's reaches are fitted to. stretch: the
    scale, before it is rounded, times this. step: E4M3 steps from the rounded scale."""

    member: int
    up: float
    down: float
    stretch: float = 1.0
    step: int = 0


def candidates(select: str, family: Family, search: tuple[int, int]) -> tuple[Candidate, ...]:
    """In the order in which they win ties."""
    if select == "search":
        first, last = search
        steps = [*range(last + 1), *range(-1, first - 1, -1)]
        return tuple(Candidate(0, family.top, family.top, step=step) for step in steps)
    fours = select == "four_over_six"
    return tuple(c for number, grid in enumerate(family.members) for c in _of_member(family, number, grid, fours))


def _of_member(family: Family, number: int, grid: Grid, fours: bool) -> list[Candidate]:
    if not isinstance(grid, Float4):
        return [Candidate(number, grid.up, grid.down)]
    if not family.sees_sides:
        far = abs(grid.shift)
        return [Candidate(number, end + far, end + far) for end in (6.0, 4.0)[: 1 + fours]]
    if not grid.shift:  # one quotient for both, as published
        return [Candidate(number, 6.0, 6.0, stretch) for stretch in (1.0, 1.5)[: 1 + fours]]
    return [Candidate(number, end + grid.shift, end - grid.shift) for end in (6.0, 4.0)[: 1 + fours]]


def default_target(family: Family, rounding: str) -> float:
    """The level that the largest element is scaled to, in levels of an ordinary member."""
    if rounding == "rtn":
        return family.top
    unclipped = family.top * UNCLIPPED[0] / UNCLIPPED[1]
    return unclipped if rounding == "sr" else unclipped / MS_EDEN_CLIP


def default_cap(family: Family, select: str, rounding: str) -> float | None:
    """The block scale that the tensor's largest element gets; None for a combination that nobody measured."""
    fours = select == "four_over_six"
    if (fours and not family.floats) or (select == "search" and (family.name != "e2m1" or rounding != "rtn")):
        return None
    if fours and rounding == "sr" and len(family.members) == 1:
        return None  # a branch chosen after random rounding is biased
    if family.is_shifted and family.sees_sides:
        return SHIFTED_CAPS[select][rounding]
    cap = GROWING_SCALE_CAP if fours or select == "search" or rounding == "ms_eden" else E4M3_MAX
    # A block whose extreme lies on a grid's short side has a scale that much larger.
    short = min(min(grid.up, grid.down) for grid in family.members)
    blocks = 24 if rounding == "ms_eden" else 28  # times 16: 448, and less a seventh for MS-EDEN's correction
    return cap if short >= family.top else min(cap, 16.0 * (blocks * short // family.top))
