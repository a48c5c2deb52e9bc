"""Runs that nobody configured by hand: stopped, crashed and changed at random on the way, each ends bitwise as the
uninterrupted one does. What has no part in a run's numbers is drawn anew at every start."""

import random
import shutil
from contextlib import AbstractContextManager

import pytest
import torch
from support import KINDS

from training.checkpoint.manifest import checkpoints
from training.checkpoint.state import read_all

COUNT = 8
NUMBERS = {
    "quant": KINDS,
    "quant.high_precision.last": [0, 0, 1],
    "model.layers": [1, 2],
    "model.residual_dtype": ["float32", "bfloat16"],
    "seed": [0, 3],
    "rounding_seed": ["null", 5],
    "perturb": [0, 1e-3],
    "optim.clip": [1.0, 0.05, "null"],
    "optim.weight_decay": [0, 0.1],
    "schedule": ["cosine", "wsd"],
    "schedule.warmup_steps": ["null", 0, 3],
    "batch.sequences": [4, 8, 12],
    "batch.micro": [2, 4],
    "steps": [7, 11],
    "data.packing": ["stream", "bos_bestfit"],
    "recompute": ["false", "true"],
    "evaluate.tokens": [256, 1024],  # no part of the numbers, but of what is compared
}
NANOCHAT = {
    "model.family": ["nanochat"],
    "optim": ["muon"],
    "optim.lr": [0.02],
    "optim.scalar_lr": [0.05],
    "model.heads": [1],
}
FREE = {
    "log.every": [1, 3, 100],
    "checkpoint.every": [1, 2, 5, "null"],
    "checkpoint.keep_last": [1, 2],
    "checkpoint.keep_every": ["null", 3],
    "checkpoint.asynchronous": ["true", "false"],
    "evaluate.every": [2, 5, "null"],
    "evaluate.slots": ["true", "false"],
    "evaluate.bf16": ["true", "false"],
    "nonfinite": ["stop", "skip", "rollback"],
}


class Crash(Exception):
    pass


def words_of(draw: random.Random, *tables: dict) -> list[str]:
    return [f"{key}={draw.choice(values)}" for table in tables for key, values in table.items()]


def crash_at(watch, step: int) -> AbstractContextManager[None]:
    """As if the process died after that step, before anything of it was logged or saved."""

    def see(at: int) -> None:
        if at == step:
            raise Crash

    return watch(see)


def interrupt(run, stop_after, watch, draw: random.Random, words: list[str], step: int) -> str:
    """Start the run and end it after `step` in one of three ways, which is returned."""
    how = draw.choice(["stop", "crash", "lost"])
    if how == "crash":
        with crash_at(watch, step), pytest.raises(Crash):
            run(*words, name="broken")
    else:
        with stop_after(step):
            _, folder = run(*words, name="broken")
        saved = checkpoints(folder / "checkpoints")
        if how == "lost" and saved:
            shutil.rmtree(saved[-1])
    return f"{how} {step}"


def by_step(found: list[dict], fields: tuple[str, ...]) -> dict[int, list]:
    steps = [row["step"] for row in found]
    assert steps == sorted(set(steps))  # each once, in order
    return {row["step"]: [row[field] for field in fields] for row in found}


# slow: case 3 takes as long as five others, and each of its values and ways to end is in one of them.
@pytest.mark.parametrize("case", [pytest.param(i, marks=[pytest.mark.slow] * (i == 3)) for i in range(COUNT)])
def test_any_run_ends_as_if_it_had_never_been_interrupted(run, rows, stop_after, watch, case):
    draw = random.Random(case)
    numbers = words_of(draw, NUMBERS, NANOCHAT if draw.random() < 0.25 else {})
    steps = int(next(word for word in numbers if word.startswith("steps="))[6:])
    code, straight = run(*numbers, *words_of(draw, FREE), name="straight")
    assert code == 0
    history = []
    for step in sorted(draw.sample(range(1, steps), draw.choice([1, 2, 3]))):
        history.append(interrupt(run, stop_after, watch, draw, [*numbers, *words_of(draw, FREE)], step))
    code, broken = run(*numbers, *words_of(draw, FREE), name="broken")
    assert code == 0

    told = f"{numbers} {history}"
    for kind, fields in (("train", ("loss", "grad_norm", "lr", "samples", "tokens")), ("eval", ("loss", "bpb", "se"))):
        one, other = (by_step(rows(folder, kind), fields) for folder in (straight, broken))
        common = one.keys() & other.keys() if kind == "eval" else one.keys() | other.keys()
        assert steps in common, told
        for step in common:
            assert one[step] == other[step], (kind, step, told)
    one, other = (read_all(checkpoints(f / "checkpoints")[-1]) for f in (straight, broken))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), told
