"""Second half of a save: staged host buffers -> files -> manifest -> rename, in a background thread of every rank.

Ranks meet through small files in the temporary folder, not through collectives: a collective in a thread would race
with the training loop's own, and a dead rank would hang the others instead of failing one save. The folder's name is
new for every save, so that nothing left by a killed attempt can be taken for this one's.
"""

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.checkpoint import manifest
from training.checkpoint.manifest import write_durably, write_json
from training.checkpoint.storage import INDEX, IO_THREADS, CheckpointError, StagedFile

POLL_S = 0.02
PART_TIMEOUT_S = 1800.0  # a rank that writes for longer has died, or its file system has


@dataclass(frozen=True)
class Job:
    """Everything a rank's thread needs; no tensors of the model, only staged copies."""

    folder: Path
    final: Path
    files: list[StagedFile]
    rank: int
    world: int
    index: dict[str, Any] | None  # coordinator only, like meta
    meta: dict[str, Any]
    keep_last: int
    keep_every: int
    at: frozenset[int] = frozenset()


class PublishThread(threading.Thread):
    """Runs `publish(job)`; `result()` waits for it and gives the seconds it took or re-raises what went wrong."""

    def __init__(self, job: Job) -> None:
        super().__init__(name=f"checkpoint-{job.final.name}", daemon=True)
        self.job = job
        self.error: Exception | None = None
        self.seconds = 0.0
        self.begin = time.perf_counter()

    def run(self) -> None:
        try:
            publish(self.job)
        except Exception as error:  # carried to the training loop, which raises it
            self.error = error
        self.seconds = time.perf_counter() - self.begin

    def result(self) -> float:
        self.join()
        if self.error is not None:
            raise self.error
        return self.seconds


def publish(job: Job) -> None:
    """Write this rank's files; on rank 0 also wait for all others and make the checkpoint visible, then prune."""
    try:
        with ThreadPoolExecutor(IO_THREADS) as pool:
            entries = pool.map(lambda f: write_durably(job.folder / f.name, [f.header, f.data.numpy()]), job.files)
            written = {file.name: entry for file, entry in zip(job.files, entries, strict=True)}
        _publish_part(job, {"files": written})
        if job.rank == 0:
            _publish_checkpoint(job, _all_parts(job))
    except Exception as error:
        if job.rank == 0:
            shutil.rmtree(job.folder, ignore_errors=True)  # a full disk needs the space back
        else:
            _try_to_publish_failure(job, error)
        raise CheckpointError(
            f"checkpoint {job.final.name} was not saved: {type(error).__name__}: {error}. Earlier checkpoints in "
            f"{job.final.parent} are untouched; remove the cause and run the same command again to resume"
        ) from error


def _part(job: Job, rank: int) -> Path:
    return job.folder / f"part_{rank:05d}.json"


def _publish_part(job: Job, value: dict[str, Any]) -> None:
    draft = _part(job, job.rank).with_suffix(".draft")
    write_json(draft, value)
    draft.rename(_part(job, job.rank))


def _try_to_publish_failure(job: Job, error: Exception) -> None:
    """Tell rank 0, which would wait for PART_TIMEOUT_S. A full disk has room for that once this rank's files are gone,
    and for an empty file in any case."""
    with suppress(OSError):
        for file in job.files:
            (job.folder / file.name).unlink(missing_ok=True)
    try:
        _publish_part(job, {"error": f"rank {job.rank}: {error}"})
    except OSError:
        with suppress(OSError):
            _part(job, job.rank).touch()


def _all_parts(job: Job) -> dict[str, dict[str, Any]]:
    """{file: {size, sha256}} of every rank. Raises CheckpointError when a rank failed or doesn't answer."""
    files: dict[str, dict[str, Any]] = {}
    waiting = set(range(job.world))
    deadline = time.monotonic() + PART_TIMEOUT_S
    while waiting:
        # listdir, not exists(): network file systems cache that a name was absent
        names = set(os.listdir(job.folder))
        for rank in [r for r in waiting if _part(job, r).name in names]:
            text = _part(job, rank).read_text()
            part = json.loads(text) if text else {"error": f"rank {rank} can't write to {job.folder.parent}"}
            if "error" in part:
                raise CheckpointError(part["error"])
            files |= part["files"]
            waiting.remove(rank)
        if waiting:
            if time.monotonic() > deadline:
                raise CheckpointError(f"ranks {sorted(waiting)} wrote nothing for {PART_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)
    return files


def _publish_checkpoint(job: Job, files: dict[str, dict[str, Any]]) -> None:
    files[INDEX] = write_json(job.folder / INDEX, job.index)
    files[manifest.META] = write_json(job.folder / manifest.META, job.meta)
    write_json(job.folder / manifest.MANIFEST, {"format": manifest.FORMAT, "files": files})
    for rank in range(job.world):
        _part(job, rank).unlink()
    manifest.fsync_folder(job.folder)
    # After a rollback, or a damaged one of the same step.
    aside = manifest.set_aside(job.final) if job.final.exists() else None
    job.folder.rename(job.final)
    manifest.fsync_folder(job.final.parent)
    if aside is not None:
        shutil.rmtree(aside)
    manifest.prune(job.final.parent, manifest.step_of(job.final), job.keep_last, job.keep_every, job.at)
