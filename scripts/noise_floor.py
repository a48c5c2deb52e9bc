"""Measure how far apart runs of one recipe end; compare.py takes its intervals from that.

python scripts/noise_floor.py 'runs/corpus_screen-*'
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository first, whatever is installed

from base.commands import parser_of
from base.terminal import one_line_on_ctrl_c, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("noise_floor")

from analysis import noise
from analysis.runs import find_runs
from base.files import write_json


def main() -> int:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("runs", nargs="+", help="run folders, or quoted globs; finished ones count")
    parser.add_argument(
        "--cache", type=Path, help=f"the file for them (default: {noise.NAME} beside the runs, where compare.py looks)"
    )
    parser.add_argument("--replace", action="store_true", help="even where the file has a floor from more runs")
    args = parser.parse_args()
    try:
        runs = find_runs(args.runs)
        floors, path = noise.measure(runs), args.cache or runs[0].path.parent / noise.NAME
        if not floors:
            raise ValueError("no two finished runs differ in the seed alone; run another seed")
        print(noise.text(floors))
        cached = noise.load(path)
        if not args.replace:
            noise.refuse_fewer(floors, cached, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, cached | floors)
    except (ValueError, OSError) as error:
        print(f"noise_floor: {error}", file=sys.stderr)
        return 2
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
