"""The noise floor: how far runs of one recipe end apart, per model, length and data; cached for every later comparison.

Three kinds of difference are measured, where such runs exist: an exact rerun (same hash), the same initialization with
other rounding bits or weights nudged at the start (same seed, numerics `rounding_seed` or `perturb`), and new seeds.
Standard deviations are pooled over recipes with their degrees of freedom: recipes differ in mean, hardly in spread,
and gaps of one that spreads three times as far as the others are outside their 95 % intervals in 10 to 13 % of cases.
"paired" is what is left between seeds when what a seed does to all recipes alike is taken out. That part was drawn once
a seed, however many recipes share it: "seed" has fewer degrees of freedom than it has differences.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.special import fdtri, stdtrit

from analysis.alike import require_like_text
from analysis.compare import group_runs, seed_means
from analysis.pairing import CONFIDENCE, Floor, t_quantile
from analysis.runs import Run, json_object
from base.runfolder import RunError

NAME = "noise_floor.json"
CACHE = Path(__file__).resolve().parents[1] / "results" / NAME  # published; read only
NUDGES = ("rounding_seed", "perturb")
KINDS = ("rerun", "nudge", "seed", "paired")


@dataclass(frozen=True)
class Spread:
    """A pooled standard deviation [nats/token] with its degrees of freedom."""

    sd: float
    df: float

    def seeds_to_resolve(self, difference: float) -> int:
        """Runs per recipe whose 95 % interval leaves out zero in 80 % of comparisons, with this floor in compare.py.

        2 (t_0.975 + t_0.8)^2 sd^2 / d^2, with the quantiles at this estimate's degrees of freedom: 16 sd^2 / d^2 for
        many of them, 400 sd^2 / d^2 for one. At least two, below which compare.py gives no verdict.
        """
        quantiles = t_quantile(self.df) + stdtrit(self.df, 0.8)
        return max(2, math.ceil(2 * (quantiles * self.sd / difference) ** 2))


def measure(runs: list[Run]) -> dict[str, dict]:
    """{key: {kind: Spread fields, recipes: {label: {mean, sd, seeds}}}} of finished runs; empty kinds left out.

    ValueError for runs of one key that were scored on unlike text: equal amounts of it may be other documents.
    """
    found: dict[str, dict] = {}
    keyed: dict[str, list[Run]] = {}
    for run in runs:
        if run.finished and math.isfinite(final_loss(run)):
            keyed.setdefault(run.conditions, []).append(run)
    for key, members in keyed.items():
        require_like_text(members, "a noise floor")
        losses = seed_losses(members)
        spreads = {"rerun": pooled(reruns(members)), "nudge": pooled(nudges(members))}
        left = paired(losses)
        spreads |= {"seed": between_seeds(losses, left), "paired": left}
        entry = {kind: asdict(spread) for kind, spread in spreads.items() if spread}
        if related := correlation(losses, left):
            entry["correlation"] = dict(zip(("value", "low", "high"), related, strict=True))
        if entry:
            found[key] = entry | {"recipes": per_recipe(losses)}
    return found


def seed_losses(runs: list[Run]) -> dict[str, dict[int, float]]:
    """{recipe: {seed: final loss}} of the runs without nudges; another learning rate is another recipe."""
    return {group.label: seed_means(group, final_loss) for group in group_runs([r for r in runs if not is_nudged(r)])}


def reruns(runs: list[Run]) -> list[list[float]]:
    """Final losses of runs of one hash, one list a hash."""
    hashes: dict[str, list[float]] = {}
    for run in runs:
        hashes.setdefault(run.info["hash"], []).append(final_loss(run))
    return list(hashes.values())


def nudges(runs: list[Run]) -> list[list[float]]:
    """Final losses of runs that differ in nudges alone, one list a recipe and seed; reruns are averaged."""
    clusters: dict[tuple, list[Run]] = {}
    for run in runs:
        others = tuple(sorted((k, str(v)) for k, v in run.info["numerics"].items() if k not in NUDGES))
        clusters.setdefault(others, []).append(run)
    return [[float(np.mean(losses)) for losses in reruns(members)] for members in clusters.values()]


def final_loss(run: Run) -> float:
    return float(run.result["final_loss"])


def pooled(groups: list[list[float]]) -> Spread | None:
    """sqrt(sum df var / sum df); None when no group has two runs."""
    df = sum(len(g) - 1 for g in groups)
    if df == 0:
        return None
    squares = sum(float(np.sum((np.array(g) - np.mean(g)) ** 2)) for g in groups)
    return Spread(math.sqrt(squares / df), df)


def between_seeds(losses: dict[str, dict[int, float]], left: Spread | None) -> Spread | None:
    """Pooled over recipes, with Satterthwaite's degrees of freedom for loss = recipe + seed + noise.

    With P the projection that takes out the recipes' means and V the covariance of the losses, the pooled variance has
    tr(PV)^2 / tr(PVPV) of them: all where a seed does nothing to all recipes alike, and those of one recipe where
    it does everything. V is estimated, too: of simulated verdicts by this spread about equal recipes, 4 to 9 % were
    wrong. `left`: the paired spread.
    """
    spread = pooled([list(row.values()) for row in losses.values()])
    if spread is None or left is None:
        return spread
    projection, shared = _within_recipes(losses)
    common = max(0.0, (spread.sd**2 - left.sd**2) * spread.df / float(np.trace(shared)))
    covariance = common * shared + left.sd**2 * projection
    squares = float(np.trace(covariance @ covariance))
    return Spread(spread.sd, float(np.trace(covariance)) ** 2 / squares) if squares else spread


def correlation(losses: dict[str, dict[int, float]], left: Spread | None) -> tuple[float, float, float] | None:
    """That of recipes sharing a seed, 1 - paired variance / variance between seeds, and its 95 % interval from the F
    test of the seeds; None without a paired spread, `left`."""
    spread = pooled([list(row.values()) for row in losses.values()])
    if spread is None or left is None or left.sd == 0:
        return None
    df = spread.df - left.df
    f = (spread.sd**2 * spread.df / left.sd**2 - left.df) / df
    times = float(np.trace(_within_recipes(losses)[1])) / df  # how often a seed's part enters its mean square
    bounds = ((f / fdtri(df, left.df, 0.5 + side * CONFIDENCE / 2) - 1) / times for side in (1, -1))
    low, high = (float(ratio / (1 + ratio)) for ratio in bounds)
    return 1 - (left.sd / spread.sd) ** 2, low, high


def paired(losses: dict[str, dict[int, float]]) -> Spread | None:
    """Residual of loss = recipe + seed by least squares, whatever seeds a recipe has; None without degrees of freedom.

    In units of one run: a gap between two recipes, seed by seed, has sqrt(2) times this standard deviation.
    """
    recipes, seeds, values = _designs(losses)
    design = np.hstack([recipes, seeds])
    effects, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    df = len(values) - int(rank)
    return Spread(float(np.linalg.norm(values - design @ effects)) / math.sqrt(df), df) if df else None


def _within_recipes(losses: dict[str, dict[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """(P, P S): the projection that takes out recipes' means, and on what runs share by their seed [runs, runs]."""
    recipes, seeds, _ = _designs(losses)
    projection = np.eye(len(recipes)) - recipes / recipes.sum(0) @ recipes.T
    return projection, projection @ seeds @ seeds.T


def _designs(losses: dict[str, dict[int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indicators of the recipe [runs, recipes] and of the seed [runs, seeds], losses [runs]; reruns are one."""
    cells = [(recipe, seed, loss) for recipe, row in enumerate(losses.values()) for seed, loss in row.items()]
    recipe, seed, loss = (np.array(column) for column in zip(*cells, strict=True))
    return np.eye(len(losses))[recipe], (seed[:, None] == np.unique(seed)).astype(float), loss


def per_recipe(losses: dict[str, dict[int, float]]) -> dict[str, dict[str, float]]:
    table = {}
    for label, row in losses.items():
        values = np.array(list(row.values()))
        table[label] = {"mean": float(values.mean()), "seeds": len(values)}
        if len(values) > 1:
            table[label]["sd"] = float(values.std(ddof=1))
    return table


def is_nudged(run: Run) -> bool:
    return any(run.info["numerics"].get(key) not in (None, 0, 0.0) for key in NUDGES)


def load(path: Path = CACHE) -> dict[str, dict]:
    """The cached floors; {} when nothing was measured yet. RunError names a file of something else."""
    floors = json_object(path) if path.exists() else {}
    for key, entry in floors.items():
        kinds = [entry[kind] for kind in KINDS if kind in entry] if isinstance(entry, dict) else [{}]
        if not all(isinstance(spread, dict) and {"sd", "df"} <= spread.keys() for spread in kinds):
            raise RunError(f"{path}: {key[:60]}: needs sd and df; noise_floor.py writes such files")
    return floors


def known(folder: Path) -> dict[str, dict]:
    """The published floors, and over them those measured beside the runs in `folder`."""
    return load() | load(folder / NAME)


def refuse_fewer(floors: dict[str, dict], cached: dict[str, dict], path: Path) -> None:
    """ValueError if an entry of `floors` would replace one of `cached`, read from `path`, that more runs made."""
    for key in floors.keys() & cached.keys():
        now, before = counts(floors[key]), counts(cached[key])
        if lost := [f"{kind} {before[kind]:g}, now {now[kind]:g}" for kind in now if now[kind] < before[kind]]:
            raise ValueError(
                f"{path} has {key[:60]}... from more runs ({'; '.join(lost)}): nothing written; give all its runs, "
                "another file with --cache, or --replace to have these alone"
            )


def counts(entry: dict) -> dict[str, float]:
    """What more runs can only raise: degrees of freedom, but for Satterthwaite's between seeds, and runs of a seed."""
    table = {f"{kind} df": entry.get(kind, {}).get("df", 0) for kind in ("rerun", "nudge", "paired")}
    return table | {"seeds of all recipes": sum(row["seeds"] for row in entry.get("recipes", {}).values())}


def floor_for(run: Run, floors: dict[str, dict]) -> Floor | None:
    """The floor for runs like this one, or None."""
    entry = floors.get(run.conditions, {})
    spreads = [(entry[kind]["sd"], entry[kind]["df"]) if kind in entry else None for kind in ("seed", "paired")]
    return Floor(*spreads, conditions=run.conditions) if spreads[0] else None


def text(floors: dict[str, dict]) -> str:
    """What a person wants to read: spreads by kind, how many seeds resolve 10e-3 and 2e-3 nats, what these resolve."""
    lines = []
    for key, entry in floors.items():
        lines.append(key)
        seeds = min((row["seeds"] for row in entry["recipes"].values() if row["seeds"] > 1), default=1)
        for kind in KINDS:
            if kind in entry:
                spread = Spread(**entry[kind])
                needed = ", ".join(f"{spread.seeds_to_resolve(d)} for {d * 1e3:g}e-3" for d in (0.01, 0.005, 0.002))
                lines.append(f"  {kind:6} sd {spread.sd * 1e3:7.3f}e-3  df {spread.df:4.3g}  runs needed: {needed}")
        if "paired" in entry and entry["seed"]["sd"]:
            widths = (half_width(Spread(**entry[kind]), seeds) * 1e3 for kind in ("seed", "paired"))
            lines.append("  a gap over {} seeds is known to +-{:.2f}e-3, paired +-{:.2f}e-3".format(seeds, *widths))
        if "correlation" in entry:
            achieved = "{value:+.2f} (95 % {low:+.2f} .. {high:+.2f})".format(**entry["correlation"])
            lines.append(f"  correlation between recipes that share a seed (what pairing achieves): {achieved}")
        for label, row in entry["recipes"].items():
            sd = f"sd {row['sd'] * 1e3:.3f}e-3" if "sd" in row else "one seed"
            lines.append(f"    {label:24} mean {row['mean']:.4f}  {sd}  seeds {row['seeds']}")
    return "\n".join(lines)


def half_width(spread: Spread, seeds: int) -> float:
    """Of the 95 % interval of the difference of two recipes' means over `seeds` runs each."""
    return t_quantile(spread.df) * spread.sd * math.sqrt(2 / seeds)
