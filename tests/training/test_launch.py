"""Whole runs in miniature: they learn, leave what they promise, resume exactly, and refuse what they must."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from support import KINDS

from analysis.runs import read_run
from data.loader import Loader
from data.tokens import TokenSet
from launcher.compose import compose
from training.checkpoint.manifest import checkpoints
from training.loop import Trainer
from training.records.identity import IdentityError
from training.start.build import is_graphed


@pytest.mark.parametrize("recipe", KINDS)
def test_ten_steps_of_every_recipe_learn(run, rows, recipe):
    code, folder = run(f"quant={recipe}", "evaluate.every=null", "checkpoint.every=null")
    losses = [row["loss"] for row in rows(folder, "train")]
    assert code == 0
    assert losses[0] == pytest.approx(np.log(300), abs=0.05)  # a fresh model knows nothing of 300 tokens
    assert losses[-1] < losses[0] - 0.8
    assert json.loads((folder / "plan.json").read_text())["label"] == recipe


def test_run_folder_holds_what_readers_need(run, rows):
    _, folder = run("quant=quartet2", "evaluate.slots=true", "evaluate.bf16=true")
    info = json.loads((folder / "run.json").read_text())
    assert (info["recipe"], info["seed"], info["steps"], info["tokens_per_step"]) == ("quartet2", 0, 10, 512)
    assert info["tokens"] == 5120 and info["parameters"] - info["parameters_non_embedding"] == 2 * 300 * 128
    train = rows(folder, "train")
    assert [row["step"] for row in train] == list(range(1, 11))
    assert [row["tokens"] for row in train] == [512 * step for step in range(1, 11)]
    assert len({row["samples"] for row in train}) == 10
    assert train[0]["mfu"] is None and train[0]["lr"] == pytest.approx(1e-2)  # one warm-up step, no known CPU peak
    evals = rows(folder, "eval")
    assert [row["step"] for row in evals] == [5, 10]
    assert evals[-1]["loss_bf16"] != evals[-1]["loss"]
    with np.load(folder / "eval" / "10.npz") as saved:
        assert saved["nats"].sum() / saved["tokens"].sum() == pytest.approx(evals[-1]["loss"], rel=1e-12)
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["step"]) == ("finished", 10)
    assert result["final_loss"] == evals[-1]["loss"]
    slots = rows(folder, "slots")[-1]["slots"]["blocks.0.attn.qkv"]
    assert set(slots) == {"fprop.x", "fprop.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"}
    assert (folder / "start.txt").read_text().splitlines()[0].startswith("run ")
    assert rows(folder, "event")[0]["event"] == "start"


def weights(folder, step):
    from training.checkpoint.state import read_all

    return read_all(folder / "checkpoints" / f"step_{step:08d}")


@pytest.mark.parametrize("recipe", ["bf16", "quartet2"])
def test_interrupted_run_continues_bitwise(run, rows, stop_after, recipe):
    """Stopped at step 6 by the flag that signals set, then the same command: as if nothing had happened."""
    _, straight = run(f"quant={recipe}", name="straight")
    with stop_after(6):
        code, resumed = run(f"quant={recipe}", name="resumed")
    assert code == 0 and not (resumed / "result.json").exists()
    assert [path.name for path in checkpoints(resumed / "checkpoints")][-1] == "step_00000006"
    assert run(f"quant={recipe}", name="resumed")[0] == 0
    assert [row["event"] for row in rows(resumed, "event")].count("resume") == 1
    for kind, fields in (("train", ("step", "loss", "grad_norm", "lr", "samples")), ("eval", ("step", "loss", "bpb"))):
        first, second = ([[row[f] for f in fields] for row in rows(folder, kind)] for folder in (straight, resumed))
        assert first == second
    one, other = weights(straight, 10), weights(resumed, 10)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_finished_run_says_so_and_is_left_alone(run, capsys):
    _, folder = run()
    before = (folder / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert run()[0] == 0
    assert "this run is finished (step 10, final loss" in (out := capsys.readouterr().out) and str(folder) in out
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.final_tokens=10"], "10 evaluation tokens are 0 sequences of 64"),
        (["batch.seq_len=100000", "batch.sequences=4"], "one sequence needs 100001"),
        (["optim=muon"], "optim=muon is made for"),
    ],
)
def test_what_can_be_known_in_advance_is_refused_before_anything_is_written(run, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(*overrides)
    assert not list(tmp_path.rglob("run.json"))


NEEDS_NO_TEXT = [
    "quant.wgrad.dy.rounding=sr2",
    "quant.rules=[{match: zzz, recipe: bf16}]",
    "model.heads=7",
    "batch.micro=3",
]


@pytest.mark.parametrize("mistake", NEEDS_NO_TEXT)
def test_mistakes_that_need_no_text_are_told_before_any_is_prepared(run, tmp_path, mistake):
    with pytest.raises(ValueError):
        run(f"paths.data={tmp_path / 'unmade'}", mistake)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["..", "a/b", "", "x y"])
def test_a_runs_name_is_one_folder(run, name):
    with pytest.raises(ValueError, match=r"run\.name=.*needs the name of one folder"):
        run(name=name)


@pytest.mark.parametrize("option", ["model.name", "quant.name"])
def test_names_that_the_folders_name_is_made_of_cannot_leave_it(run, tmp_path, option):
    with pytest.raises(ValueError, match=rf"{option}=a/../../esc: part of a folder's name"):
        run(f"{option}=a/../../esc", name=None)
    assert not list(tmp_path.rglob("run.json"))


def test_a_run_that_ended_between_its_evaluation_and_its_result_has_one_evaluation(run, rows, monkeypatch):
    _, folder = run("quant=sr")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").unlink()
    monkeypatch.setattr(Trainer, "_score", None)
    assert run("quant=sr")[0] == 0
    again = json.loads((folder / "result.json").read_text())
    assert [row["step"] for row in rows(folder, "eval")] == [5, 10]
    assert all(again[key] == result[key] for key in ("final_loss", "final_bpb", "final_se", "train_loss_last"))


def test_lost_lines_of_metrics_are_told(run, stop_after, capsys):
    with stop_after(6):
        _, folder = run()
    (folder / "metrics.jsonl").unlink()
    assert run()[0] == 0
    assert "has nothing of steps 1 to 6: were lines removed?" in capsys.readouterr().out


def test_one_validation_document_has_no_standard_error(run, rows, tmp_path, capsys):
    (tmp_path / "val.txt").write_text("kana lore mito sena. " * 400)
    code, folder = run(f"data.val_files={tmp_path / 'val.txt'}", "evaluate.every=null")
    assert code == 0 and [row["se"] for row in rows(folder, "eval")] == [None]
    assert json.loads((folder / "result.json").read_text())["final_se"] is None
    assert re.search(r"eval at step 10: \d\.\d{4} nats/token", capsys.readouterr().out)
    assert np.isnan(read_run(folder).evals["se"]).all()


def test_a_damaged_result_can_be_deleted(run, rows):
    _, folder = run()
    before = rows(folder, "train")
    (folder / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json: not JSON.*delete it"):
        run()
    (folder / "result.json").unlink()
    assert run()[0] == 0 and (folder / "result.json").exists() and rows(folder, "train") == before


@pytest.mark.parametrize("key", ["paths.runs", "paths.data"])
def test_a_place_that_is_no_folder_is_named_with_its_option(run, tmp_path, key):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"{key}: can't make .*file.* \(.*\); set {key} to"):
        run(f"{key}={tmp_path / 'file'}")


def test_an_evaluation_that_the_checkpoint_saw_is_not_made_again(run, rows, stop_after):
    with stop_after(7):
        _, folder = run()
    shutil.rmtree(folder / "checkpoints" / "step_00000007")  # killed: step 5 is the newest, and evaluated
    assert run()[0] == 0
    assert [row["step"] for row in rows(folder, "eval")] == [5, 10]


def test_other_numerics_in_the_same_folder_are_refused_with_the_keys(run):
    run()
    with pytest.raises(IdentityError) as caught:
        run("optim.weight_decay=0.2", "steps=12")
    text = str(caught.value)
    assert "optim.weight_decay: 0.1 (stored) -> 0.2 (now)" in text
    assert "schedule.steps: 10 (stored) -> 12 (now)" in text
    assert "run.name=test-2" in text and "seed:" not in text


def test_what_does_not_change_numbers_may_change(run):
    _, folder = run("steps=5")
    (folder / "result.json").unlink()
    assert run("steps=5", "log.every=1", "checkpoint.every=2", "evaluate.every=null", "backend=reference")[0] == 0


def test_default_name_tells_model_recipe_length_seed_and_hash(run):
    _, folder = run("quant=sr", "seed=3", "steps=1", name=None)
    info = json.loads((folder / "run.json").read_text())
    assert folder.name == info["name"] == f"llama_tiny-sr-512-s3-{info['hash'][:8]}"
    _, other = run("quant=sr", "seed=4", "steps=1", name=None)
    assert other.name != folder.name


def test_accumulation_equals_the_large_batch(run, rows):
    """BF16 has no per-micro-batch scale, so only the order of FP32 sums differs; 10 steps amplify it a little."""
    losses, samples = {}, {}
    for micro in (1, 2, 8):
        _, folder = run(f"batch.micro={micro}", "evaluate.every=null", name=f"micro{micro}")
        losses[micro] = [(row["loss"], row["grad_norm"]) for row in rows(folder, "train")]
        samples[micro] = [row["samples"] for row in rows(folder, "train")]
    for micro in (1, 2):
        np.testing.assert_allclose(losses[micro][0], losses[8][0], rtol=2e-4)
        np.testing.assert_allclose([loss for loss, _ in losses[micro]], [loss for loss, _ in losses[8]], rtol=2e-3)
    assert samples[1] == samples[2] == samples[8]


def test_each_step_logs_the_hash_of_the_samples_it_read(run, rows, monkeypatch):
    read, samples_of = [], Loader.samples

    def noting(self, first, count):
        read.append((first, count))
        return samples_of(self, first, count)

    monkeypatch.setattr(Loader, "samples", noting)
    _, folder = run("steps=3", "evaluate.every=null")
    assert read == [(8 * step + first, 4) for step in range(3) for first in (0, 4)]
    loader = Loader(TokenSet(json.loads((folder / "run.json").read_text())["data_path"]), "train", 64, seed=0)
    assert [row["samples"] for row in rows(folder, "train")] == loader.sample_hashes(0, 8, 3)


def test_other_rounding_bits_change_the_rounding_alone(run, rows):
    (_, one), (_, other) = (run("quant=sr", "steps=2", f"rounding_seed={s}", name=f"r{s}") for s in (1, 2))
    starts = [rows(folder, "event")[0]["init_hash"] for folder in (one, other)]
    first, second = rows(one, "train"), rows(other, "train")
    assert starts[0] == starts[1] and [row["samples"] for row in first] == [row["samples"] for row in second]
    assert [row["grad_norm"] for row in first] != [row["grad_norm"] for row in second]


def test_recipes_of_one_seed_share_initialization_and_data(run, rows):
    (_, one), (_, other) = run("quant=bf16", "steps=2", name="one"), run("quant=sr", "steps=2", name="other")
    assert rows(one, "event")[0]["init_hash"] == rows(other, "event")[0]["init_hash"]
    assert [r["samples"] for r in rows(one, "train")] == [r["samples"] for r in rows(other, "train")]
    assert [r["loss"] for r in rows(one, "train")] != [r["loss"] for r in rows(other, "train")]


def test_six_none_are_bitwise_the_baseline(run, rows):
    none = [f"quant.{gemm}=none" for gemm in ("fprop", "dgrad", "wgrad")]
    inputs = ["quant.dgrad.w.source=input", "quant.wgrad.x.source=input"]
    (_, one), (_, other) = run("steps=3", name="one"), run("quant=quartet2", *none, *inputs, "steps=3", name="other")
    assert [r["loss"] for r in rows(one, "train")] == [r["loss"] for r in rows(other, "train")]
    numerics = [json.loads((folder / "run.json").read_text())["hash"] for folder in (one, other)]
    assert numerics[0] == numerics[1]


def test_recomputed_activations_change_no_bit(run, rows):
    (_, one), (_, other) = (
        run("quant=sr", "steps=3", "evaluate.slots=true", name="one"),
        run("quant=sr", "steps=3", "evaluate.slots=true", "recompute=true", name="other"),
    )
    assert [r["slots"] for r in rows(one, "slots")] == [r["slots"] for r in rows(other, "slots")] != []
    assert [r["loss"] for r in rows(one, "train")] == [r["loss"] for r in rows(other, "train")]
    assert [r["grad_norm"] for r in rows(one, "train")] == [r["grad_norm"] for r in rows(other, "train")]


@pytest.mark.parametrize("preset", ["llama_tiny", "llama_30m", "llama_430m", "llama_1b9"])
@pytest.mark.parametrize("recipe", ["bf16", "quartet2", "nvidia"])
def test_dry_run_of_any_preset_prints_the_plan_and_writes_nothing(run, capsys, tmp_path, preset, recipe):
    fields = ("layers", "width", "heads", "hidden")
    from launcher.compose import compose

    shape = [f"model.{name}={getattr(compose([f'model={preset}']).config.model, name)}" for name in fields]
    code, _ = run(f"model={preset}", *shape, f"quant={recipe}", "dry_run=true", "batch.seq_len=128")
    out = capsys.readouterr().out
    assert code == 0 and not (tmp_path / "runs").exists()
    for part in (preset, recipe, "blocks.*.mlp.down", "GiB expected", "micro-batches", "peak 0.01"):
        assert part in out


def test_a_dry_run_names_the_run_that_would_start(run, capsys):
    """Without the data's fingerprint its hash isn't known, and none is made up."""
    assert run("dry_run=true", name=None)[0] == 0
    assert "llama_tiny-bf16-5.12K-s0-<hash> ->" in capsys.readouterr().out
    _, folder = run(name=None)
    path = json.loads((folder / "run.json").read_text())["data_path"]
    assert run("dry_run=true", f"data.path={path}", name=None)[0] == 0
    assert f"{folder.name} ->" in capsys.readouterr().out


def test_scheme_that_this_machine_lacks_is_refused_before_the_folder_is_made(run, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("Transformer Engine may be there")
    wide = ["model.width=256", "model.hidden=256"]
    assert run("quant=fp8_te", *wide, "dry_run=true")[0] == 0
    assert "fp8_te" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="pip install"):
        run("quant=fp8_te", *wide)
    assert not (tmp_path / "runs").exists()


def test_micro_batch_that_no_rotation_divides_is_refused_before_any_work(run, tmp_path):
    with pytest.raises(ValueError, match=r"the 100 tokens of a micro-batch are no multiple of 128.*batch\.micro"):
        run("quant=quartet2", "batch.seq_len=50", "batch.micro=2")
    assert not (tmp_path / "runs").exists()


def test_evaluation_lists_are_fixed_and_clipped_to_the_split(run, rows):
    _, folder = run("evaluate.tokens=128")
    evals = rows(folder, "eval")
    tokens = {row["step"]: np.load(folder / "eval" / f"{row['step']}.npz")["tokens"].sum() for row in evals}
    val = TokenSet(json.loads((folder / "run.json").read_text())["data_path"]).split("val")
    assert tokens == {5: 128, 10: val.length - 1}


def test_a_failed_run_does_not_wait_for_other_ranks(run, monkeypatch):
    """Ending the process group flushes NCCL, with ranks that may be gone; after an error the process just ends."""
    ended = []
    monkeypatch.setattr("training.start.launch.teardown", lambda: ended.append(True))
    with pytest.raises(ValueError, match=r"batch\.micro=3"):
        run("batch.micro=3")
    assert not ended
    assert run("steps=1")[0] == 0 and ended


def test_cuda_graphs_are_refused_where_there_are_none(run, tmp_path):
    """Before anything is written; by what they need and what to type."""
    with pytest.raises(ValueError, match=r"cuda_graphs=true needs a GPU.*here: cpu.*use cuda_graphs=auto"):
        run("cuda_graphs=true", name="graphed")
    assert not list(tmp_path.glob("**/graphed"))


@pytest.mark.parametrize(
    ("setting", "compiled", "fullgraph", "mode", "expected"),
    [
        ("auto", "true", True, "none", True),
        ("auto", "true", True, "ddp", True),
        ("auto", "true", True, "fsdp", False),
        ("auto", "true", False, "none", False),
        ("auto", "false", True, "none", False),
        ("true", "false", True, "none", True),
        ("false", "true", True, "none", False),
    ],
)
def test_which_runs_replay_cuda_graphs(setting, compiled, fullgraph, mode, expected):
    config = compose([f"cuda_graphs={setting}", f"compile={compiled}"]).config
    assert is_graphed(config, fullgraph, mode, torch.device("cuda")) is expected


def test_a_run_that_goes_on_on_another_device_says_so(run, rows, stop_after, monkeypatch, capsys):
    def on(name: str) -> None:
        for module in ("start.launch", "records.runfolder"):
            monkeypatch.setattr(f"training.{module}.device_name", lambda device: name)

    on("NVIDIA H100")
    with stop_after(3):
        run("quant=bf16")
    assert "warning" not in capsys.readouterr().out
    on("NVIDIA H200")
    _, folder = run("quant=bf16")
    assert "was on NVIDIA H100 and continues on NVIDIA H200" in capsys.readouterr().out
    assert [row["device_name"] for row in rows(folder, "event") if "init_hash" in row] == ["NVIDIA H100", "NVIDIA H200"]


def test_evaluations_say_how_much_they_scored(run, monkeypatch):
    _, folder = run("quant=bf16", "evaluate.tokens=640")
    read = read_run(folder)
    scored = [int(read.rows_at(int(step)).tokens.sum()) for step in read.evals["step"]]
    monkeypatch.setattr("analysis.runs.read_rows", None)  # no reader opens a thousand evaluations for this
    assert read.targets.tolist() == scored and scored[0] == 640 < scored[-1]
