"""Served loss: the same weights under other forwards, through scripts/score.py as a person runs it."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from base.runfolder import TASK, TASKS
from data.evalset import EvalSet
from launcher.compose import compose, stored
from training import score as scoring
from training import shaped_weights
from training.harness import Adapter
from training.inference import find_checkpoint, run_tokenizer
from training.likelihood import opened
from training.loss import LossModel
from training.ranks.distributed import Dist
from training.score import score
from training.served import FORWARDS, forward_recipe

ROOT = Path(__file__).parents[2]
CPU = Dist(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def finished() -> dict[str, Path]:
    """The run that these tests share, once one of them has trained it."""
    return {}


@pytest.fixture
def trained(run, finished, tmp_path_factory, tmp_path) -> Path:
    """A copy of a finished run with checkpoints of steps 5 and 10."""
    if not finished:
        _, folder = run("quant=quartet2", "evaluate.bf16=true", "evaluate.tokens=512", "checkpoint.keep_every=5")
        finished["run"] = Path(shutil.copytree(folder, tmp_path_factory.mktemp("finished") / "run"))
    return Path(shutil.copytree(finished["run"], tmp_path / "copy"))


def scored(folder: Path, step: int, *globs: str):
    config, about = stored(folder / "config.yaml"), json.loads((folder / "run.json").read_text())
    return score(config, about, find_checkpoint(folder, step), step, globs, CPU)


@pytest.fixture
def script(main_of):
    return main_of("score.py")


def test_own_and_bf16_are_what_the_run_itself_measured(trained, rows):
    """Bit for bit: the same list, batches, random state and, on a CPU, uncompiled as the run was."""
    final = rows(trained, "eval")[-1]
    found = scored(trained, 10, "*", "*.mlp.*", "*.attn.*")
    table = found.table()
    assert table["own"]["loss"] == final["loss"] and table["own"]["se"] == final["se"]
    assert table["bf16"]["loss"] == final["loss_bf16"] != final["loss"]
    assert (table["bf16"]["over_bf16"], table["bf16"]["over_bf16_se"]) == (0.0, 0.0)
    saved = np.load(trained / "eval" / "10.npz")
    assert np.array_equal(found.nats["own"], saved["nats"])
    # quartet2's forward is nvfp4 itself; in all layers it is nvfp4, in some of them it lies between.
    assert np.array_equal(found.nats["nvfp4"], found.nats["own"])
    assert np.array_equal(found.nats["nvfp4@*"], found.nats["nvfp4"])
    different = ["bf16", "nvfp4", "nvfp4_x", "nvfp4_w", "nvfp4_absmax", "fp8", "nvfp4@*.mlp.*", "nvfp4@*.attn.*"]
    assert len({table[name]["loss"] for name in different}) == len(different)


def test_a_run_scores_its_final_weights_itself_as_the_script_does(run, rows, script):
    """Bit for bit: its file, its last row, and result.json, which the script writes alike."""
    _, folder = run("quant=sr", "evaluate.served=true", "evaluate.tokens=512", "compile=false")
    own = np.load(folder / "score" / "10.npz")
    first, last = rows(folder, "eval")
    result = json.loads((folder / "result.json").read_text())
    assert not first.keys() & {"loss_fp8", "loss_bf16"} and result["served"].keys() == FORWARDS.keys()
    assert result["served"] == {name: last[f"loss_{name}"] for name in FORWARDS}
    assert len({*result["served"].values()}) == len(FORWARDS)
    assert last["loss"] == last["loss_nvfp4_absmax"]  # sr's own forward
    (folder / "result.json").write_text(json.dumps(result | {"served": None}))
    assert script(str(folder))[0] == 0
    assert json.loads((folder / "result.json").read_text()) == result
    again = np.load(folder / "score" / "10.npz")
    assert own.files == again.files and all(np.array_equal(own[name], again[name]) for name in own.files)


def test_a_mixture_is_scored_on_the_text_that_it_was_evaluated_on(run, rows, mix, mixed_folders, script):
    _, folder = run(*mix, "quant=bf16")
    assert script(str(folder))[0] == 0
    written = json.loads((folder / "score" / "10.json").read_text())
    assert written["forwards"]["own"]["loss"] == rows(folder, "eval")[-1]["loss"]
    code, _, errors = script(str(folder), "--data", mixed_folders[0])
    assert code == 2 and "mixture" in errors


def test_difference_and_its_error_pair_documents(trained):
    """As one ratio over documents whose nats are differences: far below the error of either loss."""
    found = scored(trained, 10)
    segments, row = found.evalset.segments, found.table()["nvfp4"]
    apart = found.nats["nvfp4"] - found.nats["bf16"]
    assert row["over_bf16"] == pytest.approx(row["loss"] - found.table()["bf16"]["loss"], abs=1e-12)
    by_document = np.bincount(segments.document, apart - row["over_bf16"] * segments.tokens)
    size = len(by_document)
    assert row["over_bf16_se"] == pytest.approx(
        (size / (size - 1) * (by_document**2).sum()) ** 0.5 / segments.tokens.sum()
    )
    assert 0 < row["over_bf16_se"] < row["se"]


def test_the_script_writes_into_the_run_folder_and_prints_the_table(trained, script):
    code, printed, errors = script(f"{trained}@5", "--layers", "blocks.0.attn.*")
    assert code == 0, errors
    written = json.loads((trained / "score" / "5.json").read_text())
    assert list(written["forwards"]) == ["own", *FORWARDS, "nvfp4@blocks.0.attn.*"] and written["step"] == 5
    own = written["forwards"]["own"]
    assert own["loss"] == scored(trained, 5).table()["own"]["loss"]
    assert f"own {own['loss']:27.5f}"[-10:] in printed and "at step 5" in printed
    arrays = np.load(trained / "score" / "5.npz")
    assert arrays["nats.own"].sum() / arrays["tokens"].sum() == pytest.approx(own["loss"], abs=1e-12)
    assert not (trained / "score" / "10.json").exists()


def test_each_forward_quantizes_what_its_name_says():
    slots = {
        name: tuple(str(operand.spec.grid) for operand in forward_recipe(name).fprop.operands) for name in FORWARDS
    }
    assert (slots["nvfp4_x"], slots["nvfp4_w"]) == (("e2m1", "none"), ("none", "e2m1"))
    assert (slots["bf16"], slots["nvfp4"], slots["fp8"]) == (("none",) * 2, ("e2m1",) * 2, ("e4m3",) * 2)
    assert [forward_recipe(name).operand("fprop.x").spec.select for name in ("nvfp4", "nvfp4_absmax")] == [
        "four_over_six",
        "absmax",
    ]


def test_shaped_weights_are_fitted_on_training_tokens_alone(trained, script, monkeypatch):
    """Other evaluation text, the same matrices; other training tokens, others. The loss is not plain NVFP4's."""
    fitted, original, read = [], shaped_weights.shaped_weights, EvalSet.samples

    def fit(*given):
        made, tokens = original(*given)
        fitted.append(made)
        return made if len(fitted) == 1 else {}, tokens

    monkeypatch.setattr(scoring, "shaped_weights", fit)
    code, printed, errors = script(str(trained), "--shaped-weights")
    assert code == 0 and shaped_weights.SHAPED_W in printed, errors
    written = json.loads((trained / "score" / "10.json").read_text())
    config, about = stored(trained / "config.yaml"), json.loads((trained / "run.json").read_text())
    assert written["gram_tokens"] == 10 * about["tokens_per_step"] < shaped_weights.TOKENS
    loss = {name: row["loss"] for name, row in written["forwards"].items()}
    assert 0 < abs(loss[shaped_weights.SHAPED_W] - loss["nvfp4"]) < 0.02
    monkeypatch.setattr(EvalSet, "samples", lambda *given: read(*given).flip(1))
    monkeypatch.setattr(scoring, "all_forwards", lambda *given: {"bf16": {}})  # own, in less time
    for step in (10, 5):
        other = score(config, about, find_checkpoint(trained, 10), step, (), CPU, True).table()
        assert other["own"]["loss"] != loss["own"]
    one, same, earlier = fitted
    assert all(layer.F.any() and torch.equal(layer.F, same[name].F) for name, layer in one.items())
    assert not any(torch.equal(layer.F, earlier[name].F) for name, layer in one.items())


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (None, ["@7"], ["no checkpoint of step 7", "5, 10"]),
        (None, ["", "--layers", "blocks.9.*"], ["'blocks.9.*' matches no", "blocks.0.attn.qkv"]),
        ("text", [""], ["other text", "--data"]),
        ("config.yaml", [""], ["config.yaml can't be read", "runs/<name>"]),
        (None, ["-none"], ["no checkpoint", "run folder"]),
    ],
)
def test_one_line_says_what_is_wrong(trained, script, change, arguments, words):
    if change == "config.yaml":
        (trained / change).unlink()
    if change == "text":
        about = json.loads((trained / "run.json").read_text())
        (trained / "run.json").write_text(json.dumps(about | {"data_fingerprint": "0" * 64}))
    code, printed, errors = script(f"{trained}{arguments[0]}", *arguments[1:])
    assert code != 0 and printed == ""
    assert errors.startswith("score.py: error: ") and errors.count("\n") == 1, errors
    assert all(word in errors for word in words), errors
    assert not (trained / "score").exists()


def test_the_stored_configuration_is_the_composed_one(trained):
    """config.yaml reads back as what trained; a key of another version is named."""
    config = stored(trained / "config.yaml")
    assert (config.quant["name"], config.evaluate.bf16, config.steps) == ("quartet2", True, 10)
    composed = compose(["quant=quartet2"]).config
    assert config.quant == composed.quant
    other = trained / "other.yaml"
    shutil.copy(trained / "config.yaml", other)
    other.write_text(other.read_text() + "unheard: 1\n")
    with pytest.raises(ValueError, match=r"other\.yaml: .*unheard"):
        stored(other)


QUESTIONS = [{"query": "kana lore", "choices": ["miti", "suvo kana"], "gold": i % 2} for i in range(4)]


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    (folder / "eval_data").mkdir(parents=True)
    (folder / "core.yaml").write_text(
        "icl_tasks:\n- {label: tiny, dataset_uri: q.jsonl, num_fewshot: [0], icl_task_type: multiple_choice}\n"
    )
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\ntiny,50\n")
    (folder / "eval_data" / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return folder


def test_core_is_asked_under_each_forward_and_kept(trained, script, bundle):
    """The same question with the other answer half of the time: 0 whatever the model says."""
    for forward in ([], ["--forward", "bf16"]):
        code, printed, errors = script(f"{trained}@5", "--core", str(bundle), *forward)
        assert code == 0, errors
        assert [line.split()[:3] for line in printed.splitlines()[2:]] == [
            ["tiny", "acc", "0.5000"],
            ["tiny", "centred", "0.0000"],
            ["core", "core", "0.0000"],
        ]
    kept = json.loads((trained / TASKS / "5.json").read_text())
    assert kept["step"] == 5 and list(kept["forwards"]) == ["own", "bf16"]
    assert all(row.keys() == TASK.keys() for rows in kept["forwards"].values() for row in rows.values())


def test_an_answer_is_the_loss_of_its_tokens_and_depends_on_no_other_question(trained):
    config, about = stored(trained / "config.yaml"), json.loads((trained / "run.json").read_text())
    nats = {}
    for forward in ("own", "bf16"):
        where = config, about, find_checkpoint(trained, 10), 10, forward
        with opened(*where, run_tokenizer(about), CPU) as likelihood:
            pair, longer = (likelihood.parts("kana lore", text) for text in (" miti", " suvo kana vona" * 3))
            (answer,) = likelihood.score([pair])
            tokens = torch.tensor([pair[0] + pair[1]])
            with torch.no_grad():
                each = LossModel(likelihood.model)(tokens, per_token=True)[0, -len(pair[1]) :]
            beside, _ = likelihood.score([pair, longer])
            requests = [SimpleNamespace(args=("kana lore", t), task_name="t", doc_id=t) for t in (" vo", " miti")]
            assert Adapter(likelihood).loglikelihood(requests)[1] == (-answer.nats, answer.greedy)
        nats[forward] = answer.nats
        assert answer.tokens == len(pair[1])
        # BF16 rows know nothing of each other; a quantized tensor's scale is of its batch, the padding included.
        assert answer.nats == pytest.approx(each.sum().item(), rel=1e-5 if forward == "bf16" else 0.02)
        assert beside.nats == pytest.approx(answer.nats, rel=1e-5 if forward == "bf16" else 0.02)
    assert nats["own"] != nats["bf16"]
    two = Dist(0, 2, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="without torchrun"), opened(*where, run_tokenizer(about), two):
        pass


def test_lm_eval_asks_a_task_of_local_files(trained, script, tmp_path, monkeypatch):
    mine = pytest.importorskip(
        "lm_eval.tasks", reason="lm-eval isn't installed: pip install 'nibble-train[eval]'"
    ).TaskManager
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = {
        "task": "nibble_tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "gold",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(json.dumps(task))  # JSON is YAML
    writes = task | {"task": "nibble_writes", "output_type": "generate_until"}
    (tmp_path / "tasks" / "writes.yaml").write_text(json.dumps(writes))
    code, printed, errors = script(str(trained), "--tasks", "nibble_tiny", "--task-path", str(tmp_path / "tasks"))
    assert code == 0, errors
    assert printed.splitlines()[2].split() == ["nibble_tiny", "acc", "0.5000", "0.2887", "4", "0"]
    (row,) = json.loads((trained / TASKS / "10.json").read_text())["forwards"]["own"].values()
    assert row.keys() == TASK.keys() and row["metrics"] == {"acc": [0.5, pytest.approx(12**-0.5)]}
    code, _, errors = script(str(trained), "--tasks", "nibble_writes", "--task-path", str(tmp_path / "tasks"))
    assert code == 2 and "score.py: error: --tasks nibble_writes" in errors
    # lm-eval's own tasks, 14,000, take ten seconds to list.
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda include_path, **_: mine(include_path=include_path, include_defaults=False)
    )
    code, _, errors = script(str(trained), "--tasks", "nible_tiny", "--task-path", str(tmp_path / "tasks"))
    assert code == 2 and "did you mean nibble_tiny" in errors


def test_without_lm_eval_tasks_are_refused_before_any_work(trained, script, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, printed, errors = script(str(trained), "--tasks", "hellaswag")
    assert code == 1 and printed == "" and "nibble-train[eval]" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "x", "--task-path", "nowhere"], "--task-path nowhere"),
        (["--core", "nowhere"], "core.yaml"),
        (["--forward", "bf16"], "--forward"),
        (["--core", "x", "--layers", "*"], "--layers"),
        (["--core", "x", "--shaped-weights"], "--shaped-weights"),
    ],
)
def test_bad_words_for_tasks_are_one_error(trained, script, words, said):
    code, _, errors = script(trained, *words)
    assert code == 2 and said in errors and "Traceback" not in errors
    assert not (trained / TASKS).exists()
