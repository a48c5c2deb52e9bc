"""Measure how far runs of one recipe end apart, and cache it for compare.py's verdicts.

python scripts/noise_floor.py 'runs/corpus_screen-*'
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository first, whatever is installed

from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("noise_floor")

from analysis import noise
from analysis.runs import find_runs
from base.files import write_json
from base.terminal import quiet_pipes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, or quoted globs; finished ones count")
    parser.add_argument("--cache", type=Path, default=noise.CACHE, help="the file that compare.py reads them from")
    parser.add_argument("--replace", action="store_true", help="even where the file has a floor from more runs")
    args = parser.parse_args()
    try:
        floors = noise.measure(find_runs(args.runs))
        if not floors:
            raise ValueError("no two finished runs differ in the seed alone; run another seed")
        print(noise.text(floors))
        cached = noise.load(args.cache)
        if not args.replace:
            noise.refuse_fewer(floors, cached, args.cache)
        args.cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.cache, cached | floors)
    except (ValueError, OSError) as error:
        print(f"noise_floor: {error}", file=sys.stderr)
        return 2
    print(f"written: {args.cache}")
    return 0


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
