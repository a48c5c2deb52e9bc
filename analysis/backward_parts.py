"""Parts of the backward's gap: means over published cells of sums and differences of losses.

The error of a part comes from its scatter over cells (one seed each). Beside it: how it goes with D / N, and what it is
as a share of the tokens, by the loss that bf16's fitted law gives for tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.law import Law
from analysis.published import Points

LEAST_CELLS = 4
STEP_D = 1.001  # the law's slope at a length is read off from this share below it to this share above
# What it is: (arms of analysis/published.py whose losses are added, arms whose losses are taken away).
PARTS = {
    "backward, MS-EDEN": (["backward_eden"], ["bf16"]),
    "dgrad, MS-EDEN": (["dgrad_eden"], ["bf16"]),
    "wgrad, MS-EDEN": (["wgrad_eden"], ["bf16"]),
    "backward less both, MS-EDEN": (["backward_eden", "bf16"], ["dgrad_eden", "wgrad_eden"]),
    "backward, SR": (["backward_sr"], ["bf16"]),
    "dgrad, SR": (["dgrad_sr"], ["bf16"]),
    "wgrad, SR": (["wgrad_sr"], ["bf16"]),
    "backward less both, SR": (["backward_sr", "bf16"], ["dgrad_sr", "wgrad_sr"]),
    "dgrad, dY alone, SR": (["dgrad_e_sr"], ["bf16"]),
    "dgrad, what W adds, SR": (["dgrad_sr"], ["dgrad_e_sr"]),
}


@dataclass(frozen=True)
class Part:
    """mean, se: 1e-3 nats over `cells`. rise, rise_se: 1e-3 nats more for each factor e of D / N. tokens: the share of
    the tokens [%] that costs as much, over the half of the cells with the lower D / N and over the other."""

    mean: float
    se: float
    cells: int
    rise: float
    rise_se: float
    tokens: tuple[float, float]


def part(arms: Mapping[str, Points], plus: Sequence[str], minus: Sequence[str], law: Law) -> Part:
    """Losses of `plus` less those of `minus`, over the cells that all have. ValueError: fewer than four cells."""
    cells = sorted(set.intersection(*(set(arms[arm]) for arm in (*plus, *minus))), key=ratio)
    if len(cells) < LEAST_CELLS:
        raise ValueError(f"{', '.join((*plus, *minus))} share {len(cells)} cells; needed: {LEAST_CELLS}")
    found = 1e3 * np.array([sum(arms[a][c] for a in plus) - sum(arms[a][c] for a in minus) for c in cells])
    where = np.log([ratio(cell) for cell in cells])
    where -= where.mean()
    rise = float(where @ found / (where @ where))
    left = found - found.mean() - rise * where
    worth = 1e3 * np.array([law.slope(n, d / STEP_D, d * STEP_D) for n, d in cells])
    low, high = (float(100 * found[at].sum() / worth[at].sum()) for at in np.array_split(np.arange(len(cells)), 2))
    return Part(
        mean=float(found.mean()),
        se=float(found.std(ddof=1) / math.sqrt(len(cells))),
        cells=len(cells),
        rise=rise,
        rise_se=math.sqrt(float(left @ left) / (len(cells) - 2) / float(where @ where)),
        tokens=(low, high),
    )


def ratio(cell: tuple[int, int]) -> float:
    n, d = cell
    return d / n
