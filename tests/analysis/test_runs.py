import json
import subprocess

import numpy as np
import pytest
from synthetic import non_finite, write_run

from analysis.alike import same_rows
from analysis.runs import find_runs, read_run
from base.runfolder import SEGMENT_KEYS, RunError


def test_a_finished_run_is_read_back(tmp_path):
    run = read_run(write_run(tmp_path, "quartet2", seed=3, final=2.5, ms=20.0))
    assert (run.finished, run.status, run.info["seed"]) == (True, "finished", 3)
    assert list(run.evals["step"]) == [25, 50, 75, 100]
    assert run.loss_at(100) == 2.5
    assert run.tokens_per_second == pytest.approx(1024 / 0.020)
    rows = run.rows_at(100)
    assert rows.nats.sum() / rows.tokens.sum() == pytest.approx(2.5)


def test_an_unfinished_run_with_a_cut_last_line_is_read_as_far_as_it_goes(tmp_path):
    path = write_run(tmp_path, steps_done=60)
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 61, "tok')
    run = read_run(path)
    assert run.status == "unfinished (60/100)" and not run.finished
    assert run.train["step"][-1] == 60 and list(run.evals["step"]) == [25, 50]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = write_run(tmp_path)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[9] = lines[9][:20]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=r"metrics.jsonl:10: malformed"):
        read_run(path)


def test_a_repeated_step_is_an_error(tmp_path):
    path = write_run(tmp_path)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join([*lines, lines[5]]) + "\n")
    with pytest.raises(RunError, match="train steps must increase, got 100 then 5"):
        read_run(path)


def test_a_record_or_run_json_without_a_field_is_an_error(tmp_path):
    path = write_run(tmp_path)
    with open(path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "eval", "step": 101, "tokens": 1}) + "\n")
    with pytest.raises(RunError, match="'eval' record lacks"):
        read_run(path)
    info = json.loads((path / "run.json").read_text())
    del info["tokenizer_hash"]
    (path / "run.json").write_text(json.dumps(info))
    with pytest.raises(RunError, match=r"lacks .'tokenizer_hash'"):
        read_run(path)


@pytest.mark.parametrize(("key", "value"), [("numerics", None), ("seed", None), ("steps", "100")])
def test_a_field_of_run_json_of_another_type_is_an_error(tmp_path, key, value):
    path = write_run(tmp_path, "bf16")
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(info | {key: value}))
    with pytest.raises(RunError, match=rf"run\.json: {key} must be of type"):
        read_run(path)


def test_rows_of_unequal_lengths_and_not_a_number_are_errors(tmp_path):
    path = write_run(tmp_path, "bf16")
    rows = {key: getattr(read_run(path).rows_at(100), key) for key in SEGMENT_KEYS}
    np.savez(path / "eval" / "100.npz", **rows | {"tokens": rows["tokens"][1:]})
    with pytest.raises(RunError, match=r"100\.npz: can't be read \(columns of shapes"):
        read_run(path).rows_at(100)
    rows["nats"][3] = np.nan
    np.savez(path / "eval" / "100.npz", **rows)
    with pytest.raises(RunError, match="eval rows give nan; one of them is stale"):
        same_rows([(read_run(path), 100)])


def test_a_steps_time_is_the_median_after_the_first_tenth(tmp_path):
    path = write_run(tmp_path)
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "train":
            record["ms_per_step"] = 1000.0 if record["step"] <= 10 else 10.0 if record["step"] <= 55 else 20.0
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read_run(path).milliseconds == 15.0


@pytest.mark.parametrize(
    "field",
    [
        {"seq_len": 256},
        {"steps": 200},
        {"model": "other"},
        {"data_fingerprint": "e"},
        {"numerics": {"schedule.lr_peak": 2e-3}},
    ],
)
def test_other_conditions_have_another_noise_floor(tmp_path, field):
    one, other = read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b", **field))
    assert one.conditions != other.conditions


def test_an_event_without_a_name_is_an_error(tmp_path):
    path = write_run(tmp_path, "bf16")
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "event", "step": 100}\n')
    with pytest.raises(RunError, match="malformed record"):
        read_run(path)


def test_a_missing_evaluation_file_is_an_error_only_when_asked_for(tmp_path):
    path = write_run(tmp_path)
    (path / "eval" / "100.npz").unlink()
    run = read_run(path)
    assert run.rows_at(75).nats.shape == (80,)
    with pytest.raises(RunError, match="reports an evaluation at step 100"):
        run.rows_at(100)


def test_a_run_stopped_at_a_non_finite_step_has_diverged_until_it_gets_past_it(tmp_path):
    path = write_run(tmp_path, steps_done=60)
    non_finite(path, 61)
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "event", "event": "checkpoint", "step": 60}\n')
    assert read_run(path).status == "diverged (61/100)" and not read_run(path).finished
    record = json.loads((path / "metrics.jsonl").read_text().splitlines()[3])
    with open(path / "metrics.jsonl", "a") as file:  # resumed, and the step was finite this time: a hardware fault
        file.write(json.dumps(record | {"step": 61}) + "\n")
    assert read_run(path).status == "unfinished (61/100)"


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_run_that_went_on_after_non_finite_steps_says_so(tmp_path, policy):
    path = write_run(tmp_path, steps_done=60)
    non_finite(path, 61, policy)
    assert read_run(path).status == "unfinished (60/100)"
    path = write_run(tmp_path, seed=1)
    non_finite(path, 31, policy)
    non_finite(path, 31, policy)  # again, after a kill
    assert read_run(path).status == "finished, 1 non-finite step" and read_run(path).finished
    non_finite(path, 61, policy)
    assert read_run(path).status == "finished, 2 non-finite steps"


def test_an_evaluation_that_is_not_finite_makes_a_run_diverged(tmp_path):
    assert read_run(write_run(tmp_path, final=float("nan"))).status == "diverged (100/100)"


def test_globs_pass_over_other_folders_and_named_folders_do_not(tmp_path):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1)
    (tmp_path / "compare").mkdir()
    assert [r.info["seed"] for r in find_runs([f"{tmp_path}/*", f"{tmp_path}/llama_tiny-bf16-0"])] == [0, 1]
    with pytest.raises(RunError, match=r"no run\.json there"):
        find_runs([f"{tmp_path}/compare"])
    with pytest.raises(RunError, match="no run folder matches"):
        find_runs([f"{tmp_path}/nothing*"])


@pytest.mark.parametrize(
    ("file", "content", "wrong"),
    [
        ("run.json", '{"name": ', "not JSON"),
        ("run.json", "", "not JSON"),
        ("run.json", "{}", "lacks"),
        ("metrics.jsonl", "{}\n", "malformed record"),
    ],
)
def test_a_damaged_run_among_others_says_how_to_go_on_without_it(tmp_path, file, content, wrong):
    write_run(tmp_path, seed=0)
    path = write_run(tmp_path, "a b", seed=1)
    (path / file).write_text(content)
    with pytest.raises(RunError) as error:
        find_runs([f"{tmp_path}/*"])
    what, _, command = str(error.value).partition("; type: ")
    assert what.startswith(f"{path}/{file}:") and wrong in what
    subprocess.run(command, shell=True, check=True)
    assert [run.info["seed"] for run in find_runs([f"{tmp_path}/*"])] == [0]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:100], lambda data: data[:-40], lambda data: b"x"]
)
def test_a_damaged_evaluation_file_is_one_error_that_names_it(tmp_path, damage):
    file = write_run(tmp_path) / "eval" / "100.npz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RunError, match=r"eval/100\.npz: can't be read"):
        read_run(tmp_path / "llama_tiny-bf16-0").rows_at(100)


@pytest.mark.parametrize("content", ["{}", '{"status": "finished", "final_loss": "low"}', "[]", "{"])
def test_a_result_without_a_final_loss_is_one_error_that_names_it(tmp_path, content):
    path = write_run(tmp_path)
    (path / "result.json").write_text(content)
    with pytest.raises(RunError, match=r"result\.json"):
        read_run(path)


def test_metrics_that_are_no_text_are_one_error_that_names_them(tmp_path):
    path = write_run(tmp_path)
    with open(path / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:\d+: malformed record"):
        read_run(path)


def test_an_evaluation_is_that_of_its_step_and_no_other(tmp_path):
    path = write_run(tmp_path)
    (path / "eval" / "100.npz").rename(path / "eval" / "x_100.npz")
    with pytest.raises(RunError, match="missing"):
        read_run(path).rows_at(100)


def test_a_folder_that_exists_is_itself_whatever_its_name(tmp_path):
    for folder in ("a[1]", "a1"):
        write_run(tmp_path / folder, "bf16", 0, 3.0)
    for pattern in ("a[1]/*", "a[1]/llama*", "a[1]/llama_tiny-bf16-0"):
        assert [run.path.parent.name for run in find_runs([f"{tmp_path}/{pattern}"])] == ["a[1]"]
    assert [run.path.parent.name for run in find_runs([f"{tmp_path}/a[0-9]/*"])] == ["a1"]
