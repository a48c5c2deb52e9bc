"""The folder of a run (base/runfolder.py): what is written at its start, and whether it may be continued."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from base import runfolder
from base.commands import typed
from base.files import write_json, write_text
from training.records.identity import refuse_other

ROOT = Path(__file__).resolve().parents[2]
THIS_FILE = str(Path(__file__).resolve().relative_to(ROOT))
UNKNOWN = "unknown"
PACKAGES = ("nibble-train", "torch", "triton", "numpy", "hydra-core", "omegaconf", "tokenizers", "transformer-engine")


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None if it isn't there. Raises RunError, naming it, if it can't be read."""
        file = self.path / name
        if not file.exists():
            return None
        try:
            return runfolder.read_json(file)
        except runfolder.RunError as error:
            remedy = f"restore it, or move {self.path} away"
            if name == runfolder.RESULT:
                remedy = "delete it: the run goes on from its last checkpoint and writes it anew"
            raise runfolder.RunError(f"{error}; {remedy}") from error

    def write(self, name: str, value: Any) -> None:
        """Write text or JSON atomically."""
        (write_text if isinstance(value, str) else write_json)(self.path / name, value)

    def result(self) -> dict[str, Any] | None:
        return self.read(runfolder.RESULT)

    def check_identity(self, run: dict[str, Any]) -> None:
        """Raise identity.IdentityError if the folder holds a run with other numerics."""
        stored = self.read(runfolder.RUN)
        if stored is not None:
            refuse_other(stored, run, str(self.path), run["name"])

    def write_start(self, run: dict[str, Any], config_yaml: str, plan: Any, env: dict[str, Any], screen: str) -> None:
        """What a run says about itself. A resume rewrites it: the newest start is the one that is described."""
        self.write(runfolder.CONFIG, config_yaml)
        self.write(runfolder.PLAN, plan)
        self.write(runfolder.ENV, env)
        self.write(runfolder.START, screen + "\n")
        self.write(runfolder.RUN, run)  # last: a folder with run.json has everything


ROOM_FOR_RUNS = (
    "Free some space, or move the folder to another disk and set paths.runs; then run the same command again: it "
    "resumes from the last checkpoint"
)


def environment(
    device: torch.device, world: int, backends: dict[str, str], configs: Iterable[Path] = ()
) -> dict[str, Any]:
    """Code, versions, device and the torch switches that can move the last bits. `configs`: the YAML files in use."""
    return {
        **code_state(configs),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "device": device_name(device),
        "device_count": world,
        "backends": backends,
        "torch_flags": {
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "bf16_reduced_precision_reduction": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            "threads": torch.get_num_threads(),
        },
        "command": typed(sys.argv),
    }


def code_state(configs: Iterable[Path] = ()) -> dict[str, Any]:
    """{commit, dirty, untracked} of our own repository; commit and dirty are "unknown" where there is none or no git.

    Another repository around an installed copy isn't ours: its commit says nothing about this code. `untracked`: files
    of ours in use, imported or among `configs`, that the commit doesn't have; they make it dirty as changes do.
    """
    top, tracked = git("rev-parse", "--show-toplevel"), git("ls-files", "-z")
    names = set((tracked or "").split("\0"))
    if top is None or Path(top).resolve() != ROOT or THIS_FILE not in names:
        return {"commit": UNKNOWN, "dirty": UNKNOWN, "untracked": []}
    untracked = sorted({relative(path) for path in [*imported_files(), *configs]} - names)
    changes = git("status", "--porcelain", "--untracked-files=no")
    dirty = UNKNOWN if changes is None else bool(changes or untracked)
    return {"commit": git("rev-parse", "HEAD") or UNKNOWN, "dirty": dirty, "untracked": untracked}


def imported_files() -> list[Path]:
    """Modules under our root that this process has imported; not an environment that lies there, nor what has no file
    but a name for one (torch._ops says it is "_ops.py", wherever we are)."""
    prefix = Path(sys.prefix).resolve()
    found = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    paths = [Path(file).resolve() for file in found if file and Path(file).is_absolute()]
    return [path for path in paths if path.is_relative_to(ROOT) and not path.is_relative_to(prefix)]


def relative(path: str | Path) -> str:
    """As git names it; outside of our root the name alone: where it lies is nobody's business."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def device_name(device: torch.device) -> str:
    """The GPU as its maker calls it, or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"


def moved(before: dict[str, Any] | None, now: dict[str, Any]) -> str | None:
    """A warning where a run goes on on another kind of device than its last start, whose env.json is `before`."""
    if before is None or before.get("device") == now["device"]:
        return None
    return (
        f"warning: this run was on {before.get('device')} and continues on {now['device']}: losses differ in their "
        "last bits from there on, and its speed is that of neither"
    )


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """Output of a git command in our root, or None where there is no git or no repository. GIT_DIR and its like, which
    hooks set, would name another one."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
