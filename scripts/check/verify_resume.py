"""Proof that a killed and resumed run is the uninterrupted one: losses, weights and optimizer state, bitwise.

    python scripts/check/verify_resume.py                            # llama_tiny, quartet2, 20 kills, on this machine
    python scripts/check/verify_resume.py --kills 5 model=llama_30m quant=sr batch.tokens=65536
    python scripts/check/verify_resume.py --worlds 1,2 --signal TERM # changes the number of processes at each start
    python scripts/check/verify_resume.py --damage 0.5               # half of the kills damage a checkpoint too

Runs `train.py` once without interruption and once with kills at random moments (start-up, training, in the middle of
a save), each followed by the same command. Then compares metrics.jsonl and the last checkpoint. With several world
sizes or parallel modes sums are formed in another order: the losses must then agree to --tolerance, not bitwise; the
samples consumed must still be the same at every step. Exit code 1 if anything differs.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from base.terminal import between, one_line_on_ctrl_c, positive  # noqa: E402

if __name__ == "__main__":
    one_line_on_ctrl_c("verify_resume")

from base.processes import kill_tree  # noqa: E402
from base.runfolder import CHECKPOINTS, read_metrics  # noqa: E402
from launcher.cells import layered  # noqa: E402
from training.checkpoint.manifest import checkpoints, latest_good  # noqa: E402
from training.checkpoint.state import read_all  # noqa: E402

# Small enough for 20 restarts on two cores, where starting Python takes most of the time.
TINY_MODEL = ["model=llama_tiny", "model.layers=1", "model.width=128", "model.heads=2", "model.hidden=128"]
TINY_MODEL += ["compile=false"]
TINY = [*TINY_MODEL, "quant=quartet2", "batch.seq_len=128", "batch.sequences=2", "batch.micro=1"]
TINY += ["evaluate.every=null", "evaluate.final_tokens=1024", "evaluate.slots=false"]
STALL_S = 600


@dataclass(frozen=True)
class Kill:
    """One start that was killed: when, after which completed step, and whether a save was in progress."""

    moment: str
    seconds: float
    step: int
    saving: bool
    returncode: int
    damage: str = ""


def command(arguments: argparse.Namespace, folder: Path, world: int, parallel: str) -> list[str]:
    usual = TINY if not any(o.startswith("model=") for o in arguments.overrides) else []
    # log.every: this script sees every step as it happens
    length = [f"steps={arguments.steps}", f"checkpoint.every={arguments.every}", "log.every=1"]
    places = [f"run.name={folder.name}", f"paths.runs={folder.parent}", f"parallel={parallel}"]
    overrides = layered(usual, length, arguments.overrides, places)
    launch = [sys.executable]
    if world > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return [*launch, str(REPOSITORY / "train.py"), *overrides]


def start(arguments: argparse.Namespace, folder: Path, world: int, parallel: str) -> subprocess.Popen:
    log = open(folder.parent / f"{folder.name}.log", "a")  # noqa: SIM115 - the child keeps it
    return subprocess.Popen(
        command(arguments, folder, world, parallel), stdout=log, stderr=log, start_new_session=True, cwd=REPOSITORY
    )


def train_lines(folder: Path) -> list[dict]:
    return [row for row in read_metrics(folder) if row["kind"] == "train"]


def last_step(folder: Path) -> int:
    return max((line["step"] for line in train_lines(folder)), default=0)


def is_saving(folder: Path) -> bool:
    root = folder / CHECKPOINTS
    return root.is_dir() and any(path.name.startswith(".tmp-step") for path in root.iterdir())


def damage_newest(folder: Path, draw: random.Random) -> str:
    """Cut, alter or remove one file of the newest checkpoint; says which. Only where an older one can step in."""
    found = checkpoints(folder / CHECKPOINTS)
    if len(found) < 2:
        return ""
    file = draw.choice(sorted(found[-1].iterdir()))
    how = draw.choice(["cut", "altered", "removed"])
    data = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    elif how == "cut":
        os.truncate(file, draw.randrange(len(data)))
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
    return f"  {found[-1].name}/{file.name} {how}"


@contextlib.contextmanager
def ended_with_us(process: subprocess.Popen):
    """No run goes on after Ctrl-C: it has a session of its own, which the keyboard doesn't reach."""
    try:
        yield
    except BaseException:
        kill_tree(process, signal.SIGKILL)
        raise


def wait_for(process: subprocess.Popen, condition, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    return False


def killed_start(arguments, folder: Path, world: int, parallel: str, moment: str, draw: random.Random) -> Kill | None:
    """Start the run and kill it at `moment`; None if it finished first."""
    begin, first = time.monotonic(), last_step(folder)
    process = start(arguments, folder, world, parallel)
    with ended_with_us(process):
        if moment == "start-up":
            wait_s = draw.uniform(0.5, 8)
            process_ended = not wait_for(process, lambda: time.monotonic() - begin > wait_s, STALL_S)
        elif moment == "save":
            process_ended = not wait_for(process, lambda: is_saving(folder), STALL_S)
            time.sleep(draw.uniform(0, 0.02))
        else:
            target = first + draw.randint(1, max(2, 2 * arguments.every))
            process_ended = not wait_for(process, lambda: last_step(folder) >= target, STALL_S)
            time.sleep(draw.uniform(0, arguments.step_seconds))
    if process_ended and process.poll() is not None:
        if process.returncode:
            raise SystemExit(f"the run failed by itself (exit code {process.returncode}); see {folder}.log")
        return None
    saving = is_saving(folder)
    code = kill_tree(process, getattr(signal, f"SIG{arguments.signal}"))
    return Kill(moment, time.monotonic() - begin, last_step(folder), saving, code)


def run_to_end(arguments: argparse.Namespace, folder: Path, world: int, parallel: str) -> None:
    process = start(arguments, folder, world, parallel)
    with ended_with_us(process):
        code = process.wait()
    if code:
        raise SystemExit(f"the run failed (exit code {code}); see {folder}.log")


def differing_tensors(left: Path, right: Path) -> list[str]:
    a, b = read_all(left), read_all(right)
    names = sorted(a.keys() ^ b.keys())
    return names + [name for name in sorted(a.keys() & b.keys()) if not a[name].equal(b[name])]


def compare(straight: Path, broken: Path, steps: int, tolerance: float) -> list[str]:
    """What differs between the two finished runs; empty when nothing does."""
    a, b = train_lines(straight), train_lines(broken)
    faults = []
    for name, lines in (("uninterrupted", a), ("killed", b)):
        if [line["step"] for line in lines] != list(range(1, steps + 1)):
            faults.append(f"{name} run: metrics.jsonl doesn't have each of steps 1 to {steps} once")
    exact = tolerance == 0
    for x, y in zip(a, b, strict=False):
        if x["samples"] != y["samples"]:
            faults.append(f"step {x['step']}: other samples")
        elif abs(x["loss"] - y["loss"]) > tolerance or (exact and x["grad_norm"] != y["grad_norm"]):
            faults.append(f"step {x['step']}: loss {x['loss']!r} and {y['loss']!r}")
    if exact:
        ends = [checkpoints(folder / CHECKPOINTS)[-1] for folder in (straight, broken)]
        faults += [f"{name}: differs in the last checkpoint" for name in differing_tensors(*ends)]
    return faults


HEADER = "kill  moment    after s  last step  in a save  next start resumes at"


def line(number: int, kill: Kill, resumed: int) -> str:
    saving = "yes" if kill.saving else "no"
    return f"{number:4}  {kill.moment:9} {kill.seconds:7.1f} {kill.step:10}  {saving:9} {resumed:5}{kill.damage}"


def good_step(folder: Path) -> int:
    path = latest_good(folder, say=lambda text: None)
    return 0 if path is None else int(path.name.removeprefix("step_"))


def interrupt_until_done(arguments: argparse.Namespace, folder: Path) -> list[Kill]:
    """Kill and restart until there were enough kills, then let the run finish. Prints a line for each kill."""
    draw = random.Random(arguments.random)
    worlds, modes = arguments.worlds.split(","), arguments.parallel.split(",")
    kills: list[Kill] = []
    print(HEADER, flush=True)
    while len(kills) < arguments.kills:
        world, mode = int(draw.choice(worlds)), draw.choice(modes)
        moment = ("training", "save", "training", "start-up")[len(kills) % 4]
        kill = killed_start(arguments, folder, world, mode, moment, draw)
        if kill is None:
            print(f"finished after {len(kills)} of {arguments.kills} kills; give more --steps for more", flush=True)
            return kills
        if draw.random() < arguments.damage:
            kill = replace(kill, damage=damage_newest(folder, draw))
        kills.append(kill)
        print(line(len(kills), kills[-1], good_step(folder)), flush=True)
    run_to_end(arguments, folder, int(draw.choice(worlds)), draw.choice(modes))
    return kills


def worlds(text: str) -> str:
    """An argparse type: whole numbers of at least 1 with commas between them."""
    for word in text.split(","):
        positive(word)
    return text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="config overrides as for train.py")
    parser.add_argument("--steps", type=positive, default=120, help="length of the run")
    parser.add_argument("--every", type=positive, default=4, help="steps between checkpoints")
    parser.add_argument("--kills", type=positive, default=20)
    parser.add_argument(
        "--damage", type=between(0, 1), default=0.0, help="share of kills that also damage a checkpoint"
    )
    parser.add_argument("--signal", default="KILL", choices=["KILL", "TERM", "USR1", "INT"])
    parser.add_argument("--worlds", type=worlds, default="1", help="numbers of processes to choose from, such as 1,2")
    parser.add_argument("--parallel", default="auto", help="parallel modes to choose from, such as ddp,fsdp")
    parser.add_argument(
        "--tolerance", type=between(0, 1), help="nats; default 0 (bitwise), 1e-3 if worlds or modes vary"
    )
    parser.add_argument("--random", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--step-seconds", type=between(0, 3600), default=1.0, help="spread of a kill within a step")
    parser.add_argument("--folder", help="where the runs go; default a new temporary folder")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.tolerance is None:
        arguments.tolerance = 1e-3 if "," in arguments.worlds + arguments.parallel else 0.0
    root = Path(arguments.folder or tempfile.mkdtemp(prefix="verify_resume_"))
    root.mkdir(parents=True, exist_ok=True)
    straight, broken = root / "straight", root / "killed"
    world, mode = int(arguments.worlds.split(",")[0]), arguments.parallel.split(",")[0]
    print(f"{root}: {arguments.steps} steps, a checkpoint every {arguments.every}", flush=True)
    run_to_end(arguments, straight, world, mode)
    kills = interrupt_until_done(arguments, broken)
    faults = compare(straight, broken, arguments.steps, arguments.tolerance)
    how = "bitwise" if arguments.tolerance == 0 else f"to {arguments.tolerance:g} nats"
    inside = sum(kill.saving for kill in kills)
    print(f"{len(kills)} kills ({arguments.signal}), {inside} of them in a save; compared {how}: ", end="")
    print("equal" if not faults else f"{len(faults)} differences\n  " + "\n  ".join(faults[:20]))
    if not kills:
        print("no start was killed before its end, so nothing is proved: give more --steps")
    return 1 if faults or not kills else 0


if __name__ == "__main__":
    sys.exit(main())
