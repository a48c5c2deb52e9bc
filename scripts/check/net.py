"""Compare, bit for bit, what this working tree computes with what a commit computed: scripts/check/net.py --base REV

Runs the same cases (scripts/check/_net_cases.py) in a worktree of REV and in the working tree, on this machine: sums
differ between CPUs and versions of torch, so there are no constants to compare with.

    quantizers  the reference: every quantizer in all slots, over all input families, rotated or not, values and codes
    layers      y, dX, dW, all operands and the bytes kept, of every recipe and of random ones, on both GEMM back ends
    triton      the Triton kernels in Triton's interpreter
    training    ten steps of every recipe: losses, gradient norms, evaluations, weights, the run's hash

Exit code 1 where a result differs or is missing now; results that are new are counted.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.terminal import one_line_on_ctrl_c

if __name__ == "__main__":
    one_line_on_ctrl_c("net")

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

CASES = Path(__file__).resolve().with_name("_net_cases.py")
REPOSITORY = CASES.parents[2]
SECTIONS = ("quantizers", "layers", "triton", "training")
SHOWN = 12  # differing results named per section


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of `revision` in a temporary folder, gone afterwards. ValueError for what is no commit."""
    git = ["git", "-C", str(REPOSITORY)]
    with tempfile.TemporaryDirectory(prefix="net-") as folder:
        path = Path(folder) / "base"
        made = subprocess.run([*git, "worktree", "add", "--detach", path, revision], capture_output=True, text=True)
        if made.returncode:
            raise ValueError(f"--base {revision}: {made.stderr.strip().splitlines()[-1]}; give a commit, say HEAD~1")
        try:
            yield path
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", path], check=True)


def recipes(tree: Path) -> list[str]:
    """The recipe files of a tree."""
    return sorted(path.stem for path in (tree / "configs" / "quant").glob("*.yaml"))


def collect(tree: Path, section: str, names: list[str]) -> dict[str, object]:
    """The section's results in this tree. RuntimeError with the last lines of what it printed where it fails."""
    with tempfile.TemporaryDirectory(prefix="net-") as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NET_FOLDER": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        environment["NET_RECIPES"] = " ".join(names)
        environment["TRITON_INTERPRET"] = "1" if section == "triton" else "0"
        environment.pop("PYTHONPATH", None)
        out = Path(folder) / "results.json"
        command = [sys.executable, str(CASES), section, str(out)]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
            raise RuntimeError(f"{section} failed in {tree} (exit code {done.returncode}):\n{last}")
        return json.loads(out.read_text())


def report(section: str, base: dict[str, object], now: dict[str, object], seconds: float) -> bool:
    """Print the comparison; True if everything that was there is there and equal."""
    differing = [name for name in base if name in now and now[name] != base[name]]
    missing = [name for name in base if name not in now]
    equal = len(base) - len(differing) - len(missing)
    print(
        f"{section:10}  {len(base):6} compared  {equal:6} equal  {len(differing):5} differ  {len(missing):5} missing  "
        f"{len(now.keys() - base.keys()):5} new  {seconds:4.0f} s",
        flush=True,
    )
    for kind, names in (("differs", differing), ("missing", missing)):
        for name in names[:SHOWN]:
            print(f"    {kind}: {name}  {str(base[name])[:40]} -> {str(now.get(name))[:40]}")
        if len(names) > SHOWN:
            print(f"    {kind}: {len(names) - SHOWN} more")
    return not differing and not missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="REV", help="the commit to compare with")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="this section (may be given several times)")
    args = parser.parse_args()
    same = True
    try:
        with worktree(args.base) as base:
            for section in args.only or SECTIONS:
                start = time.monotonic()
                names = recipes(base)  # later ones have nothing to be compared with
                before, now = collect(base, section, names), collect(REPOSITORY, section, names)
                same = report(section, before, now, time.monotonic() - start) and same
    except (ValueError, RuntimeError) as error:
        print(f"net.py: error: {error}", file=sys.stderr)
        return 2
    print("every result is the same, bit for bit" if same else "NOT the same")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
