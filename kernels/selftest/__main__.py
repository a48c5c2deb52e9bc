"""python -m kernels.selftest: on any machine; on a Blackwell GPU it is the proof that the 4-bit path works there.

For each kernel: runs and right / WRONG / compiled, not run here / not compiled / not here, and why. Exit status 1 if
any is WRONG. On a Blackwell GPU the first call compiles what is missing (minutes); speed comes last.
"""

import argparse
import platform
import sys
from pathlib import Path

import torch

from kernels import backend, build
from kernels.gemm import cutlass_impl
from kernels.gemm.nvfp4 import BACKENDS
from kernels.selftest import gemms, host, others, quantizers, shapes, speed, verdicts
from kernels.selftest.verdicts import WRONG, Line
from kernels.spec import GEMMS

SMALL = [(kind, *shape) for shape in shapes.RAGGED for kind in GEMMS]
TOKENS = 4096  # of the model shapes: enough for 2-SM tiles on every layer but the smallest


def machine() -> list[str]:
    """What this is: versions, GPU, compiler, cache."""
    gpu = "no GPU"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        arch = f"sm_{properties.major}{properties.minor}"
        gpu = f"{properties.name}, {arch}, {properties.multi_processor_count} SMs"
    return [
        f"machine: Python {platform.python_version()}, torch {torch.__version__}, {gpu}",
        f"kernels: cache {build.cache_dir()}; compile: {build.cannot_build() or 'possible here'}",
    ]


def gemm_shapes(device: str) -> list[tuple[str, int, int, int]]:
    """Ragged shapes everywhere; on a GPU also every GEMM of every model preset and published layer."""
    if device == "cpu":
        return SMALL
    large = [gemm for layers in (*shapes.PRESETS, *shapes.PUBLISHED) for gemm in shapes.gemms(layers, TOKENS)]
    return [*SMALL, *large]


def lines(device: str) -> list[Line]:
    """Every check that this machine can make."""
    sizes = [(128, 256)] if device == "cpu" else [(256, 384), (4096, 2560), (16384, 1024)]
    out = host.checks() + quantizers.check_backend("triton", sizes, device)
    out += [gemms.check_backend(name, gemm_shapes(device), device) for name in BACKENDS if name != "packed_emulated"]
    out += [others.check_values_gemm("cublaslt", device), others.check_cross_entropy("triton", device)]
    return out + gemms.compiled_kernels()


def speed_lines(device: str) -> list[str]:
    """The tables of linear layers and, where they run, of the packed kernels; nothing without a GPU."""
    if device != "cuda":
        return []
    chosen = backend.use("auto", device)
    gemm = speed.gemm_lines() if cutlass_impl.unavailable() is None else []
    return [f"back ends: {chosen}", *speed.table(), *gemm]


def compare(path: Path, device: str) -> int:
    """Print a report from another machine beside the checks of this one; 1 if anything in it is WRONG."""
    there, theirs, their_speed = verdicts.read(path)
    print("\n".join(there))
    print("\n".join(verdicts.compared(lines(device), theirs)))
    print("\n".join(their_speed))
    wrong = sum(line.state == WRONG for line in theirs)
    print(f"{len(theirs)} checks there, {wrong} wrong")
    return 1 if wrong else 0


def check(options: argparse.Namespace, device: str) -> int:
    """Run every check, print it, write the report if asked for; 1 if anything is WRONG."""
    print("\n".join(machine()), flush=True)
    found = lines(device)
    print("\n".join(map(str, found)), flush=True)
    tables = [] if options.no_speed else speed_lines(device)
    print("\n".join(tables), end="\n" if tables else "", flush=True)
    if options.report:
        verdicts.write(options.report, machine(), found, tables)
    wrong = sum(line.state == WRONG for line in found)
    print(f"{len(found)} checks, {wrong} wrong")
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.selftest", description="Check every kernel of this machine."
    )
    parser.add_argument("--no-speed", action="store_true", help="do not time the linear layers")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write everything into one file to send")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="read such a file, beside this machine's checks")
    options = parser.parse_args(arguments)
    if options.report and options.compare:
        parser.error("--report writes a file of this machine, --compare reads one of another; give one of them")
    if options.report and not options.report.absolute().parent.is_dir():
        parser.error(f"--report: no folder {options.report.absolute().parent}; make it first")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return compare(options.compare, device) if options.compare else check(options, device)
    except (OSError, ValueError) as error:
        print(f"selftest: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
