"""Compare training runs: table, loss curves, gap curves, and a report in one HTML file.

python scripts/compare.py 'runs/*' --baseline bf16 --out comparison
python scripts/compare.py 'runs/*' --contrast quartet2:.25,bf16:.75 --margin 3e-3     # different, equivalent or open
python scripts/compare.py 'runs/*' --contrast 'arm<quartet2:.25,bf16:.75' --contrast 'arm<fp8:1'  # claims, one-sided
python scripts/compare.py 'runs/*' --contrast 'arm[nvfp4]<quartet2[nvfp4]:.7,bf16[nvfp4]:.3'  # the same weights served
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository first, whatever is installed

from base.commands import parser_of
from base.terminal import between, existing, one_line_on_ctrl_c, positive, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("compare")

from analysis import contrasts, noise, pairs, publish, published, served, tables, verdict
from analysis.alike import differences
from analysis.compare import Group, Row, group_runs, pick_baseline, table
from analysis.contrasts import Contrast
from analysis.pairing import Floor
from analysis.runs import find_runs
from base.files import write_text

MARGIN = 3e-3  # nats: what no claim here calls a difference


def arguments() -> argparse.Namespace:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("runs", nargs="+", help="run folders, or quoted globs")
    parser.add_argument("--baseline", help="recipe to subtract (default: bf16, else the first)")
    parser.add_argument("--step", type=positive, help="compare as of this evaluation (default: the last in common)")
    parser.add_argument("--out", type=Path, help="folder for the outputs (default: compare/ beside the first run)")
    parser.add_argument("--allow-mixed", action="store_true", help="go on where data, tokenizer, batch or model differ")
    parser.add_argument(
        "--floor", type=existing, help="noise floors (default: the published ones and those beside the runs)"
    )
    parser.add_argument(
        "--published", type=existing, default=published.DEFAULT_PATH, help="published runs to set beside ours"
    )
    parser.add_argument(
        "--contrast",
        action="append",
        metavar="RECIPE:WEIGHT,...",
        help="judge each other recipe against this mixture, such as quartet2:.25,bf16:.75, or by ARM<... one arm, "
        "one-sided; RECIPE[nvfp4] is its loss under that forward (score.py); may be given several times",
    )
    parser.add_argument(
        "--margin", type=between(1e-9, 1), help="nats within which a contrast is equivalent (default: 3e-3); alone it "
        "judges each recipe against the baseline"
    )  # fmt: skip
    parser.add_argument("--wandb", metavar="PROJECT", help="also log plot and files, as an artifact, to this project")
    parser.add_argument("--wandb-offline", action="store_true", help="into a folder that `wandb sync` sends later")
    return parser.parse_args()


def judged(args: argparse.Namespace, groups: list[Group], base: Group, floor: Floor | None) -> list[Contrast] | None:
    """The contrasts that were asked for; None without any."""
    if args.contrast is None and args.margin is None:
        return None
    labels = [group.label for group in groups]
    asked = [contrasts.read(text, labels) for text in args.contrast or [f"{base.label}:1"]]
    return contrasts.contrasts(groups, asked, args.margin or MARGIN, floor)


def write(
    args: argparse.Namespace,
    out: Path,
    groups: list[Group],
    base: Group,
    rows: list[Row],
    notes: list[str],
    found: list[pairs.Pair],
    claims: list[Contrast] | None,
) -> list[Path]:
    """compare.{csv,md,png,html}, pairs.csv, served.csv where weights were scored, contrasts.csv for
    `claims`, in `out`; returns their paths."""
    from analysis import plots, report  # here: they import matplotlib

    points = published.load(args.published) if args.published.exists() else {}
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"compare.{suffix}" for suffix in ("csv", "md", "png", "html")] + [out / "pairs.csv"]
    write_text(paths[0], tables.to_csv(rows))
    below = [f"{tables.NOTE} {judged_by(rows, found)}", *(f"**Mixed:** {note}" for note in notes)]
    scored = served.served(groups, base)
    below += [served.markdown(scored)] if scored else []
    below += [] if claims is None else [f"```\n{contrasts.text(claims)}\n```"]
    write_text(paths[1], "\n\n".join([tables.markdown(rows).rstrip("\n"), *below]) + "\n")
    plots.save(plots.figure(groups, base, rows), paths[2])
    write_text(paths[3], report.build(groups, base, rows, notes, found, points))
    write_text(paths[4], pairs.to_csv(found))
    if scored:
        paths.append(out / "served.csv")
        write_text(paths[-1], served.to_csv(scored))
    if claims is not None:
        paths.append(out / "contrasts.csv")
        write_text(paths[-1], contrasts.to_csv(claims))
    return paths


def tree(groups: list[Group]) -> str:
    from analysis import forks  # here: it imports matplotlib

    return forks.text(forks.trees(groups))


def judged_by(rows: list[Row], found: list[pairs.Pair]) -> str:
    return f"{tables.methods(rows)} {pairs.text(found)}".rstrip()


def main() -> int:
    args = arguments()
    try:
        runs = find_runs(args.runs)
        notes = differences(runs)
        if notes and not args.allow_mixed:
            listing = "\n  ".join(notes)
            raise ValueError(f"these runs can't be compared:\n  {listing}\nLeave some out, or add --allow-mixed.")
        groups = group_runs(runs, args.step)
        base = pick_baseline(groups, args.baseline)
        floors = noise.load(args.floor) if args.floor else noise.known(runs[0].path.parent)
        floor = noise.floor_for(base.runs[0], floors)
        rows = table(groups, base, floor)
        order = [row.label for row in rows]
        groups.sort(key=lambda group: order.index(group.label))  # one order, so one colour, in all outputs
        found = pairs.pairs(groups, floor)
        claims = judged(args, groups, base, floor)
        paths = write(args, args.out or runs[0].path.parent / "compare", groups, base, rows, notes, found, claims)
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    for note in notes:
        print(f"MIXED: {note}")
    print(tables.text(rows), tables.NOTE, judged_by(rows, found), sep="\n\n")
    for more in (served.text(served.served(groups, base)), tree(groups)):
        if more:
            print("\n" + more)
    if claims is not None:
        print("\n" + contrasts.text(claims))
    print("", *verdict.sentences(rows, found), sep="\n")
    print("\nwritten: " + "  ".join(str(p) for p in paths))
    if args.wandb:
        try:
            print(f"W&B: {publish.to_wandb(paths, args.wandb, args.wandb_offline, order)}")
        except RuntimeError as error:
            print(f"compare: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
