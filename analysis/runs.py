"""Runs as base/runfolder.py reads their folders, for comparisons. No torch.

Unfinished runs are normal (no result, the last line half written, evaluations missing) and are read as far as they go.
Anything else out of format is an error that names the file and the line: a silently skipped line would change a figure.
"""

import shlex
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from base.files import glob_paths
from base.runfolder import (
    ENV,
    METRICS,
    RESULT,
    RUN,
    RUN_KEYS,
    SCORE,
    SEGMENT_KEYS,
    RunError,
    read_json,
    read_metrics,
    segments_file,
)
from base.runfolder import columns as columns_of

LOOKS = ("slots", "errors", "xray", "oscillation")  # kinds of rows that have figures of every layer
SHARED_GIB = 4.0  # our own CUDA context, libraries and NCCL's buffers stay below


@dataclass(frozen=True)
class EvalRows:
    """One evaluation, one row per (sequence, document) segment, arrays [rows]; `nats` is the sum over its tokens."""

    sequence: np.ndarray
    document: np.ndarray
    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray


@dataclass(frozen=True)
class Run:
    """One run folder. `train` and `evals` map a field to an array over logged steps; `result` is None until it ends."""

    path: Path
    info: dict
    train: dict[str, np.ndarray]
    evals: dict[str, np.ndarray]
    events: list[dict]
    result: dict | None
    looks: tuple[dict, ...] = ()  # rows of LOOKS, what was seen inside its layers, if it was asked for
    as_of: int | None = None  # cut off by `until` at this step, where it was evaluated

    @property
    def name(self) -> str:
        return self.info["name"]

    @property
    def conditions(self) -> str:
        """What a noise floor belongs to: model, length, batch, data, tokenizer, optimizer and peak rate, amount of
        final validation text."""
        info = self.info
        parts = [info["model"], f"{info['steps']}x{info['tokens_per_step']}", f"seq{info['seq_len']}"]
        parts += [f"data {info['data_fingerprint']}", f"tokenizer {info['tokenizer_hash']}"]
        parts += [f"{info['numerics'].get('optim.name')} lr {info['numerics'].get('schedule.lr_peak')}"]
        return " ".join([*parts, f"val {self.final_targets}"])

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def last_step(self) -> int:
        return int(self.train["step"][-1]) if len(self.train["step"]) else 0

    @property
    def is_dead(self) -> bool:
        """Did it end without having learned anything, by the trainer's own word?"""
        return self.finished and self.result.get("status") == "dead"

    @property
    def diverged_at(self) -> int | None:
        """The step whose loss or gradient was not finite and that the run never got past, or that of a last evaluation
        that is not finite, or of a run that ended dead (training/dead.py); else None. The trainer writes a bad step as
        an event, not as a row of losses."""
        if not np.isfinite(self.evals["loss"][-1:]).all():
            return int(self.evals["step"][-1])
        if self.is_dead:
            return self.last_step
        return None if self.finished else ended_by(reversed(self.events), self.last_step)

    @property
    def status(self) -> str:
        """ "finished", with the number of non-finite steps it got past; "dead", "diverged" or "unfinished
        (step/steps)"; of a run cut off by `until`, the step."""
        steps = self.info["steps"]
        if self.is_dead:
            return f"dead ({self.last_step}/{steps})"
        if self.diverged_at is not None:
            return f"diverged ({self.diverged_at}/{steps})"
        if self.as_of is not None:
            return f"as of step {self.as_of}/{steps}"
        if not self.finished:
            return f"unfinished ({self.last_step}/{steps})"
        bad = len({e["bad_step"] for e in self.events if e["event"] == "nonfinite"})
        return f"finished, {bad} non-finite step{'s' * (bad > 1)}" if bad else "finished"

    @cached_property
    def milliseconds(self) -> float:
        """Median milliseconds a step; the first tenth is left out (compilation, warm-up). NaN without steps."""
        ms = self.train["ms_per_step"]
        return float(np.median(ms[len(ms) // 10 :])) if len(ms) else float("nan")

    @cached_property
    def company(self) -> str:
        """Why its speed means nothing: other processes held memory of its GPU for most of the run, or nobody looked
        (before others_gib was logged). Empty for a run alone on its GPU, or on a CPU."""
        others = self.train["others_gib"]
        if "NVIDIA" not in str(self.read_json(ENV).get("device")):
            return ""
        if np.isnan(others).all():
            return "alone? not logged"
        return "shared GPU" if 2 * int(np.count_nonzero(others > SHARED_GIB)) > len(others) else ""

    @property
    def tokens_per_second(self) -> float:
        return self.info["tokens_per_step"] / self.milliseconds * 1e3

    def looks_of(self, kind: str) -> list[dict]:
        """The rows of one of LOOKS, in the order of steps."""
        return [row for row in self.looks if row["kind"] == kind]

    def served(self, forward: str) -> float:
        """Loss [nats/token] of the final weights under another forward, as scored; RunError where nobody has."""
        scores = self.scores
        if forward not in scores:
            has = f"it has {', '.join(scores)}" if scores else f"python scripts/score.py runs/{self.name} scores it"
            raise RunError(f"{self.path}: no loss under the forward {forward!r} at its end; {has}")
        return float(scores[forward]["loss"])

    @cached_property
    def scores(self) -> dict[str, dict[str, float | None]]:
        """{forward: loss, over_bf16, ...} of the final weights; {} where they were not scored."""
        file = self.read_json(f"{SCORE}/{self.info['steps']}.json")
        return file.get("forwards", {}) if self.as_of is None else {}

    def until(self, step: int) -> "Run":
        """The run as it stood after `step`: what came later, the result with it, is left out."""

        def head(fields: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {key: values[fields["step"] <= step] for key, values in fields.items()}

        events = [event for event in self.events if event["step"] <= step]
        cut = step < self.info["steps"]
        return replace(
            self,
            train=head(self.train),
            evals=head(self.evals),
            events=events,
            looks=tuple(row for row in self.looks if row["step"] <= step),
            result=None if cut else self.result,
            as_of=step if cut and step in self.evals["step"] else None,
        )

    def loss_at(self, step: int, field: str = "loss") -> float:
        """Validation loss [nats/token] (or bpb) logged at `step`; KeyError when it was not evaluated there."""
        where = np.flatnonzero(self.evals["step"] == step)
        if not len(where):
            raise KeyError(f"{self.path}: no evaluation at step {step}")
        return float(self.evals[field][where[-1]])

    @property
    def bpb_is_approximate(self) -> bool:
        """True where the tokenizer lost part of the validation text (EvalSet.summary)."""
        return bool(np.nansum(self.evals["bpb_approximate"]))

    @cached_property
    def targets(self) -> np.ndarray:
        """Tokens scored at each evaluation [evaluations]: the last one often covers more text than the others.

        From the rows, or from `targets` in metrics.jsonl where a small copy (analysis/keep.py) has no rows.
        """
        return np.array([self._scored(i) for i in range(len(self.evals["step"]))])

    def targets_at(self, step: int) -> float:
        """Tokens scored at `step`."""
        return float(self.targets[np.flatnonzero(self.evals["step"] == step)[-1]])

    @cached_property
    def final_targets(self) -> int:
        """Tokens scored at the last evaluation; 0 without one."""
        return int(self._scored(-1)) if len(self.evals["step"]) else 0

    def _scored(self, i: int) -> float:
        known = self.evals["targets"][i]
        return read_rows(self.path, int(self.evals["step"][i])).tokens.sum() if np.isnan(known) else known

    @cached_property
    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and validation losses of the evaluations on the same text as the first: a curve without a jump."""
        same = self.targets == self.targets[:1]
        return self.evals["step"][same], self.evals["loss"][same]

    @cached_property
    def best_loss(self) -> float:
        """The lowest validation loss among the evaluations on the same text as the last one."""
        return float(np.min(self.evals["loss"][self.targets == self.targets[-1:]], initial=np.inf))

    def rows_at(self, step: int) -> EvalRows:
        """The per-segment rows of the evaluation at `step`. Read once: every pair of recipes asks for them."""
        if step not in self._rows:
            self._rows[step] = read_rows(self.path, step)
        return self._rows[step]

    @cached_property
    def _rows(self) -> dict[int, EvalRows]:
        return {}

    def read_json(self, name: str) -> dict:
        """`env.json`, `plan.json`, ...: {} when the run has none."""
        path = self.path / name
        return json_object(path) if path.exists() else {}


def ended_by(newest_first: Iterable[dict], last_step: int) -> int | None:
    """The non-finite step that ended a run, from its records: it was neither skipped nor rolled back, and no training
    step came after it. Of a step with finite losses whose state couldn't be saved (`loss` null) the row is there, too.
    (Records of training/nonfinite.py.)"""
    last = next((r for r in newest_first if r.get("event") in ("nonfinite", "skip", "rollback")), None)
    ended = last is not None and last["event"] == "nonfinite"
    ended = ended and last["bad_step"] >= last_step + (last.get("loss", "") is not None)
    return last["bad_step"] if ended else None


def read_run(path: str | Path, records: list[dict] | None = None) -> Run:
    """Read one run folder. RunError for a malformed one; unfinished runs are fine. `records`: its read_metrics, where
    they are wanted for more."""
    path = Path(path)
    info = json_object(path / RUN)
    missing = [key for key in RUN_KEYS if key not in info]
    if missing:
        raise RunError(f"{path}/run.json: lacks {missing}")
    for key, kind in (("numerics", dict), ("seed", int), ("steps", int), ("tokens_per_step", int)):
        if not isinstance(info[key], kind):
            raise RunError(f"{path}/run.json: {key} must be of type {kind.__name__}, got {info[key]!r}")
    result = _result(path / RESULT) if (path / RESULT).exists() else None  # before the records it ends
    records = read_metrics(path) if records is None else records
    return Run(
        path=path,
        info=info,
        train=_columns(path, records, "train"),
        evals=_columns(path, records, "eval"),
        events=[r for r in records if r["kind"] == "event"],
        result=result,
        looks=tuple(r for r in records if r["kind"] in LOOKS),
    )


def _result(path: Path) -> dict:
    result = json_object(path)
    if not isinstance(result.get("final_loss"), int | float):
        raise RunError(f"{path}: final_loss must be a number, got {result.get('final_loss')!r}")
    return result


def find_runs(patterns: list[str]) -> list[Run]:
    """Runs named by folders or globs, each once, in the order given.

    A glob passes over folders without run.json (plots, other results); a folder named outright must be a run.
    RunError when a pattern finds nothing, and for a run beside its copy, which would count as an exact rerun.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        is_glob = any(c in pattern for c in "*?[") and not Path(pattern).exists()
        found = glob_paths(pattern) if is_glob else [Path(pattern)]
        if is_glob:
            found = [p for p in found if (p / RUN).exists()]
        elif not found[0].exists():
            raise RunError(f"{pattern}: no such folder")
        elif not (found[0] / RUN).exists():
            raise RunError(f"{pattern}: no run.json there; give run folders, for example runs/*")
        if not found:
            raise RunError(f"{pattern}: no run folder matches")
        paths.update(dict.fromkeys(p.resolve() for p in found))
    runs = [_read_given(path) for path in paths]
    begun: dict[tuple[str, float], Path] = {}
    for run in runs:
        # Of the first start, which no other run shares; a resume and a small copy keep it.
        time = next((event["time"] for event in run.events if "time" in event), None)
        if time is not None and (first := begun.setdefault((run.info["hash"], time), run.path)) != run.path:
            raise RunError(f"{first} and {run.path}: one is a copy of the other (they began at one time); give one")
    return runs


def _read_given(path: Path) -> Run:
    """read_run; its error says how to go on without a damaged run, which may be one of a hundred."""
    try:
        return read_run(path)
    except RunError as error:
        way_out = f"put a good copy of the file there, or leave the run out; type: {set_aside(path)}"
        raise RunError(f"{error}; {way_out}") from None


def set_aside(damaged: Path) -> str:
    """The command that takes a damaged file, or a run folder, out of the way; globs such as runs/* pass over a folder's
    new name."""
    dot = "." if damaged.is_dir() else ""
    return shlex.join(["mv", "-n", str(damaged), str(damaged.with_name(f"{dot}{damaged.name}.damaged"))])


def json_object(path: Path) -> dict:
    """The object in a JSON file; RunError names the file that holds something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise RunError(f"{path}: a JSON object is needed, got {type(value).__name__}")
    return value


def read_rows(run: Path, step: int) -> EvalRows:
    """The per-segment rows of a run folder's evaluation. RunError when the file is missing, damaged or malformed."""
    path = segments_file(run, step)
    if not path.exists():
        raise RunError(
            f"{path}: missing, but metrics.jsonl reports an evaluation at step {step} (a small copy made by "
            "keep_results.py has these rows of last evaluations alone)"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            rows = {key: file[key] for key in SEGMENT_KEYS}
        if len({(values.ndim, values.shape) for values in rows.values()}) > 1 or rows["nats"].ndim != 1:
            raise ValueError(f"columns of shapes {[values.shape for values in rows.values()]}")
        return EvalRows(**rows)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(f"{path}: can't be read ({error}); needs {list(SEGMENT_KEYS)}") from None


def _columns(path: Path, records: list[dict], kind: str) -> dict[str, np.ndarray]:
    """Fields of all records of a kind as FP64 arrays; one that came later is NaN where it is missing."""
    keys, later = columns_of(kind, later=False), columns_of(kind, later=True)
    chosen = [r for r in records if r["kind"] == kind]
    try:
        columns = {key: np.array([r[key] for r in chosen], dtype=np.float64) for key in keys}
        columns |= {key: np.array([r.get(key) for r in chosen], dtype=np.float64) for key in later}
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path / METRICS}: a {kind!r} record lacks or garbles {error}; needs {list(keys)}") from None
    steps = columns["step"]
    if np.any(np.diff(steps) <= 0):
        where = int(np.flatnonzero(np.diff(steps) <= 0)[0])
        raise RunError(
            f"{path / METRICS}: {kind} steps must increase, got {steps[where]:.0f} then {steps[where + 1]:.0f}"
        )
    return columns
