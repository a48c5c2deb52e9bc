"""Several GPUs of one node, checked and measured. Run by hand; prints tables, leaves JSON and one table in --out.

    python scripts/check/check_ranks.py all    # every part below in this order, those that 25 minutes allow; unattended
    python scripts/check/check_ranks.py equal  # 1, 2, 4, 8 GPUs, every way to share: same samples, same curve to noise
    python scripts/check/check_ranks.py scale  # tokens/s of llama_100m (DDP) from 1 GPU to all
    python scripts/check/check_ranks.py muon   # nanochat_1b9 at its batch on all GPUs: MFU, memory, losses, run's hours
    python scripts/check/check_ranks.py large  # llama_1b9: MFU, memory, save stall, preemption, time to resume, scaling
    python scripts/check/check_ranks.py resume # kill -9 and resume: bitwise on the same GPUs, to noise on others
    python scripts/check/check_ranks.py faults # a rank dies, or the job is preempted: who stops, how fast, what is said

`--data` takes overrides that choose the text (default: data=pydocs). Every run is `torchrun train.py`, so that what is
measured is what users get; --gpus limits the number of GPUs. Parts that time nothing run their cases side by side.
HSDP takes the halves of the GPUs for two nodes. Each case is written as soon as it is there; a case that fails doesn't
stop the others. `--rehearse` puts a tiny model in place of every other and takes --gpus processes (2) on a CPU. Exit
code 1 if a case fails or shows what it looks for: other samples or losses beyond --tolerance (equal), a resumed run
that differs (resume), orphans (faults, large), a loss that doesn't fall (muon).
"""

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("check_ranks")

import torch
from verify_resume import REPOSITORY, TINY_MODEL, last_step, train_lines, wait_for

from base.files import write_json, write_text
from base.processes import descendants, kill_tree, send
from base.runfolder import CHECKPOINTS, read_metrics
from launcher.cells import layered

QUIET = ["evaluate.every=null", "evaluate.final_tokens=8192", "evaluate.slots=false"]
RECIPES = ("bf16", "quartet2")
ENDLESS = "steps=100000"  # of a run that we end
LIMIT_S = 600
ALL_S = 1500  # what `all` may take
MOST_REHEARSED = 8
# Ranks on the halves of this machine, as if these were nodes; each sees its half of the GPUs.
TWO_NODES = (
    "n=$((LOCAL_WORLD_SIZE / 2)); first=$((LOCAL_RANK / n * n)); "
    "export CUDA_VISIBLE_DEVICES=$(seq -s, $first $((first + n - 1))); "
    'export LOCAL_RANK=$((LOCAL_RANK % n)) LOCAL_WORLD_SIZE=$n; exec "$0" "$@"'
)
# The published run of 1.9B parameters, 37.6B tokens (configs/experiment/nanochat.yaml); 40 of its 71,680 steps.
MUON = ["optim=muon", "schedule=wsd"]
MUON_STEPS, MUON_RUN_STEPS, REHEARSED_STEPS = 40, 71_680, 12
RUNNING: list[subprocess.Popen] = []

Case = tuple[str, dict[str, Any]]


class Failed(RuntimeError):
    """A run ended with an error; the message has the end of its log."""


def size(arguments: argparse.Namespace, model: str, seq_len: int, micro: int, sequences: int) -> list[str]:
    """Model and batch. In a rehearsal the tiny model with as many micro-batches of one sequence of 128."""
    if arguments.rehearse:
        return [*TINY_MODEL, "batch.seq_len=128", "batch.micro=1", f"batch.sequences={max(2, sequences // micro)}"]
    batch = [f"batch.seq_len={seq_len}", f"batch.micro={micro}", f"batch.sequences={sequences}"]
    return [f"model={model}", *batch]


def start(arguments: argparse.Namespace, name: str, world: int, *overrides: str, gpu: int = 0) -> subprocess.Popen:
    """train.py on `world` GPUs; one process takes GPU number `gpu`. Output goes to <out>/<name>.log."""
    launch, environment = [sys.executable], dict(os.environ)
    if world > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        if "parallel=hsdp" in overrides:
            launch += ["--no-python", "sh", "-c", TWO_NODES, sys.executable]
    else:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    places = [f"paths.runs={arguments.out}", f"run.name={name}"]
    words = layered(arguments.data.split(), QUIET, overrides, places)
    command = [*launch, str(REPOSITORY / "train.py"), *words]
    with open(arguments.out / f"{name}.log", "a") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=REPOSITORY, env=environment, start_new_session=True
        )
    RUNNING.append(process)
    return process


def limit_s(arguments: argparse.Namespace) -> float:
    """What a run may take."""
    return max(1.0, min(LIMIT_S, arguments.ends - time.monotonic()))


def ended(arguments: argparse.Namespace, process: subprocess.Popen, why: Callable[[], str]) -> int:
    """Its exit code. Raises Failed, nothing of it left, where its time is over."""
    limit = limit_s(arguments)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        kill_tree(process, signal.SIGKILL)
        raise Failed(f"not done after {limit:.0f} s; {why()}") from None


def train(arguments: argparse.Namespace, name: str, world: int, *overrides: str, gpu: int = 0) -> Path:
    """Train to the end; the run folder. Raises Failed."""
    begin = time.monotonic()
    code = ended(arguments, start(arguments, name, world, *overrides, gpu=gpu), lambda: log_end(arguments, name))
    print(f"  {name}: {time.monotonic() - begin:.0f} s, exit code {code}", flush=True)
    if code:
        raise Failed(log_end(arguments, name))
    return arguments.out / name


def train_until(arguments: argparse.Namespace, name: str, world: int, step: int, *overrides: str, gpu: int = 0) -> Path:
    """Train until `step` is logged, then kill -9; the run folder. Raises Failed."""
    process = start(arguments, name, world, *overrides, ENDLESS, gpu=gpu)
    until_step(arguments, process, name, step)
    kill_tree(process, signal.SIGKILL)
    print(f"  {name}: step {last_step(arguments.out / name)}", flush=True)
    return arguments.out / name


def until_step(arguments: argparse.Namespace, process: subprocess.Popen, name: str, step: int) -> None:
    if not wait_for(process, lambda: last_step(arguments.out / name) >= step, limit_s(arguments)):
        kill_tree(process, signal.SIGKILL)
        raise Failed(log_end(arguments, name))


def log_end(arguments: argparse.Namespace, name: str) -> str:
    return f"{name}: {(arguments.out / f'{name}.log').read_text()[-1500:]}"


def rows(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_metrics(folder) if row["kind"] == kind]


def worlds(arguments: argparse.Namespace) -> list[int]:
    return [n for n in (1, 2, 4, 8) if n <= arguments.gpus]


def attempt(function: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """The case's values, or why there are none."""
    try:
        return function(*given)
    except Exception as error:  # whatever it is, the other cases' measurements must not be lost
        return {"failed": f"{type(error).__name__}: {error}"}


def side_by_side(cases: dict[str, tuple]) -> Iterator[Case]:
    """Cases as they end, all started at once. Each: a function and its arguments."""
    with ThreadPoolExecutor(len(cases)) as pool:
        futures = {pool.submit(attempt, *case): name for name, case in cases.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()


def equal(arguments: argparse.Namespace) -> Iterator[Case]:
    """Largest difference of loss and gradient norm from one GPU, per recipe, world size and mode."""
    batch = [*size(arguments, "llama_30m", 512, 8, 64), "steps=20", "log.every=5", "checkpoint.every=null"]
    runs = {
        f"{recipe} {mode} x{world}": (recipe, world, mode)
        for recipe in RECIPES
        for world in worlds(arguments)
        for mode in modes(world)
    }

    def one(recipe: str, world: int, mode: str) -> dict[str, Any]:
        name = f"equal-{recipe}-{world}-{mode}"
        gpu = RECIPES.index(recipe) % arguments.gpus
        folder = train(arguments, name, world, f"quant={recipe}", f"parallel={mode}", *batch, gpu=gpu)
        return {"rows": rows(folder, "train")}

    found: dict[str, dict[str, Any]] = {}
    waiting = [name for name, (_, world, _) in runs.items() if world > 1]
    for ended, values in side_by_side({name: (one, *run) for name, run in runs.items()}):
        found[ended] = values
        for name in [name for name in waiting if {name, single(name)} <= found.keys()]:
            waiting.remove(name)
            yield name, attempt(difference, found[single(name)], found[name])


def modes(world: int) -> tuple[str, ...]:
    """Ways to share a model over so many GPUs of one machine."""
    return ("auto",) if world == 1 else ("ddp", "fsdp") if world < 4 else ("ddp", "fsdp", "hsdp")


def single(name: str) -> str:
    """The run on one GPU that a run of `equal` is compared with."""
    return f"{name.split()[0]} auto x1"


def difference(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    if failed := base.get("failed") or other.get("failed"):
        raise Failed(failed)
    pairs = list(zip(base["rows"], other["rows"], strict=True))
    return {
        "same_samples": all(a["samples"] == b["samples"] for a, b in pairs),
        "first_loss_difference": abs(pairs[0][0]["loss"] - pairs[0][1]["loss"]),
        "first_norm_ratio": abs(pairs[0][1]["grad_norm"] / pairs[0][0]["grad_norm"] - 1),
        "largest_loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        "largest_norm_ratio": max(abs(b["grad_norm"] / a["grad_norm"] - 1) for a, b in pairs),
        "losses": [pairs[0][0]["loss"], pairs[-1][0]["loss"]],
    }


def resume(arguments: argparse.Namespace) -> Iterator[Case]:
    """scripts/check/verify_resume.py on the GPUs: its exit codes and last words."""
    batch = [*size(arguments, "llama_30m", 512, 4, 32), *arguments.data.split(), *QUIET, "quant=quartet2"]
    most = worlds(arguments)[-1]
    everything = [f"--worlds={','.join(map(str, worlds(arguments)))}", "--parallel=ddp,fsdp"]
    cases = {
        "1 GPU, bitwise": ["--worlds=1", "--kills=2", "compile=false"],
        f"{most} GPUs, DDP, bitwise": [f"--worlds={most}", "--parallel=ddp", "--kills=2", "compile=false"],
        f"{most} GPUs, FSDP, compiled, bitwise": [f"--worlds={most}", "--parallel=fsdp", "--kills=1"],
        "any number of GPUs, DDP and FSDP": [
            *everything,
            f"--tolerance={arguments.tolerance}",
            "--kills=3",
            "compile=false",
            "optim.lr=1e-4",  # at the preset's rate such small batches train so wildly that noise grows to 0.1 nats
        ],
    }
    steps = [f"--steps={12 if arguments.rehearse else 60}", "--every=4", "--step-seconds=0.3"]

    def one(number: int, options: list[str]) -> dict[str, Any]:
        folder = f"--folder={arguments.out / f'resume-{number}'}"
        ordered = sorted([*options, folder, *steps, *batch], key=lambda word: not word.startswith("--"))
        script = [sys.executable, str(REPOSITORY / "scripts" / "check" / "verify_resume.py"), *ordered]
        with open(arguments.out / f"resume-{number}.log", "w") as log:
            process = subprocess.Popen(script, stdout=log, stderr=log, start_new_session=True)
        RUNNING.append(process)
        code = ended(arguments, process, lambda: f"see resume-{number}.log")
        said = (arguments.out / f"resume-{number}.log").read_text()
        return {"exit_code": code, "says": said[said.rfind(" kills (") - 2 :][:600] if not code else said[-1500:]}

    yield from side_by_side({name: (one, i, options) for i, (name, options) in enumerate(cases.items())})


def ranks_of(launcher: int) -> dict[int, int]:
    """{rank: pid} of torchrun's children."""
    found = {}
    for pid in descendants(launcher):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        rank = next((int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")), None)
        if rank is not None and int(stat[1]) == launcher:
            found[rank] = pid
    return found


def alive(pid: int) -> bool:
    """Whether it runs; a zombie that nobody has waited for doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stop_by(process: subprocess.Popen, pids: list[int], number: int) -> dict[str, Any]:
    """Signal `pids` and time what follows: the launcher's exit and the end of every process below it."""
    everyone, begin = descendants(process.pid), time.monotonic()
    for pid in pids:
        send(pid, number)
    try:
        code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        code = kill_tree(process, signal.SIGKILL)
    exit_s = time.monotonic() - begin
    while any(map(alive, everyone)) and time.monotonic() - begin < exit_s + 20:
        time.sleep(0.1)
    left = [pid for pid in everyone if alive(pid)]
    return {"exit_code": code, "exit_s": exit_s, "all_gone_s": time.monotonic() - begin, "orphans": len(left)}


def faults(arguments: argparse.Namespace) -> Iterator[Case]:
    """One rank killed; SIGTERM to the ranks (as SLURM does) and to the launcher."""
    batch = [*size(arguments, "llama_30m", 512, 4, 32), "quant=quartet2", "compile=false", ENDLESS, "log.every=1"]

    def one(name: str, parallel: str, who: str, number: int) -> dict[str, Any]:
        process = start(arguments, name, worlds(arguments)[-1], *batch, f"parallel={parallel}", "checkpoint.every=4")
        until_step(arguments, process, name, 6)
        ranks = ranks_of(process.pid)
        victims = {"rank 1": [ranks[1]], "ranks": list(ranks.values()), "launcher": [process.pid]}[who]
        found = stop_by(process, victims, number)
        log = (arguments.out / f"{name}.log").read_text()
        folder = arguments.out / name
        found |= {"last_step": last_step(folder), "checkpoints": checkpoint_steps(folder)}
        found["ranks_exited_with"] = sorted(set(re.findall(r"exitcode\s*: (-?\d+)", log)))
        found["interrupt_logged"] = any(row["event"] == "interrupt" for row in rows(folder, "event"))
        return found | {"errors": re.findall(r"^.*(?:Error|error|watchdog):? .*$", log, re.M)[:4]}

    yield from side_by_side(
        {
            "rank 1 killed, DDP": (one, "fault-ddp", "ddp", "rank 1", signal.SIGKILL),
            "rank 1 killed, FSDP": (one, "fault-fsdp", "fsdp", "rank 1", signal.SIGKILL),
            "SIGTERM to the ranks, DDP": (one, "fault-term", "ddp", "ranks", signal.SIGTERM),
            "SIGTERM to torchrun, FSDP": (one, "fault-launcher", "fsdp", "launcher", signal.SIGTERM),
        }
    )


def checkpoint_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / CHECKPOINTS).glob("step_*"))


def speed(folder: Path) -> dict[str, Any]:
    """Steady state: without the first steps (compilation). ms per step, tokens/s and MFU at the median."""
    train_rows = rows(folder, "train")[5:]
    middle = median(row["ms_per_step"] for row in train_rows)
    at_median = min(train_rows, key=lambda row: abs(row["ms_per_step"] - middle))
    expected = re.search(r"memory +([\d.]+) GiB(?: a GPU)? expected", (folder / "start.txt").read_text())
    peak = max(row["memory_gib"] for row in train_rows)
    return {
        "ms_min": min(row["ms_per_step"] for row in train_rows),
        "ms_median": middle,
        "tokens_per_second": at_median["tokens_per_second"],
        "mfu": at_median["mfu"],
        "peak_gib": peak,
        "expected_gib": float(expected[1]),
        "expected_over_peak": float(expected[1]) / peak,
        "first_step_s": rows(folder, "train")[0]["ms_per_step"] / 1e3,
    }


def scale(arguments: argparse.Namespace) -> Iterator[Case]:
    """llama_100m under DDP, the same work per GPU on more GPUs; the recipes side by side on one GPU each."""

    def one(recipe: str, world: int, gpu: int) -> dict[str, Any]:
        batch = size(arguments, "llama_100m", 512, 128, 256 * world)
        options = [f"quant={recipe}", "parallel=ddp", "steps=30", "log.every=5", "checkpoint.every=null"]
        return speed(train(arguments, f"scale-{recipe}-{world}", world, *batch, *options, *arguments.extra, gpu=gpu))

    alone = dict(side_by_side({recipe: (one, recipe, 1, gpu) for gpu, recipe in enumerate(RECIPES)}))
    yield from ((f"{recipe} x1", values) for recipe, values in alone.items())
    for recipe in RECIPES:
        for world in worlds(arguments)[1:]:
            found = attempt(one, recipe, world, 0)
            yield f"{recipe} x{world}", found | efficiency(alone[recipe], found, world)


def efficiency(one: dict[str, Any], many: dict[str, Any], world: int) -> dict[str, float]:
    if "failed" in one or "failed" in many:
        return {}
    return {"efficiency": many["tokens_per_second"] / (world * one["tokens_per_second"])}


def large(arguments: argparse.Namespace) -> Iterator[Case]:
    """llama_1b9 under FSDP, from four GPUs on under HSDP, too; then on one for the efficiency. Only bf16 saves: 25 GB
    take their time."""
    world, found = worlds(arguments)[-1], {}
    for recipe in RECIPES:
        case = saved_and_resumed if recipe == RECIPES[0] else measured
        found[recipe] = attempt(case, arguments, recipe, world, 0)
        yield f"{recipe} x{world}", found[recipe]
        if "hsdp" in modes(world):
            yield f"{recipe} hsdp x{world}", attempt(measured, arguments, recipe, world, 0, "hsdp")
    singles = {f"{recipe} x1": (measured, arguments, recipe, 1, i) for i, recipe in enumerate(RECIPES)}
    for name, alone in side_by_side(singles):
        yield name, alone | efficiency(alone, found[name.split()[0]], world)


def large_size(arguments: argparse.Namespace, recipe: str, world: int, mode: str = "fsdp") -> list[str]:
    batch = size(arguments, "llama_1b9", 2048, 8, 32 * world)
    return [*batch, f"quant={recipe}", f"parallel={mode}", "log.every=3", *arguments.extra]


def measured(arguments: argparse.Namespace, recipe: str, world: int, gpu: int, mode: str = "fsdp") -> dict[str, Any]:
    name = f"large-{recipe}-{mode}-{world}"
    options = [*large_size(arguments, recipe, world, mode), "checkpoint.every=null"]
    return speed(train_until(arguments, name, world, 15, *options, gpu=gpu))


def saved_and_resumed(arguments: argparse.Namespace, recipe: str, world: int, gpu: int) -> dict[str, Any]:
    """Saves while training, is preempted by SIGTERM to its ranks, resumes, is killed."""
    name, folder = f"large-{recipe}-{world}", arguments.out / f"large-{recipe}-{world}"
    options = [*large_size(arguments, recipe, world), ENDLESS, "checkpoint.every=12", "checkpoint.keep_last=1"]
    process = start(arguments, name, world, *options)
    until_step(arguments, process, name, 15)
    found = speed(folder)
    stopped = stop_by(process, list(ranks_of(process.pid).values()), signal.SIGTERM)
    saves = [row for row in rows(folder, "event") if row["event"] == "checkpoint"]
    found |= {f"preempted_{key}": value for key, value in stopped.items()}
    found |= {"stalls_s": [round(row["stall_s"], 3) for row in saves], "gigabytes": saves[-1]["gigabytes"]}
    found |= {"writes_s": [round(row["write_s"], 1) for row in saves], "saved_steps": [r["saved_step"] for r in saves]}
    before = max(row["step"] for row in train_lines(folder))
    begin = time.time()
    again = start(arguments, name, world, *options)
    until_step(arguments, again, name, before + 1)
    resumed = [row for row in rows(folder, "event") if row["event"] == "resume"][-1]
    first = next(row for row in train_lines(folder) if row["step"] == before + 1)
    kill_tree(again, signal.SIGKILL)
    subprocess.run(["rm", "-rf", str(folder / CHECKPOINTS)])  # 25 GB
    found |= {"resumed_at": resumed["step"], "restart_to_resumed_s": resumed["time"] - begin}
    return found | {"restart_to_next_step_s": first["time"] - begin}


def muon(arguments: argparse.Namespace) -> Iterator[Case]:
    """nanochat_1b9 with Muon at its batch of 524,288 tokens on all GPUs, under DDP: all of it fits, graphs replay."""
    world, alone = worlds(arguments)[-1], {}
    batch = size(arguments, "nanochat_1b9", 2048, 8, 256)
    if arguments.rehearse:
        batch[batch.index("model=llama_tiny")] = "model=nanochat_560m"
    steps = REHEARSED_STEPS if arguments.rehearse else MUON_STEPS
    options = [*batch, *MUON, "parallel=ddp", f"steps={steps}", "log.every=5", "checkpoint.every=null"]

    def one(recipe: str) -> dict[str, Any]:
        folder = train(arguments, f"muon-{recipe}-{world}", world, *options, f"quant={recipe}", *arguments.extra)
        losses = [row["loss"] for row in rows(folder, "train")]
        found = speed(folder) | {"loss_first": losses[0], "loss_last": losses[-1]}
        return found | {"run_hours": MUON_RUN_STEPS * found["ms_median"] / 3.6e6}

    for recipe in RECIPES:
        found = alone[recipe] = attempt(one, recipe)
        if "failed" not in found and "ms_median" in (base := alone[RECIPES[0]]):
            found |= {"over_bf16": found["ms_median"] / base["ms_median"]}
        yield f"{recipe} x{world}", found


PARTS = {"equal": equal, "scale": scale, "muon": muon, "large": large, "resume": resume, "faults": faults}
# What a case that ran must show: (values, nats that sums in another order may differ by) -> passed.
CHECKS: dict[str, Callable[[dict[str, Any], float], bool]] = {
    "equal": lambda found, nats: found["same_samples"] and found["largest_loss_difference"] <= nats,
    "resume": lambda found, nats: found["exit_code"] == 0,
    "faults": lambda found, nats: found["orphans"] == 0,
    "large": lambda found, nats: found.get("preempted_orphans", 0) == 0,
    "scale": lambda found, nats: True,
    "muon": lambda found, nats: found["loss_last"] < found["loss_first"],
}


def shown(values: dict[str, Any]) -> str:
    return "  ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())


def cases(arguments: argparse.Namespace, part: str) -> Iterator[Case]:
    """A part's cases; one that says why, where the part itself fails or its time is over."""
    if time.monotonic() > arguments.ends:
        yield part, {"failed": f"not begun: {ALL_S / 60:.0f} minutes are over"}
        return
    try:
        yield from PARTS[part](arguments)
    except Exception as error:  # the parts after it must not be lost
        yield part, {"failed": f"{type(error).__name__}: {error}"}


def hardware(arguments: argparse.Namespace) -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU processes"
    return f"{arguments.gpus} x {name}, torch {torch.__version__}"


def write_table(arguments: argparse.Namespace, table: list[tuple[str, str, bool, dict[str, Any]]]) -> None:
    """One Markdown table of all that was found so far."""
    lines = [
        f"`{' '.join(sys.argv)}` on {hardware(arguments)}",
        "",
        "| part | case | | ms, min / median | found |",
        "| --- | --- | --- | --- | --- |",
    ]
    for part, case, passed, values in table:
        times = " / ".join(f"{values[key]:,.1f}" for key in ("ms_min", "ms_median") if key in values)
        rest = {key: value for key, value in values.items() if key not in ("ms_min", "ms_median")}
        said = " ".join(shown(rest).split()).replace("|", "/")[:600]
        lines.append(f"| {part} | {case} | {'ok' if passed else 'FAILED'} | {times} | {said} |")
    write_text(arguments.out / "table.md", "\n".join(lines) + "\n")


def end_everything(number: int, frame: Any) -> None:
    """On SIGTERM (timeout): nothing that we started may go on, or the next part shares its GPUs with it."""
    for process in RUNNING:
        if process.poll() is None:
            for pid in [process.pid, *descendants(process.pid)]:
                send(pid, signal.SIGKILL)
    os._exit(143)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["all", *PARTS], nargs="+")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--data", default="data=pydocs", help="overrides that choose the text, as one string")
    parser.add_argument(
        "--extra", nargs="*", default=[], help="more overrides for scale and large, such as backend=triton"
    )
    parser.add_argument("--tolerance", type=float, default=0.01, help="nats, where sums are formed in another order")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--out", type=Path, default=Path("check_ranks"))
    arguments = parser.parse_args()
    there = MOST_REHEARSED if arguments.rehearse else torch.cuda.device_count()
    if arguments.gpus is None:
        arguments.gpus = 2 if arguments.rehearse else there
    if not 1 <= arguments.gpus <= there:
        parser.error(f"--gpus {arguments.gpus}: there are {there} here; a CPU can --rehearse")
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, end_everything)
    every, begin = "all" in arguments.part, time.monotonic()
    arguments.ends = begin + ALL_S if every else math.inf
    failures, table = 0, []
    for part in PARTS if every else arguments.part:
        print(f"{part} on up to {arguments.gpus} GPUs", flush=True)
        found = {}
        for name, values in cases(arguments, part):
            found[name] = values
            passed = "failed" not in values and CHECKS[part](values, arguments.tolerance)
            failures += not passed
            write_json(arguments.out / f"{part}.json", found)
            table.append((part, name, passed, values))
            write_table(arguments, table)
            print(f"{part}: {name:33}", shown(values), "" if passed else " FAILED", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
