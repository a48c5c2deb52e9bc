"""Weights that oscillate between two codes are set to one; those that travel, and those that stand still, are not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kernels import backend
from quant import library
from quant.linear import QuantLinear
from quant.plan import Entry, Plan
from training.checkpoint.manifest import checkpoints
from training.checkpoint.state import read_all
from training.hooks import build, read
from training.hooks.base import Run
from training.probes.oscillation import Oscillation, OscillationOptions

WINDOW = 50
NO_SKIP = torch.zeros(())


class OneLayer(nn.Module):
    """W [16, 16] whose largest element makes the tensor's scale 1, and every block's too: 6 * 448 at (0, 0), 6 in each
    row."""

    def __init__(self):
        super().__init__()
        linear = nn.Linear(16, 16, bias=False)
        with torch.no_grad():
            linear.weight.fill_(0.0)
            linear.weight[:, 15] = 6.0
            linear.weight[0, 15] = 6.0 * 448
        recipe = library.build(library.mapping("quartet2") | {"name": "mine"} | plain())
        self.layer = QuantLinear(linear, recipe, 0, torch.zeros(3, dtype=torch.int64))
        self.model = self

    def put(self, value: float) -> None:
        with torch.no_grad():
            self.layer.weight[3, 2] = value


def plain() -> dict:
    """fprop by absmax, so that a block's scale is its largest element over 6."""
    fprop = library.mapping("quartet2")["fprop"]
    return {"fprop": {**fprop, "x": fprop["x"] | {"select": "absmax"}, "w": fprop["w"] | {"select": "absmax"}}}


@pytest.fixture
def hooked():
    backend.use("reference")
    net = OneLayer()
    recipe = net.layer.recipe
    plan = Plan("", (Entry(0, "layer", (16, 16), recipe, ""),), recipe)
    hook = build(read(net, plan, {"osci_reset": {"start": 0.0}}), Run(net, [], steps=100))["osci_reset"]
    return net, hook


def run_window(net, hook, values, skip=()):
    for step in range(WINDOW + 1):
        net.put(values(step))
        hook.after_step(step, torch.ones(()) if step in skip else NO_SKIP)
    return net.layer.weight[3, 2].item()


def test_an_oscillating_weight_is_set_to_a_code(hooked):
    """1.2421875 and 1.2578125 lie on both sides of 1.25, the border of 1 and 1.5: 50 flips of .5 on 50 of 1/64."""
    net, hook = hooked
    end = run_window(net, hook, lambda step: 1.2421875 if step % 2 == 0 else 1.2578125)
    assert end == 1.0
    state = hook._tensors()
    travel = [state[f"layer.travel_{key}"][3, 2].item() for key in ("w", "q")]
    assert travel == [pytest.approx(0.78125), pytest.approx(25.0)]
    others = net.layer.weight.detach().clone()
    others[3, 2] = 0.0
    assert others.abs().sum() == 6 * 15 + 6 * 448  # nothing else moved


def test_a_travelling_and_a_standing_weight_are_left_alone(hooked):
    net, hook = hooked
    assert run_window(net, hook, lambda step: 1 + step / 64) == 1 + 50 / 64  # 1 to 1.78: travel_q 1, ratio 1.3
    net, hook = hooked
    assert run_window(net, hook, lambda step: 1.24) == torch.tensor(1.24).item()


def test_a_window_whose_first_step_is_skipped_begins_with_the_next(hooked):
    net, hook = hooked
    run_window(net, hook, lambda step: 9.0 if step == 0 else 1.2421875, skip=(0,))
    assert hook._tensors()["layer.travel_w"][3, 2] == 0  # the way from 9, or from zero, isn't counted


def test_interrupted_in_a_window_it_goes_on_bit_for_bit(run, stop_after):
    words = ["quant=quartet2", "evaluate.every=null", "evaluate.final_tokens=256", "batch.sequences=4"]
    words += ["hooks.osci_reset.start=0.3", "hooks.osci_reset.period=5", "hooks.osci_reset.window=4"]
    words += ["hooks.osci_reset.ratio=2.0", "checkpoint.every=null"]
    _, straight = run(*words, name="straight")
    _, without = run(*words[:4], "checkpoint.every=null", name="without")
    with stop_after(6):
        _, stopped = run(*words, name="stopped")
    held = read_all(checkpoints(stopped / "checkpoints")[-1])
    assert "hooks.osci_reset.blocks.0.mlp.down.travel_q" in held
    _, stopped = run(*words, name="stopped")
    one, other = (read_all(checkpoints(folder / "checkpoints")[-1]) for folder in (straight, stopped))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    plain = read_all(checkpoints(without / "checkpoints")[-1])
    assert not torch.equal(plain["model.blocks.0.mlp.down.weight"], one["model.blocks.0.mlp.down.weight"])


def test_a_recipe_without_a_quantized_weight_is_refused(run):
    with pytest.raises(ValueError, match=r"hooks\.osci_reset: no layer's fprop rounds W"):
        run("quant=bf16", "hooks.osci_reset.start=0.3")
    with pytest.raises(ValueError, match=r"hooks\.osci_reset\.window=9: .*period=5"):
        run("hooks.osci_reset.window=9", "hooks.osci_reset.period=5")
    with pytest.raises(ValueError, match=r"hooks\.osci_reset beside normalize: .*leave hooks\.osci_reset out"):
        run("model=ngpt_30m", "quant=ngpt_nvfp4", "hooks.osci_reset.start=0.3")


def test_the_probe_counts_flips_and_sees_how_near_the_border_weights_are(hooked):
    """One weight of 256 goes over the border of 1 and 1.5 and back; the last step leaves it on the other side than the
    look before did."""
    net, _ = hooked
    probe, rows = Oscillation(OscillationOptions(every=6, window=4)), []
    for step in range(1, 13):
        net.put(1.2421875 if step % 2 == 0 or step in (3, 9) else 1.2578125)
        if step == 12:
            net.put(1.40625)
        if probe.due(step):
            numbers = SimpleNamespace(tokens_per_step=1)
            rows += probe.rows(SimpleNamespace(model=net, step=step, numbers=numbers))
    first, second = (row["layers"]["layer"] for row in rows)
    assert [row["window"] for row in rows] == [4, 4]
    assert first["flipped"] is None and first["flips_per_step"] == pytest.approx(2 / 4 / 256)  # steps 5 and 6
    assert second["flipped"] == pytest.approx(1 / 256) and second["flips_per_step"] == pytest.approx(1 / 4 / 256)
    assert first["near"] == pytest.approx(1 / 256) and second["near"] == 0.0  # 0.0078 of 0.5, and 0.3 of it
    assert second["distance"][6] == pytest.approx(1 / 256) and sum(second["distance"]) == pytest.approx(1)
    assert second["distance"][-1] == pytest.approx(255 / 256)  # zeros and the largest, in the middle of their cells


def test_a_look_after_a_gap_tells_no_flips(hooked):
    net, _ = hooked
    probe = Oscillation(OscillationOptions(every=6, window=4))
    numbers = SimpleNamespace(tokens_per_step=1)
    for step in (3, 6):
        rows = probe.rows(SimpleNamespace(model=net, step=step, numbers=numbers))
    assert rows[0]["layers"]["layer"]["flips_per_step"] is None and rows[0]["window"] == 0
