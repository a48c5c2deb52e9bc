"""The folder of a run: its files, the rows of metrics.jsonl and their fields, and how both are read. No third party.

Training writes by this module and analysis reads by it. A new metric is produced (training), declared here, and shown
(analysis): three files; tests/training/test_declared.py holds that nothing undeclared is written.

    config.yaml run.json plan.json env.json start.txt   at start
    metrics.jsonl eval/<step>.npz checkpoints/          while it goes, .lock held
    result.json                                         at the end
    score/<step>.json score/<step>.npz                  by evaluate.served, or scripts/score.py at any time
    tasks/<step>.json                                   by its --tasks and --core: TASK
    profile/rank<n>.trace.json.gz, .memory.pickle       where profile.steps asks for them
    capture/<step>/                                     tensors of linear layers (training/capture.py), if asked for
    xray/<step>.json                                    by scripts/xray.py: what a row of kind xray has
    lift/<step>.json                                    by its --lift: LIFT
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG, RUN, PLAN, ENV, START = "config.yaml", "run.json", "plan.json", "env.json", "start.txt"
METRICS, EVAL, CHECKPOINTS, LOCK = "metrics.jsonl", "eval", "checkpoints", ".lock"
SCORE, TASKS, PROFILE, CAPTURE, XRAYS, LIFTS = "score", "tasks", "profile", "capture", "xray", "lift"
RESULT = "result.json"
# What every run.json has; later fields are beside these.
RUN_KEYS = (
    *("name", "hash", "numerics", "model", "parameters", "parameters_non_embedding"),
    *("recipe", "recipe_label", "seed", "tokens", "steps", "tokens_per_step", "seq_len"),
    *("vocab_size", "data_fingerprint", "tokenizer_hash"),
)
# Arrays of eval/<step>.npz, one element a (sequence, document) segment; nats are summed over its tokens.
SEGMENT_KEYS = ("sequence", "document", "nats", "tokens", "bytes")
WINDOW = 1 << 16  # bytes that newest_rows reads at a time


class RunError(ValueError):
    """A run folder that can't be read; the message says which file, what was found and what to do."""


@dataclass(frozen=True)
class Field:
    """`meaning`, with its unit.

    column: analysis reads it from every row of its kind as a number; later: runs made before it was declared lack it
    (then NaN); kept: it stays in the small copies under results/.
    """

    meaning: str
    column: bool = False
    later: bool = False
    kept: bool = True


# Forwards under which a model's weights are scored beside its own (training/served.py).
FORWARDS = {
    "bf16": "every GEMM in BF16",
    "nvfp4": "X and W in NVFP4, RTN with Four-over-Six, the fixed quantizer under which 4-bit models are compared",
    "nvfp4_x": "X alone so",
    "nvfp4_w": "W alone so",
    "nvfp4_absmax": "both in NVFP4 without Four-over-Six",
    "fp8": "both in E4M3 with a scale a tensor",
}
KIND = Field("train, eval, slots, errors, xray, oscillation or event")
STEP = Field("completed optimizer steps", column=True)
TOKENS = Field("tokens trained on so far", column=True)
TIME = Field("seconds since 1970 when the row was written", column=True)
PLACE = {"kind": KIND, "step": STEP}
# kind -> its fields, in the order in which small copies keep them.
ROWS: dict[str, dict[str, Field]] = {
    "train": {
        **PLACE,
        "tokens": TOKENS,
        "loss": Field("mean nats per token of the step's batch", column=True),
        "grad_norm": Field("2-norm of the gradient before clipping"),
        "lr": Field("peak group's learning rate in this step"),
        "ms_per_step": Field("mean milliseconds of the steps logged together", column=True),
        "tokens_per_second": Field("of the whole job", column=True),
        "mfu": Field("share of the BF16 peak that the model's operations take; null where no peak is known"),
        "others_gib": Field("GPU memory that is not this process's tensors, GiB; null on a CPU", True, later=True),
        "time": TIME,
        "mfu_formula": Field("what mfu counts", kept=False),
        "memory_gib": Field("most memory taken since the start, GiB", kept=False),
        "samples": Field("hash of the step's samples over all ranks", kept=False),
    },
    "eval": {
        **PLACE,
        "tokens": TOKENS,
        "targets": Field("tokens scored", column=True, later=True),
        "loss": Field("mean nats per token", column=True),
        "bpb": Field("bits per byte", column=True),
        "bpb_approximate": Field(
            "true where the tokens do not spell the text whose bytes are counted, else absent", column=True, later=True
        ),
        "se": Field("standard error of loss over documents; null for fewer than two", column=True),
        "loss_bf16": Field("loss of the same weights with every GEMM in BF16"),
        "loss_ema": Field("loss of the weights' moving average (hooks.ema)"),
        **{
            f"loss_{name}": Field(f"loss of the same weights with {what} (evaluate.served), at the end")
            for name, what in FORWARDS.items()
            if name != "bf16"
        },
        "time": TIME,
    },
    "xray": {
        **PLACE,
        "tokens": TOKENS,
        "slices": Field("pieces of text that were looked at, as micro-batches of their own"),
        "slice_tokens": Field("tokens of each; amax and tensor scales are the slice's"),
        "draws": Field("draws of the random bits for each slice"),
        "seconds": Field("that the look took", later=True),
        "forward_error": Field("dW's squared error of the forward's part in the whole pass, mean over layers"),
        "backward_error": Field("the same of the backward's part"),
        "least_rho": Field("the smallest rho of a layer (XRAY)"),
        "biased": Field("products of dX and dW whose own bias is beyond three standard errors and visible"),
        "layers": Field("layer -> recipe, GEMM -> scope -> part -> figure, noise and slots: XRAY"),
        "what_if": Field("other recipe -> layer -> GEMM -> part -> figure, as in the local scope", later=True),
        "time": TIME,
    },
    "oscillation": {
        **PLACE,
        "tokens": TOKENS,
        "window": Field("steps before this one whose flips are counted"),
        "layers": Field("layer -> figure: OSCILLATION"),
        "time": TIME,
    },
    "slots": {
        **PLACE,
        "slots": Field("layer -> operand slot -> counters of its quantizer"),
        "time": TIME,
    },
    "errors": {
        **PLACE,
        "errors": Field("layer -> operand slot -> terms of its squared error (probes.errors={})"),
        "time": TIME,
    },
}
# Scopes and parts of an xray row's figures. `backward` is of dgrad and wgrad only.
XRAY_SCOPES = {
    "local": "the layer alone, fed with X and dY of the pass with quantized forward and exact backward",
    "propagated": "the whole pass: errors of all layers together",
}
XRAY_PARTS = {
    "forward": "Y, dX, dW of the quantized forward with exact backward, against BF16",
    "backward": "dX, dW as trained, against those of the quantized forward with exact backward",
}
# What an xray row says of a layer: of each GEMM by scope and part, of its weight's gradient, of each operand slot. Any
# may be null where it isn't defined (a gradient of zeros).
XRAY: dict[str, dict[str, str]] = {
    "gemm": {
        "error": "squared error relative to the reference's square",
        "cosine": "between product and reference",
        "projection": "of the product on the reference; below 1 it is shrunk",
        # The rest only of what random bits change: the backward, and a forward that draws.
        "variance": "of the draws, relative to the reference's square",
        "bias": "squared bias over draws, relative; unbiased estimate, may be negative",
        "bias_se": "its standard error",
        "visible": "the least squared bias that so many draws tell from none (three standard errors)",
    },
    "noise": {
        "snr_sampling": "gradient over the noise of sampling text, at the run's batch",
        "snr_rounding": "gradient over the noise of random bits, at the run's batch",
        "rho": "snr_rounding / sqrt(3); below 1 quantized training gains little (arXiv 2505.19115)",
        "common": "squared error that slices have in common, relative to the gradient's square; may be negative",
    },
    "slots": {
        "mse": "squared error of the operand, relative; scale to random_cross add up to it",
        "scale": "of the scales' rounding",
        "dead": "of elements that became 0 under exact scales",
        "grid": "of the others under exact scales",
        "scale_grid": "cross term",
        "scale_dead": "cross term",
        "random": "of random bits",
        "random_cross": "cross term",
        "align": "<x, Q(x)> / <x, x> - 1",
        "cos": "cosine between the scales' part and the grid's",
        "dead_share": "elements that became 0 under exact scales",
        "clipped": "share of elements beyond the grid",
        "underflowed": "share of elements that became 0 and weren't",
        "log2_scale": "mean of log2 of block scale over the exact one",
        "kurtosis": "of the tensor before its rotation; 3 for a normal distribution",
        "top_channels": "energy in the largest 1 % of its columns",
        "scales": "18 shares of blocks: scale within a factor 2 of the largest, 4, ...; the last: no scale left",
    },
}
# Of a layer's weights as fprop rounds them; null where an earlier code isn't known.
OSCILLATION = {
    "flipped": "share whose code differs from that of the row before",
    "flips_per_step": "share whose code flips in a step, mean over the window",
    "near": "share within 5 % of the gap between two levels from their border",
    "distance": "10 shares: distance from the border in units of the gap, from 0 to 0.5; the last has what is beyond",
}
# What tasks/<step>.json has under "forwards" of each forward's tasks; each call replaces the tasks that it asks.
TASK = {
    "source": "lm-eval and its version, or core (training/core.py)",
    "questions": "how many were asked",
    "shots": "solved examples before each; null of a group of tasks",
    "metrics": "name -> [value, standard error or null]",
}
# What lift/<step>.json has. `layers` is layer -> lifted (it in BF16, the rest as the run has it) or alone (it as the
# run has it, the rest in BF16) -> layer, x or w (both operands of fprop, or one) or fp8 (both in FP8) -> CHANGE.
LIFT = {
    "step": "completed optimizer steps",
    "targets": "tokens scored",
    "recipe": "the run's",
    "own": "loss under the run's own forward, nats a token",
    "bf16": "the same weights with every GEMM in BF16",
    "gap": "own less bf16",
    "gap_se": "its standard error over documents",
    "layers": "see above",
}
CHANGE = {
    "change": "of the loss, nats a token; of lifted usually below 0",
    "change_se": "its standard error over documents; null for one document",
    "first": "what the first term of a Taylor series says of it: mean of g.dY",
    "first_se": "standard error over sequences",
    "second": "the second term under Fisher's matrix: mean of (g.dY)^2 / 2",
    "second_se": "standard error over sequences",
}
_START = {
    "init_hash": "hash of the initial weights",
    "backends": "operation -> back end",
    "world": "processes",
    "parallel": "none, ddp, fsdp or hsdp",
    "device": "torch's name of it",
    "device_name": "its maker's",
}
_BAD_STEP = "the step whose loss or gradient is not finite"
# event -> its fields beside kind, event, step, tokens and time.
EVENTS: dict[str, dict[str, str]] = {
    "start": _START,
    "resume": _START,
    "checkpoint": {
        "saved_step": "the step that was saved",
        "path": "its folder",
        "stall_s": "seconds that training stood still",
        "write_s": "seconds of writing in the background",
        "gigabytes": "of all ranks",
    },
    "nonfinite": {
        "bad_step": _BAD_STEP,
        "loss": "as text: nan and inf are no JSON; null where a save met the state",
        "grad_norm": "as text",
        "cause": "what the replay found",
    },
    "skip": {"bad_step": _BAD_STEP},
    "rollback": {"bad_step": _BAD_STEP},
    "interrupt": {"reason": "which signal"},
    "finish": {},
}


def segments_file(folder: Path, step: int) -> Path:
    """eval/<step>.npz, an evaluation's arrays (SEGMENT_KEYS)."""
    return folder / EVAL / f"{step}.npz"


def columns(kind: str, later: bool) -> tuple[str, ...]:
    """Fields of a kind that analysis reads as numbers: those of every run, or the `later` ones."""
    return tuple(name for name, field in ROWS[kind].items() if field.column and field.later == later)


def kept_fields(kind: str) -> tuple[str, ...]:
    return tuple(name for name, field in ROWS[kind].items() if field.kept)


def undeclared(row: dict[str, Any]) -> set[str]:
    """What a row has that isn't declared above: field names, or "kind X", "event X"."""
    kind = row["kind"]
    if kind != "event":
        return set(row) - set(ROWS[kind]) if kind in ROWS else {f"kind {kind}"}
    if row["event"] not in EVENTS:
        return {f"event {row['event']}"}
    return set(row) - {"kind", "event", "step", "tokens", "time", *EVENTS[row["event"]]}


def read_json(path: Path) -> Any:
    """What a JSON file holds; RunError names the file that is none."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not even text
        raise RunError(f"{path}: not JSON ({error})") from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl, [] without the file. Only an unterminated last line (being written, or cut by
    a kill) is left out; RunError, which names the line, for any other that is no row."""
    path = folder / METRICS
    if not path.exists():
        return []
    *lines, _unterminated = path.read_bytes().split(b"\n")
    return [_row(path, number, line) for number, line in enumerate(lines, 1)]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        row["step"], row["event" if row["kind"] == "event" else "kind"]
    except (ValueError, KeyError, TypeError) as error:  # not JSON, not even text, or no object with these fields
        raise RunError(
            f"{path}:{number}: malformed record ({error!r}): {line[:80]!r}; repair or delete this line"
        ) from None
    return row


def newest_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run that may be going on or damaged, the newest first, read backwards as far as they are asked for.
    Lines that are no row are passed over."""
    path = folder / METRICS
    if not path.exists():
        return
    with open(path, "rb") as file:
        begin, cut, is_end = file.seek(0, os.SEEK_END), b"", True
        while begin:
            size = min(WINDOW, begin)
            begin -= size
            file.seek(begin)
            cut, *lines = (file.read(size) + cut).split(b"\n")  # the first piece may begin further ahead
            if is_end and lines:
                lines.pop()  # unterminated
                is_end = False
            yield from (row for line in reversed(lines) if (row := _row_or_none(line)))
    if not is_end and (row := _row_or_none(cut)):
        yield row


def _row_or_none(line: bytes) -> dict[str, Any] | None:
    try:
        return _row(Path(), 0, line)
    except RunError:
        return None
