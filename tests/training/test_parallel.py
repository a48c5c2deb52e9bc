"""The same global batch on 1, 2 and 4 processes, in every parallel mode, and checkpoints that move between them.

Real processes over gloo. Summation order is all that may differ: losses to 1e-6 nats (FP32 sums of about 100 terms of
size 1 differ by some 1e-6), gradient norms to 1e-5 relative. Samples are the same by construction of the worker.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from base.files import locked
from training.ranks import parallel
from training.ranks.distributed import Dist

WORKER = Path(__file__).with_name("ranks_worker.py")
ROOT = Path(__file__).parents[2]
# The weights that follow a step with another summation order differ by up to one BF16 rounding of a weight or
# activation here and there; over four steps at lr 1e-3 the loss moves by less than this.
LOSS_ATOL, NORM_RTOL = 2e-4, 5e-4
FIRST_LOSS_ATOL, FIRST_NORM_RTOL = 1e-6, 1e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """Made once, in the folder that all workers of pytest-xdist share: the others wait. (Its loadgroup is no way: 3.8.0
    loses the groups under pytest 9.2.0.)"""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    folder.mkdir(exist_ok=True)
    with locked(folder / "lock"):
        if not (folder / "fsdp-1.json").exists():
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(WORKER), str(folder)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def assert_close(rows: list, expected: list) -> None:
    assert len(rows) == len(expected)
    for (loss, norm), (expected_loss, expected_norm) in zip(rows, expected, strict=True):
        assert loss == pytest.approx(expected_loss, abs=LOSS_ATOL)
        assert norm == pytest.approx(expected_norm, rel=NORM_RTOL)


@pytest.mark.parametrize("name", ["ddp-2", "fsdp-2", "fsdp-4", "hsdp-4"])
def test_same_curve_on_any_number_of_ranks(results, name):
    alone, rows = results["auto-1"]["straight"]["rows"], results[name]["straight"]["rows"]
    assert rows[0][0] == pytest.approx(alone[0][0], abs=FIRST_LOSS_ATOL)
    assert rows[0][1] == pytest.approx(alone[0][1], rel=FIRST_NORM_RTOL)
    assert_close(rows, alone)
    assert alone[-1][0] != pytest.approx(alone[0][0], abs=10 * LOSS_ATOL)  # the weights did move


def test_weights_kept_for_a_step_are_the_same_bits_as_weights_gathered_anew(results):
    assert results["fsdp-2"]["straight"]["rows"] == results["fsdp+regather-2"]["straight"]["rows"]


@pytest.mark.parametrize("name", ["ddp:quartet2-2", "fsdp:quartet2-2"])
def test_random_bits_belong_to_micro_batches_not_to_ranks(results, name):
    """Stochastic rounding, same bits: the first step differs by summation only (with other bits by some 1e-2). Later
    steps may differ by single roundings, where a weight's last bit moved it over a threshold."""
    alone, rows = results["auto:quartet2-1"]["straight"]["rows"], results[name]["straight"]["rows"]
    assert rows[0][0] == pytest.approx(alone[0][0], abs=FIRST_LOSS_ATOL)
    assert rows[0][1] == pytest.approx(alone[0][1], rel=FIRST_NORM_RTOL)
    for (loss, norm), (expected_loss, expected_norm) in zip(rows, alone, strict=True):
        assert loss == pytest.approx(expected_loss, abs=5e-3) and norm == pytest.approx(expected_norm, rel=2e-2)
    assert results[name]["straight"]["resumed"] == rows[2:] and results[name]["straight"]["same_state"]


@pytest.mark.parametrize("name", ["auto-1", "ddp-2", "fsdp-2", "fsdp-4", "hsdp-4"])
def test_resume_on_the_same_ranks_is_bitwise(results, name):
    straight = results[name]["straight"]
    assert straight["resumed"] == straight["rows"][2:]
    assert straight["same_state"]


@pytest.mark.parametrize("name", ["ddp-2", "fsdp-2", "fsdp+regather-2", "hsdp-4"])
def test_an_average_is_scored_in_place_of_the_weights_and_they_come_back(results, name):
    own, averaged, again = results[name]["straight"]["scores"]
    assert own == again != averaged
    alone = results["auto-1"]["straight"]["scores"]
    assert [own, averaged] == pytest.approx(alone[:2], abs=64 * LOSS_ATOL)  # nats summed over 64 targets


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ddp-2", "run-auto-1"),
        ("fsdp-2", "run-auto-1"),
        ("fsdp-2", "run-ddp-2"),
        ("fsdp-4", "run-fsdp-2"),
        ("fsdp-4", "run-ddp-2"),
        ("fsdp-1", "run-ddp-2"),
        ("hsdp-4", "run-fsdp-4"),
        ("fsdp-1", "run-fsdp-4"),
        ("fsdp-1", "run-hsdp-4"),
    ],
)
def test_resume_on_other_ranks_and_modes(results, name, source):
    moved = results[name][source]
    assert moved["step"] == 2
    # What a hook keeps of each weight moves with it, bit for bit; a rank's shard saved as the whole would not.
    assert moved["average"] == results[source.removeprefix("run-")]["straight"]["average"]
    assert_close(moved["rows"], results["auto-1"]["straight"]["rows"][2:])


def test_bf16_gather_rounds_matrices_and_keeps_gains():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.rand(5))
            self.other_gain = torch.nn.Parameter(torch.rand(4))
            self.linear = torch.nn.Linear(3, 7, bias=False)
            self.table = torch.nn.Embedding(2, 3)

    assert parallel.exact_spans(Block(), 2) == [(0, 3), (3, 5), (17, 20)]
    assert parallel.exact_spans(Block(), 1) == [(0, 5), (5, 9), (30, 36)]


def test_choice_of_the_mode():
    one, four = Dist(0, 1, 0, torch.device("cpu")), Dist(0, 4, 0, torch.device("cpu"), local_world=4)
    assert parallel.choose("fsdp", one, 10**10) == "none"
    assert parallel.choose("auto", four, 822_151_168) == "ddp"
    assert parallel.choose("auto", four, 2_067_130_880) == "fsdp"
    assert parallel.choose("ddp", four, 10**10) == "ddp"
    with pytest.raises(ValueError, match=r"at least 2 nodes.*use parallel=fsdp"):
        parallel.choose("hsdp", four, 10**10)
