"""Compiles kernels/csrc with nvcc into small libraries with a C interface, cached by content.

    python -m kernels.build --list                   what there is, what is built, what is missing
    python -m kernels.build --arch 100f,120f         build ahead (no GPU needed; a minute and 4 to 5 GB of memory each)

A library's name carries a hash of its sources and flags, so an edit rebuilds it and nothing else. The cache is
$XDG_CACHE_HOME/nibble/kernels (~/.cache/nibble/kernels); copy that folder to move built kernels to a machine without
nvcc. The CUTLASS headers come from the pip package nvidia-cutlass, or from the folder that CUTLASS_PATH names (a
CUTLASS checkout). On a Blackwell machine the first use of a kernel calls build() too.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parent / "csrc"
CUTLASS_PACKAGE = "nvidia-cutlass==4.2.0.0"
# -DNDEBUG is not a matter of speed: with asserts CUTLASS aborts the process where there is no GPU (measured).
FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    "-shared",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
)
HINT_NVCC = (
    "install the CUDA toolkit 13.0 and put nvcc on PATH, or copy built kernels into the cache folder "
    "that `python -m kernels.build --list` names"
)


@dataclass(frozen=True)
class Unit:
    """One library: a name, its .cu file and the architecture it runs on ("host": CPU functions only)."""

    name: str
    arch: str

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files whose content decides whether a build is current."""
        headers = () if self.arch == "host" else tuple(sorted(CSRC.glob("*.cuh")))
        return (CSRC / f"{self.name}.cu", *headers)

    @property
    def flags(self) -> tuple[str, ...]:
        """nvcc's flags, without the include paths."""
        if self.arch == "host":
            return FLAGS
        return (*FLAGS, "-gencode", f"arch=compute_{self.arch},code=sm_{self.arch}")


UNITS = {
    unit.name: unit
    for unit in (
        Unit("host_checks", "host"),
        Unit("nvfp4_sm100_1sm_bf16", "100f"),
        Unit("nvfp4_sm100_1sm_f32", "100f"),
        Unit("nvfp4_sm100_2sm_bf16", "100f"),
        Unit("nvfp4_sm100_2sm_f32", "100f"),
        Unit("nvfp4_sm120_bf16", "120f"),
        Unit("nvfp4_sm120_f32", "120f"),
    )
}


def cache_dir() -> Path:
    """Where built libraries live."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nibble" / "kernels"


def nvcc() -> str:
    """Path of nvcc. Raises RuntimeError, with what to do, when there is none."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not found:
        raise RuntimeError(f"nvcc not found: {HINT_NVCC}")
    return found


def cutlass_root() -> Path:
    """The CUTLASS source folder (it has include/ and tools/util/include/). Raises RuntimeError when there is none."""
    override = os.environ.get("CUTLASS_PATH")
    if override:
        root, named = Path(override), f"CUTLASS_PATH={override}"
    else:
        spec = importlib.util.find_spec(
            "cutlass_library"
        )  # finds the headers; importing it would need its dependencies
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError(
                f"CUTLASS headers not found: pip install --no-deps {CUTLASS_PACKAGE}, or set CUTLASS_PATH"
            )
        root, named = Path(spec.submodule_search_locations[0]) / "source", "nvidia-cutlass"
    if not (root / "include" / "cutlass" / "version.h").is_file():
        raise RuntimeError(f"{named}: no include/cutlass/version.h under {root}; need a CUTLASS 4 source folder")
    return root


def cutlass_version(root: Path) -> str:
    """ "4.2.0" from include/cutlass/version.h."""
    text = (root / "include" / "cutlass" / "version.h").read_text()
    return ".".join(re.search(rf"CUTLASS_{part}\s+(\d+)", text)[1] for part in ("MAJOR", "MINOR", "PATCH"))


def library_path(unit: Unit) -> Path:
    """Where the library of the present sources lies, built or not. Needs neither nvcc nor CUTLASS."""
    digest = hashlib.sha256("\0".join((*unit.flags, os.environ.get("CUTLASS_PATH", CUTLASS_PACKAGE))).encode())
    for source in unit.sources:
        digest.update(source.read_bytes())
    return cache_dir() / f"{unit.name}-{digest.hexdigest()[:16]}.so"


def is_built(unit: Unit) -> bool:
    """Whether the library of the present sources is in the cache."""
    return library_path(unit).is_file()


def cannot_build() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        nvcc()
        cutlass_root()
    except RuntimeError as error:
        return str(error)
    return None


def record(unit: Unit) -> dict:
    """The facts beside a built library: seconds, cpu_seconds, memory_gib, nvcc, cutlass. Empty if it is not built."""
    path = library_path(unit).with_suffix(".json")
    return json.loads(path.read_text()) if path.is_file() else {}


def build(unit: Unit) -> Path:
    """Compile `unit` unless the cache has it; returns the library's path.

    Processes that ask at the same time wait for one compilation. Raises RuntimeError without nvcc or CUTLASS, and
    with nvcc's own messages when it fails.
    """
    path = library_path(unit)
    if is_built(unit):
        return path
    compiler, root = nvcc(), cutlass_root()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_built(unit):
            _compile(unit, path, compiler, root)
    return path


def _compile(unit: Unit, path: Path, compiler: str, root: Path) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    includes = [f"-I{root / folder}" for folder in ("include", "tools/util/include")] + [f"-I{CSRC}"]
    command = [compiler, *unit.flags, *includes, "-o", str(unfinished), str(CSRC / f"{unit.name}.cu")]
    print(f"kernels.build: compiling {unit.name}, once (a minute or more)", file=sys.stderr, flush=True)
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # wait4 gives the peak memory of nvcc's largest child
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        unfinished.unlink(missing_ok=True)
        raise RuntimeError(f"{unit.name}: nvcc failed ({process.returncode}): {' '.join(command)}\n{output[-4000:]}")
    facts = {
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "memory_gib": round(usage.ru_maxrss / 2**20, 2),
        "nvcc": subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.split()[-1],
        "cutlass": cutlass_version(root),
    }
    path.with_suffix(".json").write_text(json.dumps(facts) + "\n")
    unfinished.rename(path)


def _describe(unit: Unit) -> str:
    facts = record(unit)
    # Whatever is written there: a library built by an earlier version of this file is as good.
    state = f"built ({', '.join(f'{key} {value}' for key, value in facts.items())})" if facts else "not built"
    return f"{unit.name:24} {unit.arch:6} {state}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    archs = sorted({unit.arch for unit in UNITS.values()})
    parser = argparse.ArgumentParser(
        prog="python -m kernels.build", description="Compile the CUDA kernels ahead of use."
    )
    parser.add_argument(
        "--arch", default="100f,120f", help=f"comma-separated, from {', '.join(archs)} (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time; 5 GB of memory each (default: 1)")
    parser.add_argument("--list", action="store_true", help="show what is built and stop")
    options = parser.parse_args(arguments)
    wanted = options.arch.split(",")
    if unknown := sorted(set(wanted) - set(archs)):
        parser.error(f"--arch: no kernels for {', '.join(unknown)}; there are kernels for {', '.join(archs)}")
    if options.jobs < 1:
        parser.error(f"--jobs: a whole number of at least 1 is needed, got {options.jobs}")
    if options.list:
        print(f"cache: {cache_dir()}\nbuild: {cannot_build() or 'possible here'}")
        print("\n".join(map(_describe, UNITS.values())))
        return 0
    if reason := cannot_build():
        print(f"kernels.build: {reason}", file=sys.stderr)
        return 1
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            for unit, _ in pool.map(lambda unit: (unit, build(unit)), [u for u in UNITS.values() if u.arch in wanted]):
                print(_describe(unit), flush=True)
    except (RuntimeError, OSError) as error:
        print(f"kernels.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
