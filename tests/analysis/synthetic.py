"""Run folders in the exact format of the trainer, with losses that the tests choose."""

import itertools
import json
from pathlib import Path

import numpy as np

BASE_INFO = {
    "model": "llama_tiny",
    "parameters": 5_000_000,
    "parameters_non_embedding": 3_000_000,
    "steps": 100,
    "tokens_per_step": 1024,
    "seq_len": 128,
    "vocab_size": 4096,
    "data_fingerprint": "d" * 16,
    "tokenizer_hash": "t" * 16,
    "experiment": None,
    "cell": None,
    "command": "python train.py",
}
STARTS = itertools.count(1.8e9)  # no two runs begin at one time
EVAL_STEPS = (25, 50, 75, 100)


def eval_rows(loss: float, documents: int = 12, seed: int = 7, noise: float = 0.0) -> dict[str, np.ndarray]:
    """Segments of 40 validation sequences over a few documents of very different length; mean exactly `loss`."""
    rng = np.random.default_rng(seed)
    sequence = np.repeat(np.arange(40), 2)
    document = sequence * (documents - 1) // 40 + np.tile([0, 1], 40) + seed  # other seeds stand for other text
    tokens = np.tile([100, 28], 40)
    level = rng.normal(scale=0.3, size=documents)[document - seed] + noise * np.random.default_rng().normal(size=80)
    level -= (level * tokens).sum() / tokens.sum()
    return {
        "sequence": sequence.astype(np.int64),
        "document": document.astype(np.int64),
        "nats": (loss + level) * tokens,
        "tokens": tokens.astype(np.int64),
        "bytes": tokens.astype(np.int64) * 4,
    }


def non_finite(path: Path, step: int, policy: str | None = None) -> None:
    """Add what training/nonfinite.py writes of a bad step to a run; without a policy the run stopped there."""
    records = [{"event": "nonfinite", "bad_step": step, "loss": "nan"}]
    records += [{"event": policy, "bad_step": step}] if policy else []
    with open(path / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"kind": "event", "step": step - 1, **record}) + "\n" for record in records)


def write_run(
    root: Path,
    recipe: str = "bf16",
    seed: int = 0,
    final: float = 3.0,
    *,
    label: str | None = None,
    steps_done: int = 100,
    ms: float = 10.0,
    numerics: dict | None = None,
    rows_seed: int = 7,
    name: str | None = None,
    others_gib: float | None = None,
    device: str = "cpu",
    **info,
) -> Path:
    """Write runs/<name> with a smooth loss curve that ends at `final`; `steps_done` < 100 leaves it unfinished.
    `others_gib`: GPU memory of other processes; None as runs on a CPU and old ones have it."""
    label = label or recipe
    fields = {**BASE_INFO, **info, "recipe": recipe, "recipe_label": label, "seed": seed}
    fields["tokens"] = fields["steps"] * fields["tokens_per_step"]
    fields["numerics"] = {"seed": seed, "recipe": label, "optim.lr": 1e-3, **(numerics or {})}
    fields["name"] = name or f"{fields['model']}-{label}-{seed}"
    fields.setdefault("hash", f"{label}-{seed}-{fields['model']}")
    path = root / fields["name"]
    (path / "eval").mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(fields))
    (path / "env.json").write_text(json.dumps({"commit": "abc", "device": device, "packages": {"torch": "2.13"}}))
    (path / "config.yaml").write_text(f"quant: {label}\nseed: {seed}\n")
    per_step = fields["tokens_per_step"]
    records = [{"kind": "event", "event": "start", "step": 0, "time": next(STARTS), "init_hash": f"i{seed}"}]
    for step in range(1, steps_done + 1):
        loss = final + 4.0 * (100 - step) / 100
        record = {"kind": "train", "step": step, "tokens": step * per_step, "loss": loss - 0.01, "grad_norm": 1.0}
        record |= {"lr": 1e-3, "ms_per_step": ms, "tokens_per_second": per_step / ms * 1e3, "mfu": 0.1}
        record |= {"mfu_formula": "6N+12Lds", "memory_gib": 0.5, "others_gib": others_gib}
        record |= {"samples": "ab", "time": step * ms / 1e3}
        records.append(record)
        if step in EVAL_STEPS:
            rows = eval_rows(loss, seed=rows_seed)
            np.savez(path / "eval" / f"{step}.npz", **rows)
            records.append({"kind": "eval", "step": step, "tokens": step * per_step, "loss": loss, "bpb": loss / 2.8})
            records[-1] |= {"se": 0.01, "time": step * ms / 1e3}
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if steps_done == 100:
        result = {
            "status": "finished",
            "step": 100,
            "tokens": 100 * per_step,
            "final_loss": final,
            "final_bpb": final / 2.8,
        }
        result |= {
            "wall_s": ms / 10,
            "train_loss_last": final,
            "ms_per_step_median": ms,
        }
        (path / "result.json").write_text(json.dumps(result))
    return path
