"""Put small copies of runs into results/, from which anyone can redraw the figures.

python scripts/keep_results.py 'runs/corpus_ranking-*' --to results/corpus_ranking
python scripts/compare.py 'results/corpus_ranking/*'
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository first, whatever is installed

from base.commands import parser_of
from base.terminal import one_line_on_ctrl_c, positive, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("keep_results")

from analysis.keep import check_names, keep, last_evaluations
from analysis.runs import find_runs


def main() -> int:
    parser = parser_of(__file__, __doc__)
    parser.add_argument(
        "runs", nargs="+", help="run folders, or quoted globs; unfinished and diverged ones are kept too"
    )
    parser.add_argument("--to", type=Path, required=True, help="folder for the copies")
    parser.add_argument("--every", type=positive, default=10, help="training steps kept: every n-th and the last")
    args = parser.parse_args()
    try:
        runs = find_runs(args.runs)
        check_names(runs)
        kept = [keep(run, args.to, args.every, last_evaluations(runs)) for run in runs]
    except (ValueError, OSError) as error:
        print(f"keep_results: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for path in kept for file in path.rglob("*") if file.is_file())
    print(f"{len(kept)} runs, {size / 2**20:.1f} MiB: {args.to}")
    return 0


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
