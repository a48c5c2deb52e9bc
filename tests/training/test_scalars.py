"""What trackers plot of rows that have figures of every layer."""

import pytest

from training.records.scalars import numbers


def test_numbers_of_a_row_are_scalars():
    row = {"kind": "train", "step": 3, "loss": 2.5, "mfu": None, "time": 1.0, "ok": True, "samples": "ab"}
    assert numbers(row) == {"train/loss": 2.5}


def test_counters_are_shares_of_all_layers_elements():
    counts = {"elements": 100, "clipped": 10, "zeroed": 0, "blocks": 10, "underflow_blocks": 1}
    fp8 = {"elements": 300, "clipped": 2, "zeroed": 30, "non_finite": 0}  # has no blocks
    row = {"kind": "slots", "step": 3, "slots": {"a": {"fprop.x": counts}, "b": {"fprop.x": fp8}}}
    assert numbers(row) == pytest.approx(
        {"slots/fprop.x/clipped": 0.03, "slots/fprop.x/zeroed": 0.075, "slots/fprop.x/underflow_blocks": 0.1}
    )


def test_oscillation_and_operands_are_means_over_layers():
    layer = {"flipped": None, "flips_per_step": 0.25, "near": 0.5, "distance": [1.0]}
    row = {"kind": "oscillation", "step": 3, "window": 5, "layers": {"a": layer, "b": layer | {"flips_per_step": 0.75}}}
    assert numbers(row) == {
        "oscillation/window": 5,
        "oscillation/flips_per_step": 0.5,
        "oscillation/near": 0.5,
    }
    operands = [{"fprop.x": {"mse": mse, "clipped": None, "underflowed": 0.1, "align": 1.0}} for mse in (0.5, 1.5)]
    expected = {"fprop.x/mse": 1.0, "fprop.x/underflowed": 0.1}
    errors = {"kind": "errors", "step": 3, "errors": dict(zip("ab", operands, strict=True))}
    assert numbers(errors) == {f"errors/{name}": value for name, value in expected.items()}
    layers = {name: {"recipe": "r", "slots": slots} for name, slots in zip("ab", operands, strict=True)}
    xray = {"kind": "xray", "step": 3, "least_rho": 0.5, "layers": layers}
    assert numbers(xray) == {"xray/least_rho": 0.5} | {f"xray/{name}": value for name, value in expected.items()}
