"""The hook that fits shaped rounding, in whole runs."""

import pytest
import torch

from training.checkpoint.manifest import checkpoints
from training.checkpoint.state import read_all

WORDS = ["quant=quartet2_shaped", "evaluate.every=null", "evaluate.final_tokens=256", "batch.sequences=4"]
WORDS += ["checkpoint.every=null", "hooks.feedback.every=4", "~quant.hooks", "steps=4"]
WORDS += ["model.width=64", "model.heads=1", "model.hidden=64", "quant.dgrad=none", "quant.wgrad=none"]
F = "hooks.feedback.blocks.0.mlp.down"


def end_of(folder) -> dict[str, torch.Tensor]:
    return read_all(checkpoints(folder / "checkpoints")[-1])


def test_interrupted_between_two_refits_it_goes_on_bit_for_bit(run, stop_after):
    _, straight = run(*WORDS, name="straight")
    with stop_after(3):
        _, stopped = run(*WORDS, name="stopped")
    held = end_of(stopped)
    assert held[f"{F}.x"].any() and held[f"{F}.w"].any()  # fitted after steps 1 and 2
    _, stopped = run(*WORDS, name="stopped")
    one, other = end_of(straight), end_of(stopped)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(held[f"{F}.w"], one[f"{F}.w"])  # and again after step 4


def test_a_recipe_without_its_hook_is_refused(run):
    with pytest.raises(ValueError, match=r"quartet2_shaped needs a hook .*\+hooks\.feedback="):
        run("quant=quartet2_shaped", "~quant.hooks")
    with pytest.raises(ValueError, match=r"hooks\.feedback: no layer"):
        run("quant=quartet2", "+hooks.feedback={}")
    with pytest.raises(ValueError, match=r"hooks\.feedback\.every=0"):
        run("quant=quartet2_shaped", "quant.hooks.feedback.every=0")
