"""Fit loss(N, D, recipe) to the published runs, to ours, or show ours over the published fit.

python scripts/fit_scaling_law.py --out results/law                 # the 574 published runs
python scripts/fit_scaling_law.py 'runs/*' --out results/law        # ours over the published fit
python scripts/fit_scaling_law.py 'runs/*' --fit ours               # the law from our runs alone
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository first, whatever is installed

from base.commands import parser_of
from base.terminal import existing, one_line_on_ctrl_c, positive, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("fit_scaling_law")

from analysis import law as laws
from analysis import law_report, noise, published
from analysis.alike import differences, require_like_text
from analysis.compare import Group, group_runs, seed_means
from analysis.published import Points
from analysis.runs import Run, find_runs
from base.files import write_json, write_text


def arguments() -> argparse.Namespace:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("runs", nargs="*", help="our run folders, or quoted globs; finished ones are used")
    parser.add_argument(
        "--published", type=existing, default=published.DEFAULT_PATH, help="CSV: size,N,D,scheme,variant,final_loss"
    )
    parser.add_argument(
        "--fit", choices=("published", "ours"), help="which points make the law (default: the published ones if there)"
    )
    parser.add_argument("--form", choices=tuple(laws.FORMS), default="coupled")
    parser.add_argument("--draws", type=positive, default=200, help="bootstrap draws")
    parser.add_argument("--out", type=Path, default=Path("law"), help="folder for law.md, law.json, law.png")
    return parser.parse_args()


def our_points(patterns: list[str]) -> dict[str, Points]:
    """{recipe label: {(N, D): final loss by on_baselines_seeds}} of finished runs; reruns of a seed are averaged first.

    Left out: nudged runs, and cells of a recipe with a seed that diverged. ValueError for runs of unlike text, a cell
    whose runs can't be compared, or that has a recipe in two variants (two learning rates, say).
    """
    runs = [run for run in (find_runs(patterns) if patterns else []) if not noise.is_nudged(run)]
    runs = [run for run in runs if run.finished or run.diverged_at is not None]
    require_like_text(runs, "a law")
    cells: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        cell = (run.info["parameters_non_embedding"], run.info["steps"] * run.info["tokens_per_step"])
        cells.setdefault(cell, []).append(run)
    points: dict[str, Points] = {}
    for cell, runs in cells.items():
        for label, loss in cell_losses(cell, runs).items():
            points.setdefault(label, {})[cell] = loss
    return points


def cell_losses(cell: tuple[int, int], runs: list[Run]) -> dict[str, float]:
    """{recipe label: final loss} of one (N, D)."""
    where = f"N={cell[0]:,} D={cell[1]:,}"
    if mixed := differences(runs):
        raise ValueError(f"{where}: {'; '.join(mixed)}. Leave some out")
    groups: dict[str, list[Group]] = {}
    for group in group_runs(runs):
        groups.setdefault(group.runs[0].info["recipe_label"], []).append(group)
    if several := [group.label for variants in groups.values() if len(variants) > 1 for group in variants]:
        raise ValueError(
            f"{where}: several variants of a recipe make no one point: {', '.join(several)}. Leave some out"
        )
    losses = {label: seed_means(group, noise.final_loss) for label, (group,) in groups.items() if not group.diverged}
    return {label: on_baselines_seeds(of_seed, losses.get("bf16", {})) for label, of_seed in losses.items()}


def on_baselines_seeds(losses: dict[int, float], base: dict[int, float]) -> float:
    """Mean over seeds, moved so that its gap to the baseline's mean is that over the seeds both have, as compare.py's
    is: the law sees gaps, and seeds differ by more than paired gaps do."""
    shared = losses.keys() & base.keys()
    if not shared:
        return fmean(losses.values())
    return fmean(base.values()) + fmean(losses[seed] - base[seed] for seed in shared)


def fit(points: dict[str, Points], form: str, draws: int) -> dict:
    """Everything the report shows: both forms, each size predicted from the others, factors and bootstrap draws."""
    base = points["bf16"]
    recipes = {k: v for k, v in points.items() if k != "bf16" and len(published.gaps(v, base)) >= 3}
    fits = {name: laws.fit_law(base, name) for name in laws.FORMS}
    base_laws, drawn = laws.bootstrap(fits[form], form, base, recipes, draws)
    return {
        "base": base,
        "recipes": recipes,
        "fits": fits,
        "left_out": {name: leave_out(law, name, base) for name, law in fits.items()},
        "factors": {name: laws.fit_factors(fits[form], p, base) for name, p in recipes.items()},
        "power": {name: laws.fit_gap_power(p, base) for name, p in recipes.items()},
        "laws": base_laws,
        "drawn": drawn,
    }


def leave_out(law: laws.Law, form: str, base: Points) -> dict[int, dict[str, float]]:
    """{size: rms residual of the fit to the other sizes, and its rms error on this one}; too few others: missing."""
    found = {}
    for size in sorted({n for n, _ in base}):
        rest = {cell: v for cell, v in base.items() if cell[0] != size}
        own = {cell: v for cell, v in base.items() if cell[0] == size}
        try:
            fitted = laws.fit_law(rest, form, start=law)
            found[size] = {"rest": laws.rms(fitted, rest), "held_out": laws.rms(fitted, own)}
        except ValueError:
            continue
    return found


def report(result: dict, form: str, source: str, ours: dict[str, Points], everyone: dict[str, Points]) -> str:
    law, base = result["fits"][form], result["base"]
    parts = [
        f"# Scaling law of {source}: {len(base)} baseline cells, {len(result['recipes'])} recipes\n",
        "loss = E + (A (eff_N N/1e8)^-alpha + B (eff_D D/1e10)^-beta)^gamma, nats/token; N non-embedding parameters.\n",
        law_report.law_table(law, result["laws"]),
        "How well each form fits the baseline, or what is left without one size, which it then predicts:\n",
        law_report.form_table(result["fits"], base, result["left_out"]),
        "Efficiency factors, fitted on gaps at equal (N, D), and a power law of the gap for comparison:\n",
        law_report.factor_table(result["factors"], result["drawn"], result["recipes"], base, result["power"]),
        law_report.COVERAGE,
    ]
    if "quartet2" in everyone and "tetrajet2" in everyone:
        parts += [
            "Reduction of the gap to bf16 by quartet2 (claimed: at least 20 %):\n",
            law_report.claim_table(everyone),
        ]
    if ours and everyone:
        parts += ["Our gaps beside the published ones:\n", law_report.overlay_table(ours, everyone)]
    return "\n".join(parts)


def as_json(result: dict, form: str) -> dict:
    low_high = {
        name: {field: laws.interval([getattr(x, field) for x in draws]) for field in ("eff_n", "eff_d")}
        for name, draws in result["drawn"].items()
    }
    return {
        "form": form,
        "laws": {name: law.as_dict() for name, law in result["fits"].items()},
        "rms": {name: laws.rms(law, result["base"]) for name, law in result["fits"].items()},
        "rms_by_size_left_out": result["left_out"],
        "intervals": {k: laws.interval([getattr(x, k) for x in result["laws"]]) for k in result["laws"][0].as_dict()},
        "factors": {name: asdict(f) | {"intervals": low_high[name]} for name, f in result["factors"].items()},
    }


def draw(result: dict, form: str, ours: dict[str, Points], path: Path) -> None:
    from analysis import law_plots, plots

    shown = {k: v for k, v in result["recipes"].items() if k in published.MAIN} or result["recipes"]
    named = {k: f for k, f in result["factors"].items() if k in published.NAMES.values()} or result["factors"]
    spread = {
        name: tuple(laws.interval([getattr(x, f) for x in draws]) for f in ("eff_n", "eff_d"))
        for name, draws in result["drawn"].items()
    }
    plots.save(law_plots.figure(result["fits"][form], result["base"], shown, named, spread, ours), path)


def missing(chosen: str, path: Path) -> str:
    """What there is to do without bf16 points to fit."""
    if chosen == "ours":
        return "no finished bf16 runs among those given; a law needs the baseline"
    if path.exists():
        return f"{path}: no bf16 runs; a law needs the baseline"
    return (
        f"no {path}: the published losses are results/published/quartet2_runs.csv in a checkout; give "
        "--published FILE, or your own runs: 'runs/*'"
    )


def write(args: argparse.Namespace, result: dict, ours: dict[str, Points], text: str) -> None:
    """law.{md,json,png} in --out."""
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "law.md", text)
    write_json(args.out / "law.json", as_json(result, args.form))
    draw(result, args.form, ours, args.out / "law.png")


def main() -> int:
    args = arguments()
    try:
        ours = our_points(args.runs)
        everyone = published.load(args.published) if args.published.exists() else {}
        chosen = args.fit or ("ours" if args.runs and not everyone else "published")
        points = ours if chosen == "ours" else everyone
        if "bf16" not in points:
            raise ValueError(missing(chosen, args.published))
        if len(points) == 1:
            raise ValueError("only bf16: nothing to compare; give runs of another recipe, too")
        result = fit(points, args.form, args.draws)
        text = report(result, args.form, "our runs" if chosen == "ours" else "the published runs", ours, everyone)
        write(args, result, ours, text)
    except (ValueError, OSError) as error:
        print(f"fit_scaling_law: {error}", file=sys.stderr)
        return 2
    print(text)
    print(f"written: {args.out}/law.md  law.json  law.png")
    return 0


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
