import csv
import itertools
import json
import math
import re
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from synthetic import eval_rows, non_finite, write_run

from analysis import plots
from analysis.alike import differences, same_rows
from analysis.compare import common_step, group_runs, pick_baseline, table
from analysis.equal_loss import equal_loss
from analysis.pairing import DIVERGED, Floor
from analysis.runs import find_runs
from base.runfolder import RunError

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare.py"


def three_seeds(root, recipe="quartet2", gaps=(0.05, 0.052, 0.048), **kwargs):
    for seed, gap in enumerate(gaps):
        write_run(root, recipe, seed, 3.0 + 0.02 * seed + gap, **kwargs)


@pytest.fixture
def compare(main_of):
    return main_of("compare.py")


def test_table_values_of_two_recipes_over_three_seeds(tmp_path):
    three_seeds(tmp_path, "bf16", (0, 0, 0), ms=10.0)
    three_seeds(tmp_path, "quartet2", ms=20.0)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    base, row = table(groups, pick_baseline(groups, None))
    assert (base.label, base.gap, base.final) == ("bf16", None, pytest.approx(3.02))
    assert row.gap.mean == pytest.approx(0.05) and row.gap.half_width == pytest.approx(4.302653 * 0.002 / 3**0.5)
    assert row.percent == pytest.approx(100 * 0.05 / 3.02) and row.ratio == pytest.approx(0.5)
    assert row.gap.verdict == "resolved" and (row.seeds, row.tokens, row.step) == (3, 102400, 100)


def test_a_run_that_shared_its_gpu_gives_losses_and_no_speed(tmp_path, compare):
    for seed, others in enumerate((0.9, 30.0)):
        write_run(tmp_path, "bf16", seed, 3.0, ms=10.0 + 10 * seed, others_gib=others, device="NVIDIA H100")
        write_run(tmp_path, "sr", seed, 3.1, ms=20.0, others_gib=30.0, device="NVIDIA H100")
        write_run(tmp_path, "fp8", seed, 3.2, ms=20.0, device="NVIDIA H100")
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    base, row, old = table(groups, pick_baseline(groups, None))
    assert math.isnan(old.tokens_per_second)
    assert base.tokens_per_second == pytest.approx(1024 / 0.010) and base.final == pytest.approx(3.0)
    assert math.isnan(row.tokens_per_second) and math.isnan(row.ratio) and row.gap.mean == pytest.approx(0.1)
    done = compare(f"{tmp_path}/*", "--out", tmp_path / "out")
    html = (tmp_path / "out" / "compare.html").read_text()
    assert "102,400" in done.stdout and "20.0 (shared GPU)" in html and "20.0 (alone? not logged)" in html
    assert not re.search(r"\bnan\b", done.stdout + html)


def test_another_learning_rate_is_another_group_and_its_label_says_so(tmp_path):
    three_seeds(tmp_path, "bf16", (0, 0, 0))
    write_run(tmp_path, "bf16", 0, 2.9, numerics={"optim.lr": 2e-3}, name="fast")
    labels = [g.label for g in group_runs(find_runs([f"{tmp_path}/*"]))]
    assert labels == ["bf16 (optim.lr=0.002)", "bf16 (optim.lr=0.001)"]
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    with pytest.raises(ValueError, match="'none' is not among"):
        pick_baseline(groups, "none")


def test_no_two_groups_have_one_label(tmp_path):
    """The label shows three of the keys that vary; these runs differ in a fourth."""
    write_run(tmp_path, "bf16", 0, 2.8, hash="c" * 16)
    for i in (1, 2):
        numerics = {"a": 1, "b": 1, "c": 1, "optim.lr": i * 1e-3}
        write_run(tmp_path, "bf16", 0, 2.9, numerics=numerics, name=f"fast-{i}", hash=str(i) * 16)
    labels = [g.label for g in group_runs(find_runs([f"{tmp_path}/*"]))]
    assert labels == ["bf16 (a=1, b=1, c=1, 111111)", "bf16 (a=1, b=1, c=1, 222222)", "bf16 (optim.lr=0.001)"]


def test_an_unfinished_run_is_compared_at_the_last_common_evaluation(tmp_path):
    write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "sr", 0, 3.1, steps_done=60)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    assert common_step(*groups) == 50
    row = table(groups, groups[0])[1]
    assert row.step == 50 and row.gap.mean == pytest.approx(0.1) and row.status == "unfinished (60/100)"


def test_a_cut_run_beside_finished_ones_is_listed_but_not_averaged(tmp_path):
    three_seeds(tmp_path, "bf16", (0, 0, 0))
    three_seeds(tmp_path)
    write_run(tmp_path, "quartet2", 3, 9.0, steps_done=60)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    row = table(groups, pick_baseline(groups, None))[1]
    assert (row.step, row.seeds, row.gap.mean) == (100, 3, pytest.approx(0.05))
    assert row.status == "finished; unfinished (60/100)"
    assert [run.info["seed"] for run in groups[1].cut] == [3]


def test_as_of_a_step_every_run_evaluated_there_counts(tmp_path):
    three_seeds(tmp_path, "bf16", (0, 0, 0))
    write_run(tmp_path, "quartet2", 0, 3.2)
    write_run(tmp_path, "quartet2", 1, 3.3, steps_done=80)  # evaluated at 75, then cut
    write_run(tmp_path, "quartet2", 2, 9.0, steps_done=60)  # cut before
    runs = find_runs([f"{tmp_path}/*"])
    groups = group_runs(runs, 75)
    base = pick_baseline(groups, None)
    row = next(r for r in table(groups, base) if r.label == "quartet2")
    assert (row.step, row.seeds, row.status) == (75, 2, "as of step 75/100; unfinished (60/100)")
    late = {seed: run.loss_at(75) for seed, run in enumerate(base.runs)}
    ours = {
        run.info["seed"]: run.loss_at(75)
        for run in runs
        if run.info["recipe_label"] == "quartet2" and run.evals["step"][-1] >= 75
    }
    assert row.gap.mean == pytest.approx(sum(ours[s] - late[s] for s in (0, 1)) / 2)
    assert group_runs(runs, 100)[0].runs[0].finished
    with pytest.raises(ValueError, match="--step 60: no run of bf16 was evaluated there; up to it at:"):
        group_runs(runs, 60)


def test_a_stale_evaluation_file_is_found(tmp_path):
    write_run(tmp_path, "bf16", 0, 3.0)
    path = write_run(tmp_path, "sr", 0, 3.1)
    with np.load(path / "eval" / "75.npz") as other:
        np.savez(path / "eval" / "100.npz", **other)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    with pytest.raises(RunError, match="one of them is stale"):
        table(groups, groups[0])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"data_fingerprint": "x"}, "data differs"),
        ({"tokenizer_hash": "x"}, "tokenizer differs"),
        ({"tokens_per_step": 2048}, "batch"),
        ({"model": "llama_30m"}, "model differs"),
        ({"seq_len": 64}, "sequence length differs"),
    ],
)
def test_runs_that_do_not_compare_are_refused_and_named(tmp_path, change, word, compare):
    write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "sr", 0, 3.1, **change)
    assert any(word in line for line in differences(find_runs([f"{tmp_path}/*"])))
    done = compare(f"{tmp_path}/*", "--out", tmp_path / "out")
    assert done.returncode == 2 and word in done.stderr and "--allow-mixed" in done.stderr
    assert not (tmp_path / "out").exists()
    mixed = compare(f"{tmp_path}/*", "--out", tmp_path / "out", "--allow-mixed")
    assert mixed.returncode == 0 and "MIXED: " in mixed.stdout
    assert "**Mixed:**" in (tmp_path / "out" / "compare.md").read_text()


def test_other_validation_text_is_refused_even_if_the_metadata_agree(tmp_path, compare):
    write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "sr", 0, 3.1, rows_seed=8)
    done = compare(f"{tmp_path}/*")
    assert done.returncode == 2 and "not the same validation tokens" in done.stderr


def test_command_line_writes_table_csv_markdown_and_picture(tmp_path, compare):
    three_seeds(tmp_path, "bf16", (0, 0, 0))
    three_seeds(tmp_path, "quartet2")
    write_run(tmp_path, "sr", 0, 3.07)
    done = compare(f"{tmp_path}/*", "--baseline", "bf16")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2].split()[0] == "quartet2" and lines[2].strip().endswith("resolved")
    assert lines[3].split()[0] == "sr" and "one seed: no verdict" in lines[3]
    out = tmp_path / "compare"
    with open(out / "compare.csv") as file:
        records = {r["recipe"]: r for r in csv.DictReader(file)}
    assert float(records["quartet2"]["gap"]) == pytest.approx(0.05)
    assert records["sr"]["gap_low"] == "" and float(records["sr"]["gap"]) == pytest.approx(0.07)
    assert "| quartet2 | 3 | 102k |" in (out / "compare.md").read_text()
    assert (out / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("script", "words", "names"),
    [
        ("compare.py", "--out {}", [*(f"compare.{suffix}" for suffix in ("csv", "md", "png", "html")), "pairs.csv"]),
        ("noise_floor.py", "--cache {}/floor.json", ["floor.json"]),
    ],
)
def test_a_kill_leaves_older_outputs_whole(tmp_path, monkeypatch, script, words, names):
    for recipe in ("bf16", "sr"):
        three_seeds(tmp_path, recipe)
    files = [tmp_path / "out" / name for name in names]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    monkeypatch.setattr("sys.argv", ["", f"{tmp_path}/llama*", *words.format(tmp_path / "out").split()])
    main = runpy.run_path(str(SCRIPT.with_name(script)))["main"]
    with monkeypatch.context() as before_the_rename:
        before_the_rename.setattr("os.replace", lambda *_: None)
        assert main() == 0 and {file.read_text() for file in files} == {"{}"}
    assert main() == 0 and all(len(file.read_bytes()) > 100 for file in files)


def test_no_torch_is_imported():
    code = f"import sys; sys.argv=['x']; sys.path.insert(0, {str(SCRIPT.parent)!r}); import compare, analysis.plots"
    done = subprocess.run(
        [sys.executable, "-c", code + "; assert 'torch' not in sys.modules"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_curves_show_the_numbers_and_labels_do_not_overlap(tmp_path):
    three_seeds(tmp_path, "bf16", (0, 0, 0))
    for i, recipe in enumerate(["fp8", "sr", "nvidia", "tetrajet2", "quartet2", "nvfp4_rtn"]):
        three_seeds(tmp_path, recipe, (0.05 + i * 1e-4,) * 3)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    fig = plots.figure(groups, pick_baseline(groups, None))
    left, right = fig.axes
    steps, mean, se = plots.gap_curve(groups[1], groups[0])
    assert (
        list(steps) == [25, 50, 75, 100]
        and mean == pytest.approx(np.full(4, 0.05))
        and se == pytest.approx(0, abs=1e-9)
    )
    ends = sorted(line.get_ydata()[-1] for line in right.lines if len(line.get_ydata()) == 4)
    assert ends == pytest.approx([50.0, 50.1, 50.2, 50.3, 50.4, 50.5])
    assert len({(line.get_color(), line.get_linestyle()) for line in right.lines}) == 7  # six recipes and the zero line
    fig.canvas.draw()
    boxes = sorted((Text.get_window_extent(t) for t in left.texts), key=lambda b: b.y0)
    assert len(boxes) == 7 and all(a.y1 <= b.y0 + 1 for a, b in pairwise(boxes))
    assert max(b.x1 for b in boxes) < right.get_window_extent().x0


def test_the_band_is_one_standard_error(tmp_path):
    three_seeds(tmp_path, "bf16", (0, 0, 0))
    three_seeds(tmp_path, "sr", (0.05, 0.06, 0.07))
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    _, right = plots.figure(groups, groups[0]).axes
    band = right.collections[0].get_paths()[0].vertices[:, 1]
    error = 10 / 3**0.5  # sd 0.01 over three seeds, in 1e-3
    assert (band.min(), band.max()) == pytest.approx((60 - error, 60 + error))


def test_bars_are_the_intervals_of_the_table(tmp_path):
    three_seeds(tmp_path, "bf16", (0, 0, 0))
    three_seeds(tmp_path, "sr", (0.05, 0.06, 0.07))
    three_seeds(tmp_path, "fp8", (0.01, 0.02, 0.09))
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    rows = table(groups, groups[0])
    _, right = plots.figure(groups, groups[0], rows).axes
    bars = [tuple(line.get_ydata()) for line in right.lines if len(line.get_ydata()) == 2][1:]  # the zero line first
    expected = [(row.gap.mean - row.gap.half_width, row.gap.mean + row.gap.half_width) for row in rows[1:]]
    assert np.array(bars) == pytest.approx(1e3 * np.array(expected))
    bottom, top = right.get_ylim()
    assert bottom < np.min(bars) and np.max(bars) < top
    _, right = plots.figure(groups, groups[0], table(groups, groups[0], Floor((1.0, 2), (1.0, 2)))).axes
    assert right.get_ylim()[1] - right.get_ylim()[0] < 3 * (top - bottom)


def test_the_figure_names_and_holds_only_what_is_there(tmp_path):
    three_seeds(tmp_path, "bf16", (0, 0, 0))
    write_run(tmp_path, "sr", 0, 3.05)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    _, right = plots.figure(groups, groups[0], table(groups, groups[0])).axes
    assert not right.collections and right.get_title(loc="left") == "Gap to bf16 (one seed: no error bar)"
    assert len(plots.figure(groups[:1], groups[0], table(groups[:1], groups[0])).axes) == 1  # no gap, no panel of it


def test_reruns_of_a_seed_count_once_in_table_and_curves(tmp_path):
    write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "bf16", 1, 3.3)
    write_run(tmp_path, "sr", 0, 3.1)
    write_run(tmp_path, "sr", 0, 3.2, name="rerun")
    write_run(tmp_path, "sr", 1, 3.45)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    base = pick_baseline(groups, None)
    row = table(groups, base)[1]
    assert (row.final, row.best, row.bpb) == pytest.approx((3.3, 3.3, 3.3 / 2.8))  # mean of 3.15 and 3.45
    sr = next(group for group in groups if group is not base)
    assert plots.group_curve(sr)[1][-1] == pytest.approx(3.3)
    assert plots.gap_curve(sr, base)[1][-1] == pytest.approx(row.gap.mean) == pytest.approx(0.15)


def test_a_recipe_that_was_cut_comes_last_whatever_its_gap(tmp_path):
    write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "nvidia", 0, 2.9, steps_done=60)
    write_run(tmp_path, "sr", 0, 3.1)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    assert [row.label for row in table(groups, pick_baseline(groups, None))] == ["bf16", "sr", "nvidia"]


def test_the_figure_shows_the_final_evaluation_on_more_text(tmp_path):
    for seed in range(2):
        path = write_run(tmp_path, "bf16", seed, 3.0 + 0.1 * seed)
        records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for record in records:
            if record["kind"] == "eval":
                record["targets"] = 10 + (record["step"] == 100)
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    left = plots.figure(groups, groups[0]).axes[0]
    ((x, y),) = [line.get_xydata()[0] for line in left.lines if line.get_marker() == "s"]
    assert (x, y) == (102400, pytest.approx(3.05)) and "■" in left.get_title(loc="left")


def test_nothing_evaluated_yet_is_said_of_the_runs_that_have_nothing(tmp_path, compare):
    write_run(tmp_path, "quartet2", 0, steps_done=10)
    done = compare(f"{tmp_path}/*")
    assert done.returncode == 2 and "no evaluation yet in llama_tiny-quartet2-0" in done.stderr


def test_nobody_waits_for_the_first_evaluation_of_a_run_that_diverged(tmp_path, compare):
    write_run(tmp_path, "bf16", 0, 3.0)
    non_finite(write_run(tmp_path, "sr", 0, steps_done=10), 11)
    done = compare(f"{tmp_path}/*")
    assert done.returncode == 2 and "wait" not in done.stderr
    assert "diverged before any evaluation" in done.stderr and "llama_tiny-sr-0 (diverged (11/100))" in done.stderr


def test_files_that_are_not_there_or_not_what_they_should_be_are_one_error(tmp_path, compare):
    write_run(tmp_path / "runs", "bf16", 0, 3.0)
    text = tmp_path / "README.md"
    text.write_text("# no floors")
    for words in (["--floor", "/nope"], ["--published", "/nope"], ["--floor", text], ["--published", text]):
        done = compare(f"{tmp_path}/runs/*", *words)
        assert done.returncode == 2 and str(words[1]) in done.stderr and "Traceback" not in done.stderr
    for out in (text, "/proc/x"):
        done = compare(f"{tmp_path}/runs/*", "--out", out)
        assert done.returncode == 2 and str(out) in done.stderr and done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error_and_the_files_are_there(tmp_path):
    write_run(tmp_path / "runs", "bf16", 0, 3.0)
    command = [sys.executable, str(SCRIPT), f"{tmp_path}/runs/*", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert len(list((tmp_path / "out").iterdir())) == 5


@pytest.mark.parametrize("others", [(0, 1), (3, 4)])
@pytest.mark.parametrize("recipe", ["bf16", "sr"])
def test_a_seed_scored_on_other_text_is_refused_wherever_it_stands(tmp_path, recipe, others):
    """Of the baseline or of the recipe, with a partner of its seed or without."""
    for name, seeds in (("bf16", (0, 1)), ("sr", others)):
        for seed in seeds:
            other_text = name == recipe and seed == seeds[1]
            write_run(tmp_path, name, seed, 3.0, rows_seed=8 if other_text else 7)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    base = pick_baseline(groups, None)
    with pytest.raises(RunError, match="not the same validation tokens"):
        table(groups, base)


def test_seeds_of_one_recipe_alone_are_aligned_too(tmp_path, compare):
    write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "bf16", 1, 3.0, rows_seed=8)
    done = compare(f"{tmp_path}/*")
    assert done.returncode == 2 and "bf16-0 and" in done.stderr and "not the same validation tokens" in done.stderr


def test_a_stale_evaluation_of_the_baseline_is_found(tmp_path):
    path = write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "sr", 0, 3.1)
    with np.load(path / "eval" / "100.npz") as rows:
        np.savez(path / "eval" / "100.npz", **{**rows, "nats": rows["nats"] * 1.5})
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    with pytest.raises(RunError, match=r"bf16-0: metrics\.jsonl says 3\.0.* one of them is stale"):
        table(groups, groups[0])


def test_the_floor_of_final_losses_judges_no_gap_before_the_end(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "bf16", seed, 3.0)
        write_run(tmp_path, "sr", seed, 3.1, steps_done=60)
        write_run(tmp_path, "fp8", seed, 3.1)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    found = {row.label: row.gap for row in table(groups, pick_baseline(groups, None), Floor((0.01, 8)))}
    assert found["fp8"].method.startswith("noise floor") and found["sr"].method == "paired t, 2 seeds"


def test_the_floor_judges_no_gap_at_the_end_of_one_side_alone(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "bf16", seed, 3.0)
        write_run(tmp_path, "sr", seed, 3.1, steps=200, name=f"longer-{seed}")
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    row = table(groups, pick_baseline(groups, None), Floor((0.01, 8)))[1]
    assert row.step == 100 and row.gap.method == "paired t, 2 seeds"


def test_a_loss_that_is_off_by_a_tenth_of_a_result_is_stale(tmp_path):
    path = write_run(tmp_path, "bf16", 0, 3.0)
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(text.replace('"loss": 3.0,', '"loss": 3.0001,'))
    with pytest.raises(RunError, match="one of them is stale"):
        same_rows([(find_runs([str(path)])[0], 100)])


def test_the_floor_judges_only_runs_like_those_it_was_measured_on(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "bf16", seed, 3.0)
        write_run(tmp_path, "sr", seed, 3.1)
        other = {"model": "llama_other", "numerics": {"model.layers": 9}, "name": f"other-{seed}", "hash": f"o{seed}"}
        write_run(tmp_path, "sr", seed, 3.1 + 0.03 * seed, **other)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    base = pick_baseline(groups, None)
    floor = Floor((0.001, 8), conditions=base.runs[0].conditions)
    methods = {row.label: row.gap.method for row in table(groups, base, floor)[1:]}
    assert sorted(methods.values()) == ["noise floor sd 1.00e-3, df 8", "paired t, 2 seeds"], methods


def test_gaps_along_the_runs_are_of_the_same_text(tmp_path):
    """How much text an evaluation takes is in no hash: sr's were of half of it before the end, 0.5 nats easier."""
    for seed in range(2):
        write_run(tmp_path, "bf16", seed, 3.0)
        path = write_run(tmp_path, "sr", seed, 3.05)
        records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for record in records:
            if record["kind"] == "eval" and record["step"] < 100:
                rows = {key: values[:40] for key, values in eval_rows(record["loss"] - 0.5, seed=9).items()}
                record["loss"] = rows["nats"].sum() / rows["tokens"].sum()
                np.savez(path / "eval" / f"{record['step']}.npz", **rows)
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    base, sr = group_runs(find_runs([f"{tmp_path}/*"]))
    steps, gaps, _ = plots.gap_curve(sr, base)
    assert list(steps) == [100] and gaps == pytest.approx([0.05])
    assert equal_loss(sr, base) is None
    left = plots.figure([base, sr], base).axes[0]
    assert "scored on other text, so not drawn: sr" in left.get_title(loc="left")
    assert [text.get_text() for text in left.texts] == ["bf16"]


def test_a_diverged_seed_leaves_its_recipe_without_mean_and_verdict(tmp_path, compare):
    three_seeds(tmp_path / "runs", "bf16", (0, 0, 0))
    three_seeds(tmp_path / "runs", "sr")
    three_seeds(tmp_path / "runs", "fp8")
    non_finite(write_run(tmp_path / "runs", "sr", 3, 9.0, steps_done=60), 61)
    groups = group_runs(find_runs([f"{tmp_path}/runs/*"]))
    _, fp8, sr = table(groups, pick_baseline(groups, None), Floor((0.001, 8), (0.001, 8)))
    assert (sr.label, sr.gap.verdict, sr.step) == ("sr", DIVERGED, 100) and fp8.gap.verdict == "resolved"
    assert sr.status == "diverged (61/100); finished" and [r.status for r in groups[2].cut] == ["diverged (61/100)"]
    assert np.isnan([sr.final, sr.bpb, sr.best, sr.sd, sr.gap.mean, sr.text.se]).all()
    done = compare(f"{tmp_path}/runs/*", "--out", tmp_path / "out")
    assert "diverged: no verdict [diverged (61/100); finished]" in done.stdout and done.stderr == ""
    left, _ = plots.figure(groups, groups[0]).axes
    assert "sr (1 diverged)" in [text.get_text() for text in left.texts]
    assert equal_loss(groups[2], groups[0]) is None


def test_the_spike_of_a_run_that_diverged_flattens_no_curve(tmp_path):
    path = write_run(tmp_path, "sr", steps_done=60)
    text = (path / "metrics.jsonl").read_text().splitlines(True)
    last = json.loads(text[-1]) | {"loss": 1e7}
    (path / "metrics.jsonl").write_text("".join([*text[:-1], json.dumps(last) + "\n"]))
    non_finite(path, 61)
    (group,) = group_runs(find_runs([str(path)]))
    low, high = plots.figure([group], group).axes[0].get_ylim()
    assert 4 < low < 5 and 6 < high < 9  # from 6.6 at a tenth of the run to 4.6


def test_a_diverged_baseline_judges_nothing(tmp_path):
    three_seeds(tmp_path, "bf16", (0, 0, 0))
    three_seeds(tmp_path)
    non_finite(write_run(tmp_path, "bf16", 3, 9.0, steps_done=60), 61)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    assert [row.gap and row.gap.verdict for row in table(groups, groups[0])] == [None, DIVERGED]


def test_approximate_bits_per_byte_are_marked_in_every_table(tmp_path, compare):
    for recipe in ("bf16", "sr"):
        path = write_run(tmp_path / "runs", recipe, 0, 3.0) / "metrics.jsonl"
        if recipe == "sr":  # as the trainer writes them where the tokenizer loses text
            path.write_text(path.read_text().replace('"kind": "eval"', '"kind": "eval", "bpb_approximate": true'))
    done = compare(f"{tmp_path}/runs/*", "--baseline", "bf16", "--out", tmp_path / "out")
    out = tmp_path / "out"
    for text in (done.stdout, (out / "compare.md").read_text(), (out / "compare.html").read_text()):
        assert text.count("~1.0714") == 1 and text.count("1.0714") == 2
    assert "bits per byte are approximate" in done.stdout and "~: bits" in (out / "compare.html").read_text()
    with open(out / "compare.csv") as file:
        assert [r["final_bpb_approximate"] for r in csv.DictReader(file)] == ["False", "True"]
    write_run(tmp_path / "exact", "bf16", 0, 3.0)
    assert "~" not in compare(f"{tmp_path}/exact/*", "--out", out).stdout
    assert "final_bpb_approximate" not in (out / "compare.csv").read_text()


def test_forks_are_grouped_by_trunk_and_n_is_the_number_of_trunks(tmp_path):
    three_seeds(tmp_path, "bf16", (0, 0, 0))
    label = "quartet2@85 > quartet2 fprop=none"
    for seed, tail in itertools.product(range(3), range(2)):
        parent = {"hash": f"trunk{seed}", "trunk": f"trunk{seed}", "step": 85, "rounding_seed": None}
        numerics = {"fork.parent": f"trunk{seed}", "fork.step": 85} | ({"rounding_seed": tail} if tail else {})
        ends = {"final": 3.0 + 0.02 * seed + 0.03 + 0.01 * tail, "name": f"tail-{seed}-{tail}"}
        write_run(tmp_path, "quartet2", seed, label=label, numerics=numerics, parent=parent, **ends)
    groups = group_runs(find_runs([f"{tmp_path}/*"]))
    rows = table(groups, pick_baseline(groups, None))
    forked = next(row for row in rows if row.gap is not None)
    assert (len(groups), forked.seeds, forked.runs) == (2, 3, 6)
    assert forked.gap.mean == pytest.approx(0.035)
