"""Run what is missing of an experiment grid, one run a GPU, side by side.

Stopped runs go on, finished ones stay.

    python scripts/run_grid.py experiment=corpus_screen                          all GPUs of this machine
    python scripts/run_grid.py experiment=corpus_screen only='bf16/*,quartet2/*' gpus=0,1 per_gpu=2
    python scripts/run_grid.py experiment=c4_grid launcher=slurm slurm.partition=gpu slurm.timeout_min=1440

Own keys: only, launcher=local|slurm, gpus=all|0,1, per_gpu=1, list=false|true (say what would run, and stop), slurm.*,
in_one=1 (so many forks of one trunk, one after another in one process), trunks=keep|delete, stop_losers=false.
Everything else is passed to train.py. On a CPU one run at a time. Output of each run: <runs>/.grid/<run>.log.
A cell is locked while it runs, by the run itself: killing this script, even with -9, leaves the runs going, and a
second one started beside it or after it takes only what nobody runs. Ctrl-C, SIGTERM and a closed terminal stop the
runs after their current step, saved; the same command goes on. On SLURM a cell whose job waits or runs is not submitted
again. A cell that diverged is a result, too: it is left alone unless nonfinite=skip or nonfinite=rollback is given. A
damaged one is named, left alone, and makes the exit code 1. A cell that is a fork waits until its parent, another cell
or a run that is there, has the checkpoint; a trunk is run for its checkpoints even where its result is kept elsewhere.
trunks=delete: when no cell of the grid needs them any more, a trunk's checkpoints but the last are deleted.
stop_losers=true: an arm that is 15e-3 behind the leading 4-bit arm of its seed after a quarter of its steps, or 5e-3
after half of them, is stopped, saved, and left alone from then on; without the key it goes on (scripts/early.py).
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository first, whatever is installed

from base.commands import spelled
from base.terminal import one_line_on_ctrl_c, outlive_readers, quiet_pipes

if __name__ == "__main__":
    one_line_on_ctrl_c("run_grid")

from analysis import states
from base.files import write_text
from base.fork import ForkError, name_of, parent_of
from base.ranks import RanksError, refuse_several
from base.runfolder import CHECKPOINTS, RESULT, RunError
from launcher import cellline, slurm
from launcher.cells import CellError, folder_name
from launcher.cli import take_launcher
from launcher.compose import ConfigError
from launcher.lanes import Lane, Running, environment, gpu_lanes, keep_busy
from launcher.losers import Losers, mark_of
from launcher.slurm import TRAIN
from training.config import TrainConfig
from training.ranks.signals import EXIT_PREEMPTED, lock_file

# launcher= is taken off before these are read; here it is for the suggestion.
OWN = {"launcher": "local", "gpus": "all", "per_gpu": "1", "list": "false", "in_one": "1", "trunks": "keep"}
OWN |= {"stop_losers": "false"}
OVER = (states.DONE, states.DEAD, states.DIVERGED)
BESIDE = " + "  # between the cells of one process; none has it in its name


def look(line: cellline.CellLine) -> dict[str, states.State]:
    """{cell: state}. A trunk that is needed has that of its own folder: a copy elsewhere has no checkpoints."""
    looked = line.look()
    found = {cell: one.state for cell, one in looked.items()}
    needed = {trunk_of(line, cell) for cell in found if found[cell].status == states.MISSING} - {None}
    for cell, composed in line.cells.items():
        name = composed.config.run.name
        if name in needed and looked[cell].folder not in (None, line.runs / name):
            line.adopted.pop(cell, None)
            found[cell] = states.state_of(line.runs, name)
    return found


def check_trunks(line: cellline.CellLine) -> None:
    """CellError where overrides for all cells rename a trunk: its forks name it as the grid's file does."""
    names = {folder_name(line.experiment, cell): line.cells[cell].config.run.name for cell in line.cells}
    for cell in line.cells:
        trunk = trunk_of(line, cell)
        if trunk and names.get(trunk, trunk) != trunk:
            raise CellError(
                f"{' '.join(line.extra)}: the trunk {trunk} would be called {names[trunk]}, and {cell} is a fork of "
                f"{trunk}; set it in the base of configs/experiment/{line.experiment}.yaml"
            )


def trunk_of(line: cellline.CellLine, cell: str) -> str | None:
    """The name of the run that a cell is a fork of; None for no fork."""
    fork = line.cells[cell].config.fork
    return name_of(fork) if fork else None


def pending(line: cellline.CellLine, found: dict[str, states.State]) -> list[str]:
    """Cells that nobody has finished or is running, begun ones first: they are nearest to a result. Those that diverged
    only where the command says how to get past that: they would end as before."""
    begun = {states.STOPPED, states.DIVERGED} if mended(line) else {states.STOPPED}
    lost = set(losers(line))
    return [c for wanted in (begun, {states.MISSING}) for c in found if found[c].status in wanted and c not in lost]


def losers(line: cellline.CellLine) -> list[str]:
    """Cells that stop_losers=true ended, and that it leaves alone."""
    return [c for c in line.cells if line.is_true("stop_losers") and mark_of(line.runs, line.run_name(c)).exists()]


def command(line: cellline.CellLine, cell: str) -> list[str]:
    return [sys.executable, str(TRAIN), *words_of(line, cell)]


def words_of(line: cellline.CellLine, cell: str) -> list[str]:
    words = [f"experiment={line.experiment}", f"cell={cell}", *line.extra]
    if line.run_name(cell) != line.cells[cell].config.run.name:
        words.append(f"run.name={line.run_name(cell)}")  # it began under this name and goes on there
    return words


def mended(line: cellline.CellLine) -> str:
    """What the command says about non-finite values, where that gets past them; else ""."""
    policy = next(iter(line.cells.values())).config.nonfinite
    return "" if policy == "stop" else f"nonfinite={policy}"


def start(line: cellline.CellLine, cells: list[str], lane: Lane) -> Running | None:
    """Start one process that runs `cells`, one after another; those that another one holds or has finished by now are
    left alone, None where that leaves none. The child inherits the locks; its output is in the first one's log."""
    with locked(line, cells) as locks:
        if not locks:
            return None
        first, *others = locks
        words = [word for cell in others for word in ("--", *words_of(line, cell))]
        with open(states.cell_lock(line.runs, line.run_name(first)).with_suffix(".log"), "ab") as log:
            process = subprocess.Popen(
                [*command(line, first), *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(lane),
                pass_fds=tuple(locks.values()),
                start_new_session=True,  # Ctrl-C reaches us alone; we pass it on once
            )
        return Running(BESIDE.join(locks), lane, process)


@contextmanager
def locked(line: cellline.CellLine, cells: list[str]) -> Iterator[dict[str, int]]:
    """{cell: its open lock} of those that can be run; afterwards a child's copies keep them locked."""
    locks: dict[str, int] = {}
    try:
        for cell in cells:
            name = line.run_name(cell)
            path = states.cell_lock(line.runs, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                lock_file(descriptor)
                if (line.runs / name / RESULT).exists():
                    raise BlockingIOError
                locks[cell] = descriptor
            except BlockingIOError:
                print(f"{cell}: finished or running elsewhere, left alone", flush=True)
                os.close(descriptor)
        yield locks
    finally:
        for descriptor in locks.values():
            os.close(descriptor)


def run_local(line: cellline.CellLine) -> int:
    """Keep every GPU busy until nothing is left. Returns 1 if a run failed or is damaged, 75 if stopped, else 0."""
    judges = line.is_true("stop_losers")
    lanes = gpu_lanes(line.own["gpus"], int(line.own["per_gpu"]))
    outlive_readers()  # `| head` ends no grid
    found = look(line)
    has_problems = states.tell_problems(found)
    queue, failed = pending(line, found), []
    counts = states.counted(found.values())
    print(
        f"{line.experiment}: {len(found)} cells, {len(queue)} to run, {len(lanes)} at a time; so far {counts}",
        flush=True,
    )

    judge = Losers(line.runs, {cell: line.run_name(cell) for cell in line.cells}, folders_of(line) if judges else [])

    def ended(run: Running, queued: int, running: int, stopping: bool) -> None:
        for cell in run.job.split(BESIDE):
            state = report(line, run, cell, queued, running)
            if cell in judge.said:
                print(f"{cell}: {judge.said[cell]}; without stop_losers=true it goes on", flush=True)
            elif run.process.returncode and not stopping and state.status not in OVER[:-1]:
                failed.append(cell)

    stopping = keep_busy(
        queue,
        lanes,
        start=lambda cell, lane: begin(line, beside(line, cell, queue), lane),
        ended=ended,
        forward=lambda process, number: process.send_signal(signal.SIGTERM),
        ready=lambda queue: next_ready(line, queue),
        has_lost=judge.has_lost if judges else lambda run: False,
    )
    for cell in [c for c, state in look(line).items() if state.status == states.DIVERGED]:
        hint = (
            f" in spite of {mended(line)}"
            if mended(line)
            else ", left as it is; nonfinite=skip or nonfinite=rollback would go on"
        )
        print(f"{cell}: diverged{hint}")
    for cell in [] if stopping else queue:
        print(f"{cell}: left alone, fork={line.cells[cell].config.fork} has no checkpoint to go on from")
    if not stopping and line.own["trunks"] == "delete":
        delete_trunks(line)
    for cell in failed:
        print(f"FAILED {cell}: see {states.cell_lock(line.runs, line.run_name(cell)).with_suffix('.log')}")
    return 1 if failed or has_problems or (queue and not stopping) else EXIT_PREEMPTED if stopping else 0


def folders_of(line: cellline.CellLine) -> list[Path]:
    """Of all runs of the grid: where results are kept, or where the cell runs or will."""
    looked = line.look()
    return [found.folder or line.runs / line.run_name(cell) for cell, found in looked.items()]


def next_ready(line: cellline.CellLine, queue: list[str]) -> str | None:
    """The first cell that can start: a fork waits for its parent's checkpoint, which another cell may be making."""
    return next((cell for cell in queue if is_ready(line.cells[cell].config)), None)


def is_ready(config: TrainConfig) -> bool:
    if config.fork is None:
        return True
    try:
        return parent_of(config.fork, config.paths.runs).checkpoint.exists()
    except ForkError:
        return False


def beside(line: cellline.CellLine, cell: str, queue: list[str]) -> list[str]:
    """A cell and the forks of the same trunk that go into its process; these are taken out of the queue."""
    taken, trunk = [cell], trunk_of(line, cell)
    for other in list(queue) if trunk else []:
        if (
            len(taken) < int(line.own["in_one"])
            and trunk_of(line, other) == trunk
            and is_ready(line.cells[other].config)
        ):
            queue.remove(other)
            taken.append(other)
    return taken


def begin(line: cellline.CellLine, cells: list[str], lane: Lane) -> Running | None:
    run = start(line, cells, lane)
    if run is not None:
        print(f"{run.job}: started on {run.place}, pid {run.process.pid}", flush=True)
    return run


def report(line: cellline.CellLine, run: Running, cell: str, queued: int, running: int) -> states.State:
    state = states.state_of(line.runs, line.run_name(cell))
    loss = "" if state.loss is None else f", final loss {state.loss:.4f}"
    code = run.process.returncode
    print(
        f"{cell}: {state.status} at step {state.step} after {run.minutes:.1f} min (exit code {code})"
        f"{loss}; {running} running, {queued} waiting",
        flush=True,
    )
    return state


def delete_trunks(line: cellline.CellLine) -> None:
    """Delete the checkpoints but the last of every trunk of the chosen cells whose forks, chosen or not, are over."""
    from training.checkpoint.manifest import checkpoints  # here: torch takes seconds

    whole = cellline.read([f"experiment={line.experiment}", *line.extra], OWN)
    found = look(whole)
    for trunk in sorted({trunk_of(line, cell) for cell in line.cells} - {None}):
        left = [c for c in whole.cells if trunk_of(whole, c) == trunk and found[c].status not in OVER]
        old = checkpoints(line.runs / trunk / CHECKPOINTS)[:-1]
        if left and old:
            print(f"{trunk}: its checkpoints stay, {len(left)} forks of it are left, such as {left[0]}")
        elif old and states.state_of(line.runs, trunk).status in OVER:
            for path in old:
                shutil.rmtree(path)
            print(f"{trunk}: {len(old)} checkpoints deleted, its last one stays")


def submit(line: cellline.CellLine, options: dict[str, str]) -> int:
    """One job array of what is missing and not in the queue; see launcher/slurm.py. Locks don't tell: a waiting job has
    none, and a running one's may not be seen from this machine."""
    folder = line.runs / ".grid" / "slurm"
    with submitting(folder):
        records = {cell: states.cell_lock(line.runs, line.run_name(cell)).with_suffix(".job") for cell in line.cells}
        waiting, found, cells = slurm.jobs_in_queue(options), look(line), []
        for cell in pending(line, found):
            job = records[cell].read_text() if records[cell].exists() else None
            if job in waiting:
                print(f"{cell}: in the queue as job {job}, left alone")
            elif not is_ready(line.cells[cell].config):
                print(f"{cell}: its parent has no such checkpoint yet; run the same command again when it has")
            else:
                cells.append(cell)
        jobs = slurm.submit(line.experiment, folder, [command(line, cell) for cell in cells], options)
        for cell, job in zip(cells, jobs, strict=True):
            write_text(records[cell], job)
            print(f"{cell}: submitted as job {job}")
    print(f"{line.experiment}: {len(cells)} of {len(found)} cells submitted; so far {states.counted(found.values())}")
    return int(states.tell_problems(found))


@contextmanager
def submitting(folder: Path) -> Iterator[None]:
    """One at a time: between the look at the queue and the jobs' records nobody else submits. CellError if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock_file(descriptor)
        yield
    except BlockingIOError:
        raise CellError(f"another run_grid.py is submitting into {folder}; wait, then give the command again") from None
    finally:
        os.close(descriptor)


def main(words: list[str]) -> int:
    if not words or {"-h", "--help"} & {*words}:
        print(spelled(__doc__))
        return 0 if words else 2
    try:
        refuse_several("run_grid.py")
        rest, options = take_launcher(words)
        line = cellline.read(rest, OWN)
        check_trunks(line)
        name, first = next(iter(line.cells.items()))
        if first.config.dry_run:
            shown = f"train.py experiment={line.experiment} cell={name} dry_run=true"
            raise CellError(f"dry_run=true runs no cell: list=true lists them; {shown} shows a plan")
        for key in ("per_gpu", "in_one"):
            if not line.own[key].isdecimal() or int(line.own[key]) < 1:
                raise CellError(f"{key}={line.own[key]}: give a whole number, 1 or more")
        if line.own["trunks"] not in ("keep", "delete"):
            raise CellError(f"trunks={line.own['trunks']}: write trunks=keep or trunks=delete")
        if line.is_true("stop_losers") and options is not None:
            raise CellError("stop_losers=true judges runs of this machine; leave it out with launcher=slurm")
        if options is not None and (line.own["in_one"], line.own["trunks"]) != (OWN["in_one"], OWN["trunks"]):
            raise CellError("in_one= and trunks= are of runs on this machine: leave them out beside launcher=slurm")
        if line.is_true("list"):
            found = look(line)
            for cell in pending(line, found):
                print(shlex.join(command(line, cell)))
            return int(states.tell_problems(found))
        return run_local(line) if options is None else submit(line, options)
    except (CellError, ConfigError, RanksError, RunError, OSError) as error:
        print(f"run_grid: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while the grid is read: later, run_local takes it
        print("run_grid: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    quiet_pipes()
    sys.exit(main(sys.argv[1:]))
