"""Weights of length one: in whole runs, where a step is left out, on several ranks; and what is refused."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.ngpt import UNIT_COLUMNS, UNIT_ROWS
from models.unit import COLUMNS, ROWS
from training.checkpoint.manifest import checkpoints
from training.checkpoint.state import read_all
from training.hooks import HOOKS
from training.hooks.base import Hook
from training.hooks.normalize import matching
from training.ranks.distributed import Dist

WORKER = Path(__file__).with_name("normalize_worker.py")
ROOT = Path(__file__).parents[2]
NGPT = ["model=ngpt_30m", "model.layers=1", "model.width=128", "model.heads=2", "model.hidden=128"]
SHORT = ["evaluate.tokens=256", "evaluate.final_tokens=256", "schedule=wsd_sqrt"]


class Spoil(Hook):
    """Makes one step's gradient NaN."""

    def before_update(self, step: int) -> None:
        if step == 5:
            next(self.run.model.parameters()).grad.fill_(float("nan"))


def end_of(folder) -> dict[str, torch.Tensor]:
    return read_all(checkpoints(folder / "checkpoints")[-1])


def lengths(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of all that nGPT keeps at one, FP64."""

    class Named:
        def named_parameters(self):
            return weights.items()

    found = [(matching(Named(), globs), over) for globs, over in ((UNIT_ROWS, ROWS), (UNIT_COLUMNS, COLUMNS))]
    assert [len(some) for some, _ in found] == [2 + len(found[1][0]), len(found[1][0])]
    return torch.cat([weight.double().norm(dim=over) for some, over in found for weight in some.values()])


def test_a_run_keeps_lengths_and_resumes_bit_for_bit(run, stop_after):
    words = [*NGPT, *SHORT, "quant=ngpt_nvfp4", "perturb=1e-3"]
    _, straight = run(*words, name="straight")
    weights = {name.removeprefix("model."): tensor for name, tensor in end_of(straight).items()}
    assert (lengths(weights) - 1).abs().max() < 1e-6
    with stop_after(7):
        run(*words, name="stopped")
    _, stopped = run(*words, name="stopped")
    one, other = end_of(straight), end_of(stopped)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="can't be exported"):
        runpy.run_path(str(ROOT / "scripts" / "export_hf.py"))["export"](
            straight, straight / "exported", None, "float32", 5
        )


def test_a_fixed_amax_that_is_too_small_is_told_once(run, rows, capsys):
    """Unit vectors stay within amax 1, from the start on; a Llama's inputs don't."""
    words = ["quant=ngpt_nvfp4", "evaluate.slots=true", "evaluate.tokens=256", "evaluate.final_tokens=256"]
    _, folder = run(*NGPT, *words, "schedule=wsd_sqrt", name="ngpt")
    kept = [slot for row in rows(folder, "slots") for layer in row["slots"].values() for slot in layer.items()]
    fixed = [counts["beyond_amax"] for name, counts in kept if name in ("fprop.x", "fprop.w", "wgrad.x")]
    assert fixed and not any(fixed) and all("beyond_amax" not in counts for name, counts in kept if "dy" in name)
    assert "fixed amax" not in capsys.readouterr().out
    run(*words, name="llama")
    assert capsys.readouterr().out.count("beyond their fixed amax") == 1


def test_nothing_changes_from_a_bad_step_until_the_host_looks(run, monkeypatch):
    """The host sees step 6 at once, or four steps later: the same weights in the end."""
    monkeypatch.setitem(HOOKS, "spoil", Spoil)
    words = [*NGPT, *SHORT, "hooks.spoil={}", "nonfinite=skip", "checkpoint.every=null", "evaluate.every=null"]
    ends = [end_of(run(*words, f"log.every={every}", name=f"log-{every}")[1]) for every in (1, 10)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    weights = {name.removeprefix("model."): tensor for name, tensor in ends[0].items()}
    assert (lengths(weights) - 1).abs().max() < 1e-6


def test_the_same_weights_on_any_number_of_ranks(tmp_path):
    """Alone, and on four ranks in each mode; hsdp as if on two nodes."""
    modes, paths = ("ddp", "fsdp", "hsdp"), os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(WORKER), str(tmp_path), *modes],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = runpy.run_path(str(WORKER))["train"]("none", Dist(0, 1, 0, torch.device("cpu")))
    for mode, found in {"none": alone, **{mode: torch.load(tmp_path / f"{mode}.pt") for mode in modes}}.items():
        assert found["skipped"], mode
        assert (lengths(found["weights"]) - 1).abs().max() < 1e-6, mode
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4), mode
        for name, weight in found["weights"].items():
            assert (weight - alone["weights"][name]).norm() < 1e-3 * weight.norm(), f"{mode}: {name}"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hooks.normalize.rows=[lm_heat.weight]"], "lm_heat.*lm_head.weight"),
        (["hooks.normalize.rows=['*norm.weight']"], "norm.weight, which is no matrix"),
        (["hooks.normalize.rows=3"], r"rows=3.*hooks\.normalize\.rows=\[lm_head\.weight\]"),
        (["hooks.normalize.rows=[embed.weight]", "hooks.normalize.columns=['e*']"], "embed.weight.*leave it out"),
        ([*NGPT, "hooks.normalize.rows=[embed.weight]"], "normalize.*leave one of them out"),
    ],
)
def test_wrong_names_are_refused_before_any_work(run, tmp_path, words, told):
    with pytest.raises(ValueError, match=told):
        run(*words)
    assert not (tmp_path / "runs").exists()
