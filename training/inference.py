"""A trained model out of its run folder, for export and for sampling text. One process, no optimizer, no recipe."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.runfolder import CHECKPOINTS, RUN, read_json
from data.tokenizer import TextTokenizer
from models import FIRST, family
from models.llama import rope_table
from training.checkpoint.manifest import checkpoints, latest_good, problems, step_name, step_of
from training.checkpoint.state import load_model
from training.checkpoint.storage import CheckpointError


def split_step(text: str) -> tuple[Path, int | None]:
    """ "runs/NAME@1000" -> (runs/NAME, 1000); without a step, None."""
    folder, at, step = text.rpartition("@")
    return (Path(folder), int(step)) if at and step.isdigit() else (Path(text), None)


def find_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """The newest whole checkpoint, or that of `step`. Raises CheckpointError where there is none or it is damaged."""
    if step is None:
        found = latest_good(run_dir)
        if found is None:
            raise CheckpointError(f"{run_dir} has no checkpoint; is it a run folder, such as runs/<name>?")
        return found
    path = run_dir / CHECKPOINTS / step_name(step)
    there = checkpoints(path.parent)
    if path not in there:
        steps = ", ".join(str(step_of(one)) for one in there) or "none"
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; it has: {steps}")
    reasons = problems(path)
    if reasons:
        raise CheckpointError(f"{path} can't be used: {'; '.join(reasons[:3])}")
    return path


def load_trained(run_dir: str | Path, step: int | None = None) -> tuple[nn.Module, dict[str, Any], int]:
    """(model on the CPU in FP32 with the master weights, run.json, step). Computes without any recipe."""
    run_dir = Path(run_dir)
    path = find_checkpoint(run_dir, step)
    run = read_json(run_dir / RUN)
    stored = {key.removeprefix("model."): value for key, value in run["numerics"].items() if key.startswith("model.")}
    built = family(stored.get("family", FIRST))
    known = {field.name for field in fields(built.Shape)}
    config = built.Shape(**{name: stored[name] for name in known & stored.keys()}, max_seq_len=run["seq_len"])
    model = built(config, compute_dtype=torch.float32)
    meta = load_model(path, model)
    model.rope.copy_(
        rope_table(config.max_seq_len, config.head_dim, config.rope_theta, getattr(config, "rope_llama3", ()))
    )
    return model.eval(), run, meta["step"]


def run_tokenizer(run: dict[str, Any], given: Path | None = None) -> TextTokenizer | None:
    """The tokenizer of a run (its run.json), with the BOS that its data began documents with; None if the data is gone.

    `given`: a tokenizer.json to read instead. ValueError for one that the run was not trained with: its numbers would
    stand for other text.
    """
    folder = Path(run["data_path"]) if run.get("data_path") else None
    manifest = folder / "manifest.json" if folder else None
    bos = json.loads(manifest.read_text())["tokenizer"]["bos"] if manifest and manifest.exists() else None
    if given is None and bos is None:
        return None
    tokenizer = TextTokenizer(given or folder / "tokenizer.json", bos)
    if tokenizer.hash != run["tokenizer_hash"]:
        raise ValueError(f"{tokenizer.path} is not the tokenizer that {run['name']} was trained with")
    return tokenizer


@torch.no_grad()
def sample(
    model: nn.Module, prompt: list[int], count: int, temperature: float, top_k: int, seed: int, stop: int | None = None
) -> Iterator[int]:
    """Yield `count` token ids that follow `prompt`; temperature 0 takes the likeliest. The context is the model's
    training length; older tokens fall out of it. `stop`: the last one to be yielded, if it comes earlier."""
    if not prompt:
        raise ValueError("the prompt needs at least one token; BOS starts a document")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens[-model.config.max_seq_len :]]))[0, -1].float()
        if temperature == 0:
            choice = int(logits.argmax())
        else:
            best = logits.double().topk(min(top_k, len(logits)))  # a tiny temperature would be 0 in FP32
            shares = ((best.values - best.values[0]) / temperature).softmax(0)
            choice = int(best.indices[torch.multinomial(shares, 1, generator=generator)])
        tokens.append(choice)
        yield choice
        if choice == stop:
            return
