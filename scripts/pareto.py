"""Loss against predicted time to equal loss on Blackwell GPUs, of runs: figure, table and CSV.

    python scripts/pareto.py 'runs/*' --baseline bf16 --out pareto
    python scripts/pareto.py 'runs/*' --slope .2          # nats a factor e of tokens, in place of the published law's

Step times are those of scripts/price.py: a roofline, nothing was run there. A fork costs its parent's
steps up to where it begins, so its parent is given, too. A run is priced by its own command; one whose
command means another recipe by now is left out, and named.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository first, whatever is installed

from base.commands import parser_of
from base.terminal import between, one_line_on_ctrl_c, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("pareto")

from analysis import noise, pareto
from analysis.alike import differences
from analysis.compare import Group, group_runs, pick_baseline, table
from analysis.runs import Run, find_runs
from base.files import write_text
from base.runfolder import RunError
from launcher.compose import Composer, ConfigError
from launcher.naming import Text
from scripts.price import MACHINES, mean_step
from training.ranks.distributed import Dist
from training.start.describe import Checked, check

NOT_NUMERICS = ("run.", "paths.", "fork=", "checkpoint.", "logger.", "log.")
CERTAIN = 1.96  # standard deviations of a normal distribution: 95 %
SHOWN = 3  # of the keys that differ


class Pricer:
    """Predicted milliseconds of whole runs on MACHINES; a run that is the parent of others is found among `runs`."""

    def __init__(self, runs: list[Run]):
        self.by_hash = {run.info["hash"]: run for run in runs}
        self.composer = Composer()
        self.found: dict[str, list[float]] = {}

    def total(self, run: Run) -> list[float]:
        """Of all its steps, those of its parents included."""
        return self.until(run, run.info["steps"])

    def until(self, run: Run, step: int) -> list[float]:
        """Of the steps before `step`, at the run's mean time of a step."""
        begins = int(run.info.get("parent", {}).get("step", 0))
        own = [(step - begins) * ms for ms in self.step(run)]
        return own if not begins else [a + b for a, b in zip(own, self.until(self.parent(run), begins), strict=True)]

    def step(self, run: Run) -> list[float]:
        """Mean over the steps that its own command runs, on each machine. RunError where it has no price."""
        key = run.info["hash"]
        if key not in self.found:
            try:
                checked = self.checked(run)
                self.found[key] = [mean_step(checked, machine).total for machine in MACHINES]
            except ValueError as error:
                raise RunError(f"{run.name}: no price, {error}") from None
        return self.found[key]

    def checked(self, run: Run) -> Checked:
        """What it computes by. ValueError where its command doesn't say that any more."""
        import torch

        config = self.composer.compose(self.words(run), typed=False).config
        now = self.composer.numerics.of(config, Text(run.info["vocab_size"]))
        then = run.info["numerics"]
        keys = [key for key in now.keys() | then.keys() if key.startswith(("quant.", "model.", "phases"))]
        if other := sorted(key for key in keys if now.get(key) != then.get(key)):
            raise ValueError(f"its command means another recipe by now: {', '.join(other[:SHOWN])}")
        return check(config, Dist(0, 1, 0, torch.device("cpu")), run.info["vocab_size"])

    def words(self, run: Run) -> list[str]:
        """Overrides that compose to it: its own over its parent's."""
        said = shlex.split(str(run.info["command"]))
        own = [word for word in said if "=" in word and not word.startswith(NOT_NUMERICS)]
        is_cell = any(word.startswith("cell=") for word in own)  # which says everything itself
        return own if "parent" not in run.info or is_cell else [*self.words(self.parent(run)), *own]

    def parent(self, run: Run) -> Run:
        parent = run.info["parent"]
        if parent["hash"] not in self.by_hash:
            raise RunError(f"{run.name} is a fork of {parent['name']}, which is not among the runs: give it, too")
        return self.by_hash[parent["hash"]]


def points(groups: list[Group], base: Group, args: argparse.Namespace) -> dict[str, list[pareto.Point]]:
    """{GPU: a point a recipe, the baseline first}; what has no price is named on standard error."""
    runs = [run for group in groups for run in group.members]
    pricer, found = Pricer(runs), {machine.name: [] for machine in MACHINES}
    info = base.runs[0].info
    slope = args.slope or pareto.slope_of_law(info["parameters_non_embedding"], info["tokens"])
    by_label = {group.label: group for group in groups}
    plain = pricer.total(base.runs[0])
    floor = noise.floor_for(base.runs[0], noise.known(base.runs[0].path.parent))
    for row in table(groups, base, floor):
        try:
            times = pricer.total(by_label[row.label].runs[0])
        except RunError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        gap, half = (row.gap.mean, row.gap.half_width) if row.gap else (0.0, math.nan)
        if row.gap and args.sd and row.seeds == 1:
            half = CERTAIN * args.sd
        for machine, ms, theirs in zip(MACHINES, times, plain, strict=True):
            if math.isfinite(gap):
                point = pareto.Point(row.label, machine.name, row.seeds, gap, half, ms / theirs, slope, args.doubt)
                found[machine.name].append(point)
    source = "given" if args.slope else "of the published law"
    print(f"Slope: {slope:.3f} nats a factor e of tokens, {source}; its doubt {args.doubt:.0%} (1 sd, a guess).")
    print("Step times: a roofline, nothing was run on these GPUs.\n")
    return found


def arguments() -> argparse.Namespace:
    parser = parser_of(__file__, __doc__)
    parser.add_argument("runs", nargs="+", help="run folders, or quoted globs")
    parser.add_argument("--baseline", help="recipe to reach (default: bf16, else the first)")
    parser.add_argument("--slope", type=between(1e-6, 10), help="nats a factor e of tokens")
    parser.add_argument(
        "--doubt", type=between(0, 1), default=pareto.DOUBT, help="of the slope, as a share of it (1 sd)"
    )
    parser.add_argument("--sd", type=between(0, 1), help="of a gap of one seed, nats (default: such gaps have no bar)")
    parser.add_argument("--out", type=Path, help="folder for pareto.png and pareto.csv (default: beside the first run)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    try:
        runs = find_runs(args.runs)
        if notes := differences(runs):
            raise ValueError(f"these runs can't be compared: {'; '.join(notes)}; leave some out")
        groups = group_runs(runs)
        found = points(groups, pick_baseline(groups, args.baseline), args)
        out = args.out or runs[0].path.parent / "compare"
        out.mkdir(parents=True, exist_ok=True)
        pareto.figure(found).savefig(out / "pareto.png", dpi=120, metadata={"Software": None})
        write_text(out / "pareto.csv", pareto.to_csv(found))
    except (ValueError, ConfigError, OSError) as error:
        print(f"pareto: {error}", file=sys.stderr)
        return 2
    print(pareto.text(found), f"\nwritten: {out / 'pareto.png'}  {out / 'pareto.csv'}", sep="\n")
    return 0


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main())
