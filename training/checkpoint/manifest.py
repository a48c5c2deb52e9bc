"""What makes a checkpoint folder good: a manifest with the size and SHA-256 of every file, written last.

    checkpoints/step_00001000/   manifest.json  index.json  meta.json  shard_00000_00.safetensors ...
    checkpoints/.tmp-...         being written, or being removed; never read

A folder gets its name by one rename after everything in it is on disk, so a kill at any moment leaves either a whole
checkpoint or a `.tmp-` folder. Damage that comes later (truncation, bit flips, lost or foreign files) is found by
`problems`. Only the file names that we write are accepted: a pickle placed in the folder makes it damaged.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from base.files import sha256_of
from base.runfolder import CHECKPOINTS
from training.checkpoint.storage import INDEX, IO_THREADS, TEMPORARY, CheckpointError

FORMAT = "nibble-checkpoint/1"
MANIFEST = "manifest.json"
META = "meta.json"
STEP_NAME = re.compile(r"step_(\d{8,})")
OUR_FILES = re.compile(r"shard_\d{5}_\d{2,}\.safetensors|index\.json|meta\.json")
READ_BYTES = 16 * 2**20


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def fsync_folder(folder: Path) -> None:
    """Make names in `folder` durable: on Linux a file's own fsync doesn't cover the directory entry."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, chunks: list[Any]) -> dict[str, Any]:
    """Write buffers to `path`, fsync, and return {size, sha256} of what was written (no second read)."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            view = memoryview(chunk)
            for begin in range(0, len(view), READ_BYTES):
                part = view[begin : begin + READ_BYTES]
                digest.update(part)
                file.write(part)
                size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def write_json(path: Path, value: Any) -> dict[str, Any]:
    return write_durably(path, [json.dumps(value, indent=1, sort_keys=True).encode()])


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, oldest first, damaged ones included."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := STEP_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{MANIFEST}: format {manifest['format']!r}; this version reads {FORMAT!r}")
        if not isinstance(files, dict) or not {INDEX, META} <= files.keys():
            raise CheckpointError(f"{MANIFEST}: lists no {INDEX} or no {META}")
        return files
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST}: {type(error).__name__}: {error}") from error


def _file_problem(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{path.name}: {size} bytes, manifest says {expected['size']}"
        if sha256_of(path) != expected["sha256"]:
            return f"{path.name}: SHA-256 differs from the manifest's"
    except (OSError, KeyError, TypeError) as error:
        return f"{path.name}: {type(error).__name__}: {error}"
    return None


def problems(folder: Path, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with a checkpoint, as "file: reason" lines; empty if it is whole.

    With `shares` > 1 only every shares-th file is read, so that ranks split the work; names are always all checked.
    """
    try:
        files = _read_manifest(folder)
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
    except (CheckpointError, OSError) as error:
        return [str(error)]
    found = [f"{name}: not a checkpoint file (never loaded)" for name in sorted(files) if not OUR_FILES.fullmatch(name)]
    found += [f"{name}: not in the manifest (foreign file, never loaded)" for name in sorted(present - files.keys())]
    found += [f"{name}: missing" for name in sorted(files.keys() - present)]
    if found:
        return found
    mine = sorted(files)[share::shares]
    with ThreadPoolExecutor(IO_THREADS) as pool:  # hashlib releases the GIL
        return [p for p in pool.map(lambda name: _file_problem(folder / name, files[name]), mine) if p]


def latest_good(
    run_dir: Path,
    say: Callable[[str], None] = print,
    check: Callable[[Path], list[str]] = problems,
    before: int | None = None,
) -> Path | None:
    """Newest whole checkpoint of a run, or None if the run has no checkpoint (before step `before`, where given).

    Damaged ones are skipped, each with a message that names file and reason. If there are checkpoints and none is
    whole, raises CheckpointError: starting again from step 0 without a word would lose the run.
    """
    root = Path(run_dir) / CHECKPOINTS
    found = [path for path in checkpoints(root) if before is None or step_of(path) < before]
    for path in reversed(found):
        reasons = check(path)
        if not reasons:
            return path
        say(f"checkpoint {path} is damaged and skipped: {'; '.join(reasons[:3])}")
    if found:
        raise CheckpointError(
            f"all {len(found)} checkpoints in {root} are damaged (see above). Restore one from a copy, "
            f"or move {root} away to start again from step 0"
        )
    return None


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a checkpoint: step, tokens, hash, world_size, extra."""
    try:
        return json.loads((folder / META).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / META}: {error}") from error


def set_aside(folder: Path) -> Path:
    """Give a checkpoint that is to be deleted a temporary name, so that a kill in the middle leaves no damaged one."""
    doomed = folder.with_name(f"{TEMPORARY}remove-{folder.name}-{os.getpid()}")
    folder.rename(doomed)
    return doomed


def remove_temporary(root: Path) -> list[str]:
    """Delete what killed saves and removals left. Only with the run's lock held; returns the names removed."""
    if not root.is_dir():
        return []
    left = [path for path in root.iterdir() if path.name.startswith(TEMPORARY)]
    for path in left:
        shutil.rmtree(path)
    return sorted(path.name for path in left)


def step_of(folder: Path) -> int:
    return int(STEP_NAME.fullmatch(folder.name)[1])


def prune(root: Path, saved: int, keep_last: int, keep_every: int, at: frozenset[int] = frozenset()) -> None:
    """Delete all before step `saved` but the newest `keep_last`, that one included, those of the steps `at`, and those
    whose step is a multiple of `keep_every` (0: no such). Later ones are damaged, or the run would have gone on from
    there: they must not count as kept, and stay to be looked at until the run gets there again."""
    past = [path for path in checkpoints(root) if step_of(path) <= saved]
    for path in past[:-keep_last]:
        if step_of(path) not in at and not (keep_every and step_of(path) % keep_every == 0):
            shutil.rmtree(set_aside(path))
