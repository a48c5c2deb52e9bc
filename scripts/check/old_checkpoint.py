"""Proof that a checkpoint of an earlier commit loads here and goes on as it would have there, bitwise.

    python scripts/check/old_checkpoint.py --base 8e55133 quant=quartet2
    python scripts/check/old_checkpoint.py --base 8e55133 model.family=nanochat optim=muon optim.lr=0.02 model.heads=1

Trains ten small steps in a worktree of the base, keeps the checkpoint of step 5, and lets both trees go on from it, on
this machine. Compared: the checkpoint's tensors as both read them, every step's loss and gradient norm, the last
evaluation, and the last checkpoint. Exit code 1 if anything differs.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # net.py
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("old_checkpoint")

import json
import shutil
import subprocess
import tempfile

from net import REPOSITORY, worktree

SMALL = [
    "model=llama_tiny", "model.layers=1", "model.width=128", "model.heads=2", "model.hidden=128",
    "optim.lr=1e-2", "steps=10", "data=text", "data.vocab_size=300", "data.val_fraction=0.2",
    "data.workers=1", "batch.seq_len=64", "batch.sequences=4", "batch.micro=2", "compile=false",
    "run.name=small", "log.every=1", "evaluate.every=null", "evaluate.final_tokens=512",
    "evaluate.slots=false", "checkpoint.every=5", "checkpoint.keep_last=2",
]  # fmt: skip
# Works in trees from before and after the modules of checkpoints moved.
READ = """
import hashlib, sys
try:
    from training.checkpoint.state import read_all
except ImportError:
    from training.checkpoint import read_all
for name, tensor in sorted(read_all(sys.argv[1]).items()):
    print(name, tuple(tensor.shape), tensor.dtype, hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest())
"""


def run(tree: Path, *words: str) -> str:
    """Python with these arguments in `tree`. RuntimeError with the last lines of what it printed where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("\n".join([f"failed in {tree}:", *(done.stdout + done.stderr).splitlines()[-12:]]))
    return done.stdout


def train(tree: Path, folder: Path, overrides: list[str]) -> None:
    places = [f"data.files={folder.parent / 'text.jsonl'}", f"paths.data={folder.parent}", f"paths.runs={folder}"]
    words = [*SMALL, *places, *overrides]
    run(tree, "train.py", *{word.partition("=")[0]: word for word in words}.values())  # of a key the later value counts


def seen(tree: Path, folder: Path, step: int) -> dict[str, str]:
    """What is compared of a run: its rows up to `step` and its last checkpoint, as this tree reads it."""
    rows = [json.loads(line) for line in (folder / "small" / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "lr", "samples", "bpb")
    found = {
        f"{row['kind']} row of step {row['step']}": str({name: row.get(name) for name in names})
        for row in rows
        if row["kind"] in ("train", "eval") and row["step"] <= step
    }
    text = run(tree, "-c", READ, str(folder / "small" / "checkpoints" / f"step_{step:08d}"))
    return found | {f"step {step}: {line.split(' ')[0]}": line for line in text.splitlines()}


def back_to_five(source: Path, target: Path) -> None:
    """The run folder as it was when step 5 had just been saved."""
    shutil.copytree(source, target)
    (target / "small" / "result.json").unlink()
    shutil.rmtree(target / "small" / "checkpoints" / "step_00000010")


def write_text(path: Path) -> None:
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "su") for b in ("na", "re", "ti", "vo")]
    with open(path, "w") as file:
        for i in range(60):
            text = " ".join(words[(i * 7 + j * j) % len(words)] for j in range(200))
            file.write(json.dumps({"id": str(i), "source": "made up", "text": text}) + "\n")


def compare(base: Path, folder: Path, overrides: list[str]) -> list[str]:
    """What differs between the two trees' ways on from the base's checkpoint."""
    write_text(folder / "text.jsonl")
    first, there, here = folder / "first", folder / "there", folder / "here"
    train(base, first, overrides)
    told = []
    for tree, target in ((base, there), (REPOSITORY, here)):
        back_to_five(first, target)
        loaded = seen(tree, target, 5)
        train(tree, target, overrides)
        told.append(loaded | seen(tree, target, 10))
    names = told[0].keys() | told[1].keys()
    print(f"{len(names)} rows and tensors compared")
    return sorted(name for name in names if told[0].get(name) != told[1].get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="8e55133", help="commit that made the checkpoint")
    parser.add_argument("overrides", nargs="*", help="of the small run, as for train.py")
    arguments = parser.parse_args()
    try:
        with worktree(arguments.base) as base, tempfile.TemporaryDirectory(prefix="old-") as folder:
            differing = compare(base, Path(folder), arguments.overrides)
    except (RuntimeError, ValueError) as error:
        print(f"old_checkpoint.py: error: {error}", file=sys.stderr)
        return 1
    for name in differing[:12]:
        print(f"differs: {name}")
    print("the same, bit for bit" if not differing else f"{len(differing)} differ")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
