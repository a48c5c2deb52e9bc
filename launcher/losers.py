"""Ends the losing arms of a grid: run_grid.py stop_losers=true. The rule is analysis/early.py's."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from analysis import early, states
from analysis.runs import read_run
from base.files import write_text
from base.runfolder import RUN, RunError
from launcher.lanes import Running

LOOK_S = 30.0  # seconds between two looks at a run


def mark_of(runs: Path, name: str) -> Path:
    """What says that the run was ended as a loser: it is saved, and goes on where losers aren't stopped."""
    return states.cell_lock(runs, name).with_suffix(".lost")


@dataclass
class Losers:
    """folders: of all runs of the grid, finished ones and those that are going on or will."""

    runs: Path
    names: dict[str, str]  # cell -> its run
    folders: Iterable[Path]
    said: dict[str, str] = field(default_factory=dict)  # cell -> why it was ended
    _looked: dict[str, float] = field(default_factory=dict)

    def has_lost(self, run: Running) -> bool:
        """Whether this run is to be stopped now; looks at it every LOOK_S at most, and says yes once."""
        name = self.names.get(run.job)  # None: several forks in one process, which are never judged
        if not name or run.job in self.said or time.monotonic() - self._looked.get(run.job, run.began) < LOOK_S:
            return False
        self._looked[run.job] = time.monotonic()
        try:
            mine = read_run(self.runs / name)
            if early.refusal(mine) or not len(mine.evals["step"]):
                return False
            share = float(mine.evals["step"][-1]) / mine.info["steps"]
            others = [read_run(folder) for folder in self.folders if (folder / RUN).exists()]
            found = early.lost(mine, early.rivals_of(mine, others), share)
        except (RunError, OSError):  # it has only begun, or is being written
            return False
        if found is None:
            return False
        leader, gap = found
        step = int(mine.evals["step"][-1])
        self.said[run.job] = f"ended at step {step:,}: {1e3 * gap:.1f}e-3 behind {leader.name}"
        content = {"step": step, "behind": gap, "leader": leader.name}
        write_text(mark_of(self.runs, name), json.dumps(content) + "\n")
        return True
