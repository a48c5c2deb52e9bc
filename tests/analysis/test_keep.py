import json
import shlex
import shutil

import numpy as np
import pytest
from synthetic import write_run

from analysis.compare import group_runs, pick_baseline, table
from analysis.keep import keep
from analysis.runs import find_runs, read_run


def rows_of(pattern):
    groups = group_runs(find_runs([pattern]))
    return table(groups, pick_baseline(groups, None))


def test_a_small_copy_gives_the_same_comparison(tmp_path, main_of):
    for seed in range(2):
        write_run(tmp_path / "runs", "bf16", seed, 3.0 + 0.01 * seed)
        write_run(tmp_path / "runs", "sr", seed, 3.05 + 0.012 * seed)
    done = main_of("keep_results.py")(f"{tmp_path}/runs/*", "--to", str(tmp_path / "kept"))
    assert done.returncode == 0 and done.stdout.startswith("4 runs, 0."), done.stderr
    for ours, theirs in zip(rows_of(f"{tmp_path}/kept/*"), rows_of(f"{tmp_path}/runs/*"), strict=True):
        assert (ours.label, ours.seeds, ours.step, ours.status) == (
            theirs.label,
            theirs.seeds,
            theirs.step,
            theirs.status,
        )
        assert (ours.final, ours.best) == pytest.approx((theirs.final, theirs.best), abs=1e-7)
        if ours.gap:
            assert ours.gap.mean == pytest.approx(theirs.gap.mean, abs=1e-8) and ours.gap.verdict == theirs.gap.verdict
            assert ours.text.se == pytest.approx(theirs.text.se, abs=1e-7)


def test_the_copy_is_thin_but_keeps_evaluations_and_the_last_step(tmp_path):
    original = read_run(write_run(tmp_path / "runs", steps_done=97))
    kept = read_run(keep(original, tmp_path / "kept", every=20))
    assert kept.train["step"].tolist() == [20, 40, 60, 80, 97] and kept.status == original.status
    assert kept.evals["step"].tolist() == [25, 50, 75] and kept.targets.tolist() == [5120] * 3
    assert [path.name for path in (kept.path / "eval").iterdir()] == ["75.npz"]
    assert np.allclose(kept.train["loss"], original.train["loss"][[19, 39, 59, 79, 96]], rtol=1e-8)
    assert [event["event"] for event in kept.events] == ["start"]


def test_a_field_that_was_not_logged_is_not_invented(tmp_path):
    original = write_run(tmp_path / "runs")
    lines = [json.loads(line) for line in (original / "metrics.jsonl").read_text().splitlines()]
    older = [{key: value for key, value in line.items() if key != "others_gib"} for line in lines]
    (original / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in older))
    kept = keep(read_run(original), tmp_path / "kept")
    assert any("others_gib" in line for line in lines)
    assert "others_gib" not in (kept / "metrics.jsonl").read_text()


def test_rows_are_kept_where_another_run_ended(tmp_path):
    kept = keep(read_run(write_run(tmp_path / "runs")), tmp_path / "kept", steps=(75, 80))
    assert sorted(path.name for path in (kept / "eval").iterdir()) == ["100.npz", "75.npz"]


def test_a_run_that_lacks_a_file_leaves_nothing(tmp_path):
    original = read_run(write_run(tmp_path / "runs"))
    (original.path / "eval" / "100.npz").unlink()
    with pytest.raises(ValueError, match=r"100\.npz: missing"):
        keep(original, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


WORDS = ["/home/me/nibble/train.py", "quant=sr", "data.path=/home/me/t", "data.files=/home/me/a b.txt", "seed=1"]
WORDS += ["paths.runs=/home/me", "run.name='a b'"]


def test_paths_of_this_machine_stay_here(tmp_path):
    path = write_run(tmp_path / "runs", data_path="/home/me/tokens", command=shlex.join(WORDS))
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "event", "event": "checkpoint", "step": 100, "path": "/home/me/runs/x"}\n')
    kept = read_run(keep(read_run(path), tmp_path / "kept"))
    assert kept.events[-1]["event"] == "checkpoint" and shlex.split(kept.info["command"]) == [
        "train.py",
        "quant=sr",
        "seed=1",
        "run.name='a b'",
    ]
    assert not any("/home/me" in file.read_text() for file in kept.path.glob("*.json*"))


def test_runs_are_neither_thinned_in_place_nor_replaced_by_a_namesake(tmp_path, main_of):
    path = write_run(tmp_path / "runs", "bf16", name="one")
    write_run(tmp_path / "others", "bf16", 1, name="one")
    before = (path / "metrics.jsonl").read_text()
    for patterns, to, message in (
        ([f"{tmp_path}/runs/*"], tmp_path / "runs", "the copy would replace the run itself"),
        ([f"{tmp_path}/*/one"], tmp_path / "kept", "are both called one"),
        ([f"{tmp_path}/runs/*"], "/proc/x", "/proc/x"),
    ):
        done = main_of("keep_results.py")(*patterns, "--to", str(to))
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert (path / "metrics.jsonl").read_text() == before and not (tmp_path / "kept").exists()


def test_a_copy_replaces_all_of_an_older_copy_and_no_run(tmp_path):
    keep(read_run(write_run(tmp_path / "first")), tmp_path / "kept")
    again = read_run(write_run(tmp_path / "again", steps_done=60))
    kept = read_run(keep(again, tmp_path / "kept"))
    assert kept.status == again.status and [path.name for path in (kept.path / "eval").iterdir()] == ["50.npz"]
    before = (tmp_path / "first" / kept.name / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="would replace a run"):
        keep(again, tmp_path / "first")
    assert (tmp_path / "first" / kept.name / "metrics.jsonl").read_text() == before


def test_a_run_may_go_on_while_it_is_copied(tmp_path):
    path = write_run(tmp_path / "runs", steps_done=60)
    run = read_run(path)
    shutil.rmtree(path)
    write_run(tmp_path / "runs")  # an evaluation, and the end
    kept = read_run(keep(run, tmp_path / "kept"))
    assert kept.evals["step"].tolist() == [25, 50, 75, 100] and kept.status == "unfinished (100/100)"
    assert read_run(keep(read_run(path), tmp_path / "kept")).status == "finished"


def test_a_copy_cut_by_a_kill_is_no_run(tmp_path, monkeypatch):
    run = read_run(write_run(tmp_path / "runs"))
    kept = keep(run, tmp_path / "kept")
    for where in ("numpy.savez_compressed", "os.replace"):
        with monkeypatch.context() as killed, pytest.raises(ZeroDivisionError):
            killed.setattr(where, lambda *_, **__: 1 / 0)
            keep(run, tmp_path / "kept")
        assert not (kept / "run.json").exists()
    assert read_run(keep(run, tmp_path / "kept")).status == "finished"


def test_a_run_killed_before_its_first_record_is_kept(tmp_path):
    path = write_run(tmp_path / "runs", steps_done=0)
    (path / "metrics.jsonl").unlink()
    assert read_run(keep(read_run(path), tmp_path / "kept")).status == "unfinished (0/100)"


def test_losses_under_other_forwards_are_kept(tmp_path):
    original = write_run(tmp_path / "runs")
    (original / "score").mkdir()
    (original / "score" / "100.json").write_text('{"step": 100}')
    for name in ("tasks", "xray", "lift"):
        (original / name).mkdir()
        (original / name / "100.json").write_text('{"step": 100, "forwards": {}}')
    ids = {key: np.arange(3) for key in ("sequence", "document", "tokens", "bytes")}
    np.savez(original / "score" / "100.npz", **ids, **{"nats.own": np.full(3, 1 / 3)})
    kept = keep(read_run(original), tmp_path / "kept")
    arrays = np.load(kept / "score" / "100.npz")
    assert sorted(arrays) == ["bytes", "document", "nats.own", "sequence", "tokens"]
    assert arrays["nats.own"].dtype == np.float32 and arrays["nats.own"] == pytest.approx(1 / 3)
    assert json.loads((kept / "score" / "100.json").read_text()) == {"step": 100}
    for name in ("tasks", "xray", "lift"):
        assert json.loads((kept / name / "100.json").read_text()) == {"step": 100, "forwards": {}}
    for name in ("score", "tasks", "xray", "lift"):
        shutil.rmtree(original / name)
        assert not list((keep(read_run(original), tmp_path / "kept") / name).iterdir())


def test_a_fork_keeps_its_parents_name_but_not_its_place(tmp_path):
    original = write_run(tmp_path / "runs")
    info = json.loads((original / "run.json").read_text())
    info |= {"command": "train.py fork=/home/me/runs/trunk@70 quant.fprop=none"}
    info |= {"parent": {"name": "trunk", "folder": "/home/me/runs/trunk", "step": 70}}
    (original / "run.json").write_text(json.dumps(info))
    kept = json.loads((keep(read_run(original), tmp_path / "kept") / "run.json").read_text())
    assert kept["command"] == "train.py fork=runs/trunk@70 quant.fprop=none"
    assert kept["parent"] == {"name": "trunk", "step": 70}
