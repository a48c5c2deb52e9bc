"""profile.steps: what is in the trace, that no bit moves, and what an out-of-memory error says."""

import gzip
import json
import os
import pickle

import pytest
import torch

from base.runfolder import PROFILE
from launcher.compose import ConfigError, compose
from training.start.failures import one_line_errors

QUICK = ["evaluate.every=null", "checkpoint.every=null"]


def traced_steps(folder) -> list[int]:
    """The numbers of the steps in a trace, in order."""
    trace = json.loads(gzip.decompress((folder / PROFILE / "rank0.trace.json.gz").read_bytes()))
    found = {event["name"] for event in trace["traceEvents"] if event["name"].startswith("step ")}
    assert any(event["name"] == "aten::mm" for event in trace["traceEvents"])
    return sorted(int(name.removeprefix("step ")) for name in found)


def test_asked_for_steps_are_in_the_trace_and_no_bit_moves(run, rows):
    _, plain = run(*QUICK, "quant=fp8", "steps=3", name="plain")
    code, traced = run(*QUICK, "quant=fp8", "steps=3", "profile=true", "profile.steps=[2,3]", name="traced")
    assert code == 0 and traced_steps(traced) == [2, 3]
    for field in ("loss", "grad_norm"):
        assert [row[field] for row in rows(traced, "train")] == [row[field] for row in rows(plain, "train")]
    hashes = [json.loads((folder / "run.json").read_text())["hash"] for folder in (plain, traced)]
    assert hashes[0] == hashes[1] and not (plain / PROFILE).exists()
    assert not any(name.startswith(".tmp") for name in os.listdir(traced / PROFILE))


def test_a_run_that_stops_in_the_middle_keeps_what_was_traced(run, stop_after):
    with stop_after(5):
        _, folder = run(*QUICK, "profile.steps=[4,9]")
    assert traced_steps(folder) == [4, 5, 6]  # the sixth was begun


@pytest.mark.parametrize("steps", ["[5]", "[7,6]", "[0,2]"])
def test_what_are_no_two_steps_is_refused(steps):
    with pytest.raises(ConfigError, match=r"profile\.steps.*\[20,25\]"):
        compose([f"profile.steps={steps}"])


def test_steps_beyond_the_run_are_refused_before_any_work(run, tmp_path):
    with pytest.raises(ValueError, match=r"profile\.steps.*10 steps.*profile\.steps=\[10,10\]"):
        run("profile=true")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def out_of_memory(run, watch, capsys):
    """out_of_memory(*overrides): what a run says that has no memory left in its first step."""

    def see(step: int) -> None:
        if step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    def start(*overrides: str) -> str:
        with watch(see), one_line_errors() as outcome:
            run(*QUICK, *overrides)
        message = capsys.readouterr().err
        assert outcome.code == 1 and "Tried to allocate 2 GiB" in message and len(message.splitlines()) == 1
        return message

    return start


def test_out_of_memory_says_what_to_change_and_how_much_it_brings(out_of_memory):
    message = out_of_memory("quant=sr")
    assert "recompute=true" in message and "parallel=fsdp" in message
    assert "batch.micro=2 " in message  # 2 x 64 tokens are a block of the rotation, 1 x 64 are not
    assert message.count("GiB expected") == 3


def test_what_is_on_or_impossible_is_not_advised(out_of_memory):
    message = out_of_memory("quant=sr", "recompute=true", "batch.micro=2", "profile.steps=[8,9]")
    assert "recompute=true" not in message and "batch.micro" not in message and "profile=true" not in message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; run by hand: pytest -m gpu")
def test_a_gpu_has_kernels_in_its_trace_and_a_snapshot_of_its_memory(run):
    _, folder = run(*QUICK, "profile.steps=[4,6]")
    trace = json.loads(gzip.decompress((folder / PROFILE / "rank0.trace.json.gz").read_bytes()))
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
    snapshot = pickle.loads((folder / PROFILE / "rank0.memory.pickle").read_bytes())
    assert snapshot["segments"] and any(snapshot["device_traces"])
