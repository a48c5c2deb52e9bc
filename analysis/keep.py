"""A small copy of a run that the comparison, the law and the plots read like the original.

Kept: run.json, env.json, result.json, every evaluation and event, all without this machine's paths. Thinned: training
steps (every n-th and the last), their rarely used fields, per-segment rows of all evaluations but the last one of each
run that is kept with it (their count of tokens stays, as `targets`): a cut run is compared where it ended. Rows, those
of score.py too, are stored compressed, nats in FP32: a loss moves by less than 1e-8.
"""

import json
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from analysis.runs import Run, read_run
from base import runfolder
from base.files import write_json

LOOKS = (runfolder.TASKS, runfolder.XRAYS, runfolder.LIFTS)  # folders of JSON files that scripts wrote afterwards
# The first goes first and comes last: without it a copy is no run.
FILES = (runfolder.RUN, runfolder.ENV, runfolder.RESULT)
PLACES = ("data.path=", "data.files=", "data.val_files=", "data.tokenizer=", "paths.")
SMALL_TYPES = {"sequence": np.int32, "document": np.int32, "nats": np.float32, "tokens": np.int32, "bytes": np.int32}


def last_evaluations(runs: list[Run]) -> set[int]:
    """The steps of the last evaluations: where these runs can be compared."""
    return {int(run.evals["step"].max()) for run in runs if len(run.evals["step"])}


def check_names(runs: list[Run]) -> None:
    """ValueError for two runs of one name: the copy of the second would replace that of the first."""
    found: dict[str, Path] = {}
    for run in runs:
        if run.name in found:
            raise ValueError(f"{found[run.name]} and {run.path} are both called {run.name}; keep them in two folders")
        found[run.name] = run.path


def keep(run: Run, folder: Path, every: int = 10, steps: Iterable[int] = ()) -> Path:
    """Write the copy to folder/<run name>, replacing an older one; returns its path. `every`: training steps kept;
    `steps`: evaluations whose per-segment rows are kept beside the last one's."""
    target = folder / run.name
    if target.resolve() == run.path.resolve():
        raise ValueError(f"{target}: the copy would replace the run itself; give another folder")
    if (target / runfolder.CONFIG).exists():  # which copies lack
        raise ValueError(f"{target}: the copy would replace a run, not an older copy; give another folder")
    is_finished = run.finished  # then all records are there
    records = runfolder.read_metrics(run.path)
    run = read_run(run.path, records)  # as of these records: it may be going on
    targets = dict(zip(run.evals["step"].astype(int).tolist(), run.targets.tolist(), strict=True))
    evaluations = {step: run.rows_at(step) for step in sorted(targets.keys() & {*steps, max(targets, default=0)})}
    records = [thin(record, every, run.train["step"][-1:], targets) for record in records]
    (target / runfolder.EVAL).mkdir(parents=True, exist_ok=True)
    scores = [path for name in (runfolder.SCORE, *LOOKS) for path in (target / name).glob("*")]
    for old in (*(target / name for name in FILES), *(target / runfolder.EVAL).glob("*.npz"), *scores):
        old.unlink(missing_ok=True)
    (target / runfolder.METRICS).write_text("".join(json.dumps(r) + "\n" for r in records if r))
    for step, rows in evaluations.items():
        small = {key: getattr(rows, key).astype(SMALL_TYPES[key]) for key in runfolder.SEGMENT_KEYS}
        np.savez_compressed(runfolder.segments_file(target, step), **small)
    keep_scores(run.path / runfolder.SCORE, target / runfolder.SCORE)
    for path in sorted(path for name in LOOKS for path in (run.path / name).glob("*.json")):
        (target / path.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.parent.name / path.name)
    for name in reversed(FILES if is_finished else FILES[:-1]):
        if (run.path / name).exists():
            write_json(target / name, without_paths(run.read_json(name)))
    return target


def keep_scores(folder: Path, target: Path) -> None:
    """The losses under other forwards (scripts/score.py), if there are any."""
    for path in sorted(folder.glob("*.npz")):
        target.mkdir(exist_ok=True)
        with np.load(path) as arrays:
            small = {key: arrays[key].astype(SMALL_TYPES[key.partition(".")[0]]) for key in arrays}
        np.savez_compressed(target / path.name, **small)
        shutil.copyfile(path.with_suffix(".json"), target / f"{path.stem}.json")


def without_paths(content: dict) -> dict:
    """Where text and runs lay is nobody's business, and the command begins with the script's name alone."""
    content = {key: value for key, value in content.items() if key != "data_path"}
    if content.get("command"):
        script, *words = words_of(content["command"])
        words = [named(word) for word in words if not word.startswith(PLACES)]
        content["command"] = shlex.join([Path(script).name, *words])
    if "parent" in content:
        content["parent"] = {key: value for key, value in content["parent"].items() if key != "folder"}
    return content


def named(word: str) -> str:
    """A fork's parent by its name alone: fork=/somewhere/runs/NAME@STEP as fork=runs/NAME@STEP."""
    return f"fork=runs/{Path(word).name}" if word.startswith("fork=") else word


def words_of(command: str) -> list[str]:
    """The words of a recorded command; older runs joined them by spaces, without the shell's quotes."""
    try:
        return shlex.split(command)
    except ValueError:
        return command.split(" ")


def thin(record: dict, every: int, last: np.ndarray, targets: dict[int, int]) -> dict | None:
    """The record to keep, or None. Slot counters are kept at the evaluations they belong to."""
    if record["kind"] == "train":
        if record["step"] % every and record["step"] not in last:
            return None
        return {key: rounded(record[key]) for key in runfolder.kept_fields("train") if key in record}
    if record["kind"] == "eval":
        return record | {"targets": int(targets[record["step"]])}
    return {key: value for key, value in record.items() if key != "path"}


def rounded(value):
    """Nine significant digits: what FP32 losses have."""
    return float(f"{value:.9g}") if isinstance(value, float) and np.isfinite(value) else value
