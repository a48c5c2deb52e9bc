"""Foretell the final gaps of runs that are going on, with intervals, from their evaluations so far.

    python scripts/early.py 'runs/leaderboard-*'              # each arm as far as it is
    python scripts/early.py 'runs/leaderboard-*' --step 1000  # as of that step
    python scripts/early.py --replay                          # what run_grid.py stop_losers=true would have saved
    python scripts/early.py --ranks                           # what X-ray and audit say of final gaps, on kept runs

An arm is a recipe over its seeds, beside the baseline's runs of the same seeds. Calibrated on kept runs that ended; the
coverage stated is that of recipe families which the calibration hadn't seen. Refused: forks and phases, schedules other
than the kept runs' cosine, and recipes with hooks. Gaps are in 1e-3 nats a token.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository first, whatever is installed

from base.commands import parser_of
from base.terminal import one_line_on_ctrl_c, positive, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("early")

from analysis import early
from analysis.early import Arm, Calibration
from analysis.runs import Run, find_runs

RESULTS = Path(__file__).resolve().parents[1] / "results"
KEPT = ("corpus_screen", "corpus_ranking", "corpus_forward", "corpus_short", "leaderboard", "candidates")
AT = 0.15  # of the steps, where --ranks looks


def arguments() -> argparse.Namespace:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("runs", nargs="*", help="run folders, or quoted globs")
    parser.add_argument("--step", type=positive, help="as of this step (default: as far as each arm is)")
    parser.add_argument("--baseline", default=early.BASE, help=f"recipe to subtract (default: {early.BASE})")
    parser.add_argument("--kept", nargs="+", metavar="GLOB", help="runs to calibrate on (default: those of results/)")
    parser.add_argument("--replay", action="store_true", help="what stop_losers would have saved on the kept runs")
    parser.add_argument(
        "--ranks", action="store_true", help=f"rank correlations at {100 * AT:g} %% of the kept runs' steps"
    )
    args = parser.parse_args()
    if bool(args.runs) + args.replay + args.ranks != 1:
        parser.error("give runs to judge, or --replay, or --ranks")
    return args


def kept_runs(args: argparse.Namespace) -> list[Run]:
    """ValueError where there are none."""
    folders = [RESULTS / name for name in KEPT if (RESULTS / name).is_dir()]
    patterns = args.kept or [f"{folder}/*" for folder in folders]
    if not patterns:
        raise ValueError(f"{RESULTS}: no kept runs there (an installed copy has none); name runs that ended by --kept")
    return find_runs(patterns)


def judged(args: argparse.Namespace) -> Iterator[str]:
    arms, refused = early.arms_of(find_runs(args.runs), args.baseline)
    yield from (f"refused: {line}" for line in refused)
    if not arms:
        raise ValueError(f"none of these runs has a {args.baseline} run of its seed and conditions beside it")
    kept, _ = early.arms_of(kept_runs(args), args.baseline)
    yield f"{'recipe':32} {'seeds':>5} {'step':>7} {'so far':>8} {'foretold':>9}  {early.LEVEL:.0%} interval"
    calibrations: dict[str, Calibration] = {}
    for arm in arms:
        line, used = verdict(arm, args.step, [one for one in kept if not same(one, arm)])
        yield line
        if used:
            calibrations[described(used)] = used
    yield ""
    yield from calibrations
    models = {run.info["model"] for arm in kept for run, _ in arm.pairs}
    for model in {run.info["model"] for arm in arms for run, _ in arm.pairs} - models:
        yield f"Of {model} no run is kept: how its gaps go on was read off {', '.join(sorted(models))}."


def same(one: Arm, other: Arm) -> bool:
    """Whether two arms are of one recipe and one set of conditions: none is foretold from itself."""
    return one.label == other.label and early.conditions(one.pairs[0][0]) == early.conditions(other.pairs[0][0])


def verdict(arm: Arm, step: int | None, kept: list[Arm]) -> tuple[str, Calibration | None]:
    steps = arm.pairs[0][0].info["steps"]
    share = arm.share if step is None else min(step / steps, arm.share)
    head = f"{arm.label:32.32} {len(arm.pairs):>5} {round(share * steps):>7,}"
    if share < early.EARLIEST:
        return f"{head}  too early: before {early.EARLIEST:.0%} of the steps gaps say nothing", None
    wanted = [name for name, figure in early.FIGURES.items() if figure(arm, share) is not None]
    calibration = early.calibrate(kept, share, wanted)
    features = early.features_of(arm, share, calibration.fit.figures)
    if features is None:
        return f"{head}  no evaluation in the last half of what is done: nothing to go by", None
    middle, low, high = (1e3 * value for value in calibration.fit.foretold(features))
    return f"{head} {1e3 * features[0]:>+8.1f} {middle:>+9.1f}  {low:+.1f} to {high:+.1f}", calibration


def described(used: Calibration) -> str:
    left, (share, low, high) = used.left, used.left.coverage
    figures = ", ".join(("windowed gaps", *used.fit.figures))
    lines = [
        f"At {used.share:.0%} of the steps, from {figures}: {left.arms} kept arms of {left.families} families;",
        f"of families left out {left.held} of {left.arms} intervals held ({share:.0%}, {low:.0%} to {high:.0%}).",
    ]
    for name, found in used.tried.items():
        if isinstance(found, str):
            lines.append(f"Not counted, {name}: {found}.")
        else:
            without, beside, count = found
            word = "Counted" if name in used.fit.figures else "Not counted"
            lines.append(f"{word}, {name}: relative error {without:.3f} without, {beside:.3f} with it ({count} arms).")
    return " ".join(lines)


def replayed(args: argparse.Namespace) -> Iterator[str]:
    found = early.replay(kept_runs(args))
    rule = " or ".join(f"{1e3 * gap:g}e-3 behind from {share:.0%} of the steps" for share, gap in early.LOST)
    yield f"stop_losers: an arm ends when its windowed gap to the leading 4-bit arm of its seed is {rule}."
    yield (
        f"Of {found.runs} kept runs that had a rival {len(found.ended)} would have ended; {found.saved:.0%} of all "
        "steps saved."
    )
    wronged = "".join(f"; {name} by {1e3 * gap:.1f}e-3" for name, gap in found.wronged.items())
    yield f"Ended, though in the end ahead of one that went on: {len(found.wronged)}{wronged}"


def correlated(args: argparse.Namespace) -> Iterator[str]:
    arms, _ = early.arms_of(kept_runs(args), args.baseline)
    yield f"Spearman's rank correlation with final gaps, at {AT:.0%} of the steps of kept arms:"
    for name, figure in early.RANKED.items():
        n, rho, low, high = early.ranks(arms, AT, figure)
        if rho != rho:
            yield f"{name:24} n = {n}: too few to tell"
        else:
            yield f"{name:24} n = {n}: {rho:+.2f}" + ("" if low != low else f" ({low:+.2f} to {high:+.2f})")


def main() -> int:
    args = arguments()
    lines = replayed(args) if args.replay else correlated(args) if args.ranks else judged(args)
    try:
        for line in lines:
            print(line)
    except (ValueError, OSError) as error:
        print(f"early: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
