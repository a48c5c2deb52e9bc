"""Several GPUs of one node, checked and measured. Run by hand; prints tables and leaves JSON in --out.

    python scripts/check_ranks.py equal   # 1, 2, 4 GPUs, DDP and FSDP: same samples, same curve to summation noise
    python scripts/check_ranks.py resume  # kill -9 and resume: bitwise on the same GPUs, to noise on others
    python scripts/check_ranks.py scale   # tokens/s of llama_100m (DDP) and llama_1b9 (FSDP) from 1 GPU to all
    python scripts/check_ranks.py large   # llama_1b9: MFU, memory against the estimate, save stall, time to resume

`--data` takes overrides that choose the text (default: data=pydocs). Every run is `torchrun train.py`, so that what is
measured is what users get; --gpus limits the number of GPUs.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
QUIET = ["evaluate.every=null", "evaluate.final_tokens=8192", "evaluate.slots=false"]


def train(arguments: argparse.Namespace, name: str, world: int, *overrides: str, limit_s: float = 900) -> Path:
    """Train with `world` processes and return the run folder. Raises SystemExit with the log's end on failure."""
    launch = [sys.executable]
    if world > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    places = [f"paths.runs={arguments.out}", f"run.name={name}"]
    command = [*launch, str(ROOT / "train.py"), *arguments.data.split(), *QUIET, *overrides, *places]
    log = arguments.out / f"{name}.log"
    begin = time.monotonic()
    with open(log, "a") as file:
        done = subprocess.run(command, stdout=file, stderr=file, timeout=limit_s, cwd=ROOT)
    print(f"  {name}: {time.monotonic() - begin:.0f} s, exit code {done.returncode}", flush=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
    return arguments.out / name


def rows(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def worlds(arguments: argparse.Namespace) -> list[int]:
    return [n for n in (1, 2, 4, 8) if n <= arguments.gpus]


def equal(arguments: argparse.Namespace) -> dict:
    """Largest difference of loss and gradient norm from one GPU, per recipe, world size and mode."""
    found = {}
    size = ["model=llama_30m", "batch.seq_len=512", "batch.sequences=64", "batch.micro=8", "steps=20", "log.every=5"]
    size += ["checkpoint.every=null"]
    for recipe in ("bf16", "quartet2"):
        base = rows(train(arguments, f"equal-{recipe}-1", 1, f"quant={recipe}", *size), "train")
        for world in worlds(arguments)[1:]:
            for mode in ("ddp", "fsdp"):
                folder = train(
                    arguments, f"equal-{recipe}-{world}-{mode}", world, f"quant={recipe}", f"parallel={mode}", *size
                )
                other = rows(folder, "train")
                pairs = list(zip(base, other, strict=True))
                found[f"{recipe} {mode} x{world}"] = {
                    "same_samples": all(a["samples"] == b["samples"] for a, b in pairs),
                    "first_loss_difference": abs(base[0]["loss"] - other[0]["loss"]),
                    "largest_loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
                    "largest_norm_ratio": max(abs(b["grad_norm"] / a["grad_norm"] - 1) for a, b in pairs),
                }
    return found


def resume(arguments: argparse.Namespace) -> dict:
    """scripts/verify_resume.py on the GPUs: its exit codes."""
    size = ["model=llama_30m", "quant=quartet2", "batch.seq_len=512", "batch.sequences=16", "batch.micro=4"]
    size += [*arguments.data.split(), *QUIET, "compile=false"]
    most = worlds(arguments)[-1]
    cases = {
        "1 GPU, bitwise": ["--worlds=1"],
        f"{most} GPUs, DDP, bitwise": [f"--worlds={most}", "--parallel=ddp"],
        f"{most} GPUs, FSDP, bitwise": [f"--worlds={most}", "--parallel=fsdp"],
        "any number of GPUs, DDP and FSDP": [
            f"--worlds={','.join(map(str, worlds(arguments)))}",
            "--parallel=ddp,fsdp",
        ],
    }
    found = {}
    for i, (name, options) in enumerate(cases.items()):
        folder = ["--folder", str(arguments.out / f"resume-{i}"), "--kills=3", "--steps=40", "--every=5"]
        script = [sys.executable, str(ROOT / "scripts" / "verify_resume.py"), *options, *folder, *size]
        print(f"  {name}", flush=True)
        found[name] = {"exit_code": subprocess.run(script).returncode}
    return found


def speed(folder: Path) -> dict:
    """Steady state: without the first windows (compilation). ms per step, tokens/s and MFU at the median."""
    train_rows = rows(folder, "train")[5:]
    middle = median(row["ms_per_step"] for row in train_rows)
    at_median = min(train_rows, key=lambda row: abs(row["ms_per_step"] - middle))
    expected = re.search(r"memory +([\d.]+) GiB a GPU expected", (folder / "start.txt").read_text())
    return {
        "expected_gib": float(expected[1]),
        "ms_min": min(row["ms_per_step"] for row in train_rows),
        "ms_median": middle,
        "tokens_per_second": at_median["tokens_per_second"],
        "mfu": at_median["mfu"],
        "peak_gib": max(row["memory_gib"] for row in train_rows),
    }


def scale(arguments: argparse.Namespace) -> dict:
    """The same work per GPU on more GPUs; efficiency is tokens/s over world times one GPU's."""
    cases = {
        "llama_100m": ("ddp", 512, 128, 256, 40),
        "llama_1b9": ("fsdp", 2048, 4, 32, 15),
    }
    found: dict = {}
    for model, (mode, seq_len, micro, per_gpu, steps) in cases.items():
        for recipe in ("bf16", "quartet2"):
            for world in worlds(arguments):
                name = f"scale-{model}-{recipe}-{world}"
                size = [f"model={model}", f"quant={recipe}", f"parallel={mode}", f"batch.seq_len={seq_len}"]
                size += [f"batch.micro={micro}", f"batch.sequences={per_gpu * world}", f"steps={steps}", "log.every=5"]
                folder = train(arguments, name, world, *size, "checkpoint.every=null", *arguments.extra)
                found[name] = speed(folder)
                one = found[f"scale-{model}-{recipe}-1"]["tokens_per_second"]
                found[name]["efficiency"] = found[name]["tokens_per_second"] / (world * one)
    return found


def large(arguments: argparse.Namespace) -> dict:
    """llama_1b9 on all GPUs: speed, memory, the stall of saves after the first, and the time to resume."""
    found = {}
    world = worlds(arguments)[-1]
    size = ["model=llama_1b9", "batch.seq_len=2048", "batch.micro=4", f"batch.sequences={16 * world}", "log.every=5"]
    for recipe in ("bf16", "quartet2"):
        name = f"large-{recipe}"
        save = ["checkpoint.every=8", "checkpoint.keep_last=1"]
        folder = train(arguments, name, world, f"quant={recipe}", *size, *save, "steps=30", *arguments.extra)
        saves = [row for row in rows(folder, "event") if row["event"] == "checkpoint"]
        found[recipe] = speed(folder) | {
            "stalls_s": [round(row["stall_s"], 3) for row in saves],
            "writes_s": [round(row["write_s"], 1) for row in saves],
            "gigabytes": saves[-1]["gigabytes"],
        }
        (folder / "result.json").unlink()  # as if it had been killed just before the end
        begin = time.time()
        train(arguments, name, world, f"quant={recipe}", *size, *save, "steps=30", *arguments.extra)
        found[recipe]["restart_to_resumed_s"] = [r for r in rows(folder, "event") if r["event"] == "resume"][-1][
            "time"
        ] - begin
        subprocess.run(["rm", "-rf", str(folder / "checkpoints")])  # 25 GB
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["equal", "resume", "scale", "large"], nargs="+")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--data", default="data=pydocs", help="overrides that choose the text, as one string")
    parser.add_argument(
        "--extra", nargs="*", default=[], help="more overrides for scale and large, such as backend=triton"
    )
    parser.add_argument("--out", type=Path, default=Path("check_ranks"))
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in arguments.part:
        print(f"{part} on up to {arguments.gpus} GPUs", flush=True)
        found = {"equal": equal, "resume": resume, "scale": scale, "large": large}[part](arguments)
        (arguments.out / f"{part}.json").write_text(json.dumps(found, indent=1))
        for name, values in found.items():
            print(
                f"{name:36}",
                "  ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()),
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
