import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import write_run

from analysis import costs, noise, published, states
from analysis.costs import Cell
from analysis.runs import find_runs
from base import fingerprints
from data.prepare import token_folder
from data.spec import DataSpec
from launcher import lookup
from launcher.compose import Composer, compose
from launcher.naming import Text
from training.ranks.distributed import Dist
from training.start.describe import Request, describe
from training.start.memory import estimate, kept_of

SCRIPT = Path(__file__).parents[2] / "scripts" / "cost.py"
H100 = "NVIDIA H100 80GB HBM3"  # as its driver says it
# llama_30m, 512 tokens: 6 (30,482,560 + 32000 * 640) + 12 * 6 * 640 * 512
FLOPS_30M = 6 * (30_482_560 + 32_000 * 640) + 12 * 6 * 640 * 512


def cell(model="llama_30m", recipe="quartet2", base=None, flops_per_token=1000):
    return Cell("c", model, recipe, base or recipe, 100, 3_600_000, flops_per_token, memory_gib=1.0, disk_gib=2.0)


def cells(*words):
    module = cost_module()
    line = module.cellline.read(words, module.OWN)
    return {name: module.cell_of(name, composed, line.composer.numerics) for name, composed in line.cells.items()}


def cost_module():
    spec = importlib.util.spec_from_file_location("cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(**speeds):
    return [
        {"model": name.split("__")[0], "recipe": name.split("__")[1], "tokens_per_second": v, "flops_per_token": 1000}
        for name, v in speeds.items()
    ]


def cost(*words):
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=120)


def test_hours_from_measured_speed():
    assert costs.gpu_hours(cell(), rows(llama_30m__quartet2=1000)) == (1.0, "measured")


def test_a_variant_takes_the_speed_of_the_recipe_it_varies():
    variant = cell(recipe="quartet2_no46", base="quartet2")
    assert costs.gpu_hours(variant, rows(llama_30m__quartet2=500)) == (2.0, "as quartet2")


def test_another_model_is_taken_at_equal_mfu_and_said_to_be():
    large = cell("llama_100m", flops_per_token=4000)
    hours, source = costs.gpu_hours(large, rows(llama_30m__quartet2=1000, llama_30m__bf16=9000))
    assert hours == pytest.approx(4.0) and source == "MFU of llama_30m"
    assert costs.gpu_hours(cell(), rows(llama_30m__bf16=9000)) == (None, "not measured")


def test_the_model_nearest_in_size_lends_its_mfu():
    table = rows(llama_30m__quartet2=1000, llama_50m__quartet2=400, llama_200m__quartet2=10)
    for row, flops in zip(table, (1000, 2000, 50_000), strict=True):
        row["flops_per_token"] = flops
    for order in (table, table[::-1]):  # 3.6M tokens at 400 x 2000 / 4000 a second
        hours, source = costs.gpu_hours(cell("llama_100m", flops_per_token=4000), order)
        assert hours == pytest.approx(5.0) and source == "MFU of llama_50m"


def test_a_recipe_never_measured_is_priced_as_the_slowest_and_said_to_be():
    table = rows(llama_30m__quartet2=1000, llama_30m__sr=500, llama_30m__bf16=100)
    assert costs.gpu_hours(cell(recipe="new"), table) == (2.0, "never measured: as sr")
    assert costs.gpu_hours(cell(recipe="bf16"), table[:2]) == (None, "not measured")


def test_b200_is_predicted_from_bf16_whatever_the_recipe():
    # 3.6M tokens at 2,000 a second: half an hour; times 989 / 2250
    assert costs.b200_hours(cell(), rows(llama_30m__bf16=2000), 989e12) == pytest.approx(0.5 * 989 / 2250)
    assert costs.b200_hours(cell(), rows(llama_30m__bf16=2000), None) is None
    both = rows(llama_30m__quartet2=500, llama_30m__bf16=2000)
    assert costs.b200_hours(cell(), both, 989e12) == pytest.approx(0.5 * 989 / 2250)
    assert costs.b200_hours(cell(), both[:1], 989e12) is None  # quartet2's own speed says nothing of BF16


def test_disk_is_what_the_kept_checkpoints_take():
    # llama_30m: 30,482,560 parameters and twice 32,000 x 640; one checkpoint of weights and two moments in FP32
    found = cells("experiment=corpus_screen", "only=bf16/s0")["bf16/s0"]
    assert found.disk_gib == pytest.approx(12 * (30_482_560 + 2 * 32_000 * 640) / 2**30)


def test_a_fork_costs_what_it_trains_and_a_trunk_the_disk_of_what_it_keeps():
    found = cells("experiment=corpus_tails", "only=trunk/s0,fprop_bf16_95/s0")
    trunk, tail = found["trunk/s0"], found["fprop_bf16_95/s0"]
    assert (trunk.steps, tail.steps, tail.tokens) == (3052, 152, 152 * 65_536)
    assert trunk.disk_gib == pytest.approx(7 * tail.disk_gib)
    phased = cells("experiment=corpus_tails", "cell=trunk/s0", "quant.phases=[{from: .5, set: {fprop: none}}]")
    assert phased["trunk/s0"].memory_gib == tail.memory_gib > trunk.memory_gib


def test_memory_is_what_the_start_screen_of_the_run_says():
    found = cells("experiment=corpus_screen", "only=fp8/s0,quartet2_forward/s0")
    for name in ("fp8/s0", "quartet2_forward/s0"):
        request = Request(compose(["experiment=corpus_screen", f"cell={name}"]).config, "", {}, "")
        described = describe(request, Dist(0, 1, 0, torch.device("cpu")), None)
        expected = estimate(described.shape, described.numbers.micro_tokens, kept_of(described.plan), accumulates=False)
        assert found[name].memory_gib == pytest.approx(expected.total)
    assert found["fp8/s0"].memory_gib == pytest.approx(11.3, abs=0.05)
    variant = found["quartet2_forward/s0"]
    assert (variant.recipe, variant.base_recipe) == ("quartet2_forward", "quartet2")


def test_files_that_are_none_are_named(tmp_path):
    for text, says in (
        ('{"bad": 1}', "needs device and rows of"),
        ("[", "not JSON"),
        ('{"device": 1}', "needs device"),
        ('{"device": "H100", "rows": [1]}', "needs device and rows of"),
        ('{"device": "H100", "rows": null}', "needs device and rows of"),
        (json.dumps({"device": "H100", "rows": rows(llama_30m__bf16=0)}), "needs .* above 0"),
    ):
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(ValueError, match=rf"table\.json: {says}"):
            costs.load(tmp_path / "table.json")
    (tmp_path / "floor.json").write_text('{"key": {"seed": {"sd": 1}}}')
    with pytest.raises(ValueError, match=r"floor\.json: key: needs sd and df"):
        noise.load(tmp_path / "floor.json")
    (tmp_path / "points.csv").write_text("N,D,scheme,variant,final_loss\nx,1,a,b,3.0\n")
    with pytest.raises(ValueError, match=r"points\.csv, line 2: N and D are whole numbers"):
        published.load(tmp_path / "points.csv")


@pytest.mark.parametrize("file", ["result.json", "run.json"])
def test_a_damaged_cell_is_named_with_what_to_type_and_the_others_are_costed(tmp_path, capsys, no_results, file):
    name = "corpus_screen-bf16-s0"
    (tmp_path / name).mkdir()
    (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / name / "metrics.jsonl").write_text('\xff\n5\n{"kind": "train", "step": 7}\n', "latin1")
    (tmp_path / name / file).write_text("{bad")
    words = ["experiment=corpus_screen", "only=bf16/s[01]", f"paths.runs={tmp_path}"]
    assert cost_module().main(words) == 0
    out, error = capsys.readouterr()
    assert "damaged 7 " in out and "1 damaged, 1 missing" in out
    start = f"bf16/s0: damaged, left alone: {tmp_path}/{name}/{file}: not JSON"
    assert error.startswith(start) and error.count("\n") == 1
    subprocess.run(error.partition("; type: ")[2].partition(" (then ")[0], shell=True, check=True)
    assert states.state_of(tmp_path, name) == states.State(*(("stopped", 7) if file == "result.json" else ("missing",)))
    assert [path.read_text() for path in tmp_path.rglob(f"{file}*")] == ["{bad"]


def test_a_recipe_on_the_command_line_is_the_one_that_is_costed():
    found = cells("experiment=corpus_screen", "only=quartet2/s0", "quant=fp8")["quartet2/s0"]
    assert (found.recipe, found.base_recipe) == ("fp8", "fp8") and found.memory_gib == pytest.approx(11.3, abs=0.05)


def test_throughput_is_read_from_runs_and_mixed_devices_are_refused(tmp_path):
    shape = {"model.layers": 2, "model.width": 64}
    write_run(tmp_path, "bf16", 0, 3.0, ms=10.0, numerics=shape)
    write_run(tmp_path, "bf16", 1, 3.0, ms=8.0, numerics=shape)
    device, found = costs.measured_rows(find_runs([f"{tmp_path}/*"]))
    assert device == "cpu" and len(found) == 1 and found[0]["tokens_per_second"] == 128000
    assert found[0]["flops_per_token"] == 6 * (3_000_000 + 4096 * 64) + 12 * 2 * 64 * 128
    write_run(tmp_path, "fp8", 0, 3.0, ms=1.0, numerics=shape, others_gib=30.0, device="NVIDIA H100")
    with pytest.raises(ValueError, match="no run had its GPU to itself"):
        costs.measured_rows(find_runs([f"{tmp_path}/*fp8*"]))
    shutil.rmtree(tmp_path / "llama_tiny-fp8-0")
    path = write_run(tmp_path, "sr", 0, 3.0, numerics=shape)
    (path / "env.json").write_text(json.dumps({"device": "H100"}))
    with pytest.raises(ValueError, match="one kind of device, got H100, cpu"):
        costs.measured_rows(find_runs([f"{tmp_path}/*"]))


TEXT = Text(32_000, "f" * 8, "t" * 8, "0" * 12)


@pytest.fixture
def no_results(monkeypatch, tmp_path):
    monkeypatch.setattr(lookup, "RESULTS", tmp_path / "no_results")


def finished(folder, experiment, cell, text=TEXT, **more):
    """A finished run of a cell, on `text`."""
    composer = Composer()
    composed = composer.compose([f"experiment={experiment}", f"cell={cell}"])
    folder.mkdir(parents=True)
    info = {"hash": "0" * 16, "numerics": composer.numerics.of(composed.config, text), **more}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "result.json").write_text('{"status": "finished", "step": 2861, "final_loss": 3.4}')


def test_the_cost_of_a_grid_counts_what_is_done_and_what_is_left(tmp_path, monkeypatch, capsys, no_results):
    monkeypatch.setattr(lookup, "text_of", lambda config: TEXT)
    finished(tmp_path / "runs" / "corpus_ranking-bf16-x1-s0", "corpus_ranking", "bf16/x1/s0")
    table = {"device": H100, "rows": rows(llama_30m__bf16=1_041_658)}
    table["rows"][0]["flops_per_token"] = FLOPS_30M  # 749,993,984 tokens take 0.2 hours
    (tmp_path / "speed.json").write_text(json.dumps(table))
    words = [f"paths.runs={tmp_path}/runs", f"table={tmp_path}/speed.json", "price=10"]
    assert cost_module().main(["experiment=corpus_ranking", "only=bf16/x1/*", *words]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[1].split()[:4] == ["bf16/x1/s0", "done", "2,861", "750M"] and "missing" in lines[2]
    assert f"{FLOPS_30M * 749993984:.2e}" in lines[1] and "0.20" in lines[1].split()
    assert "1 done, 2 missing" in shown
    assert f"{H100}: 0.6 GPU-hours, 0.4 of them left, 6 and 4 at 10 a GPU-hour" in shown
    assert "B200, predicted: 0.3 GPU-hours" in shown


def test_nothing_is_hashed_and_what_would_need_it_is_unknown(tmp_path, monkeypatch, capsys, no_results):
    """Text counts by its contents: known once a run has read it, as the same file at another place then is."""
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "t.txt").write_text("some text")
    monkeypatch.setattr(fingerprints, "sha256_of", lambda path: pytest.fail(f"{path} is read"))
    key = "0123456789ab"
    finished(tmp_path / "runs" / "any", "corpus_screen", "bf16/s0", data_path=f"/shards/text-32000-{key}")
    words = ["experiment=corpus_screen", "cell=bf16/s0", f"paths.runs={tmp_path}/runs", f"paths.data={tmp_path}/shards"]
    words += ["data=text", "data.val_files=null"]
    planned = cost_module().main
    assert planned([*words, f"data.files={tmp_path}/a/t.txt"]) == 0
    out, error = capsys.readouterr()
    assert "1 unknown" in out and "bf16/s0: unknown, left alone: " in error
    assert not (tmp_path / "shards").exists()
    monkeypatch.undo()
    monkeypatch.setattr(lookup, "RESULTS", tmp_path / "no_results")
    folder = token_folder(DataSpec(files=f"{tmp_path}/a/t.txt"), tmp_path / "shards")  # as a run would: it hashes
    run = json.loads((tmp_path / "runs" / "any" / "run.json").read_text())
    (tmp_path / "runs" / "any" / "run.json").write_text(json.dumps(run | {"data_path": str(folder)}))
    assert planned([*words, f"data.files={tmp_path}/a/t.txt"]) == 0 and "1 done" in capsys.readouterr().out
    assert planned([*words, f"data.files={tmp_path}/b/t.txt"]) == 0 and "1 unknown" in capsys.readouterr().out
    token_folder(DataSpec(files=f"{tmp_path}/b/t.txt"), tmp_path / "shards")
    assert planned([*words, f"data.files={tmp_path}/b/t.txt"]) == 0 and "1 done" in capsys.readouterr().out
    (tmp_path / "b" / "t.txt").write_text("other tex")  # of the same size
    token_folder(DataSpec(files=f"{tmp_path}/b/t.txt"), tmp_path / "shards")
    assert planned([*words, f"data.files={tmp_path}/b/t.txt"]) == 0 and "1 missing" in capsys.readouterr().out


def test_kept_results_are_cells_that_are_done(monkeypatch):
    """Every kept run of a grid that is as its file says is found by its numerics."""
    composer = Composer()
    found = {}
    for path in sorted(lookup.RESULTS.glob("*/*/run.json")):
        info = json.loads(path.read_text())
        if not info.get("experiment") or not (path.parent / "result.json").exists():
            continue  # typed by hand, or cut
        if "parent" in info:
            continue  # a fork is known by its trunk's run folder, which isn't here
        if "optim.lr=" in json.loads((path.parent / "env.json").read_text()).get("command", ""):
            continue  # another rate was typed behind a cell's words
        text = Text(info["vocab_size"], info["data_fingerprint"], info["tokenizer_hash"])
        monkeypatch.setattr(lookup, "text_of", lambda config, text=text: text)
        composed = composer.compose([f"experiment={info['experiment']}", f"cell={info['cell']}"])
        looked = lookup.Lookup(Path("/nowhere"), composer.numerics)
        found[path.parent.name] = looked.state_of(info["experiment"], info["cell"], composed).state.status
    assert len(found) > 50 and set(found.values()) <= {states.DONE, states.DIVERGED}, found


def test_nothing_is_left_of_done_and_diverged_cells_and_a_part_of_the_stopped_ones():
    module = cost_module()
    kinds = {"a": states.DONE, "b": states.DIVERGED, "c": states.STOPPED, "d": states.MISSING}
    found = {name: states.State(status, 0 if name == "d" else 20) for name, status in kinds.items()}
    table = {"device": H100, "rows": rows(llama_30m__quartet2=1000)}  # an hour a cell
    lines = module.totals([replace(cell(), name=name) for name in kinds], found, table, None, module.OWN)
    assert lines[0] == "1 done, 1 diverged, 1 stopped, 1 missing"
    assert lines[2] == f"{H100}: 4.0 GPU-hours, 1.8 of them left"  # the missing one, 80 of 100 steps of the stopped one


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=corpus_rankin"], "did you mean corpus_ranking"),
        (["experiment=corpus_ranking", "details=yes"], "write details=true or details=false"),
        (["experiment=corpus_ranking", "price=abc"], "price=abc: give a number"),
        (["experiment=corpus_ranking", "price=nan"], "price=nan: give a number"),
        (["experiment=corpus_ranking", "table=/nope.json"], "table=/nope.json: no such file"),
        (["measure=runs/*", "tabel=x.json"], "tabel has no meaning beside measure"),
        (["measure=runs/*", "foo"], "foo has no meaning beside measure"),
        (["measure=b.json"], "add device='NVIDIA H100'"),
        (["measure=/nope.json", "device=CPU"], "/nope.json"),
        (
            ["measure=results/bench/linear.json", "device=CPU"],
            "results/bench/linear.json: not what scripts/bench/bench_step.py",
        ),
    ],
)
def test_mistakes_are_named(words, message, capsys, monkeypatch):
    monkeypatch.setattr(costs, "TABLE", Path("/nowhere/throughput.json"))  # not to be written
    assert cost_module().main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("cost: ") and message in error and len(error.splitlines()) == 1


def test_a_single_run_has_hours_and_days_on_several_gpus(tmp_path, capsys, monkeypatch):
    words = ["model=llama_30m", "quant=quartet2", "tokens=36e6", "price=2", "gpus=4", "price_b200=5"]
    costs_file = tmp_path / "table.json"
    speeds = [
        {"model": "llama_30m", "recipe": name, "tokens_per_second": speed, "flops_per_token": FLOPS_30M}
        for name, speed in (("quartet2", 100), ("bf16", 200))
    ]
    costs_file.write_text(json.dumps({"device": H100, "rows": speeds}))
    assert cost_module().main([*words, f"table={costs_file}"]) == 0
    out = capsys.readouterr().out
    steps = 36_000_000 // 262_144
    hours = steps * 262_144 / 100 / 3600
    assert f"llama_30m/quartet2/s0  unknown 0  {steps}" in out and "one run; throughput" in out
    assert f"{H100}: {hours:.1f} GPU-hours, {hours:.1f} of them left, {2 * hours:.0f}" in out
    assert f"on 4 GPUs, if they scale perfectly: {hours / 4 / 24:.1f} days" in out
    assert cost_module().main([*words[:2], "gpus=0"]) == 2 and "gpus=0: give how many" in capsys.readouterr().err


@pytest.mark.parametrize("speed", ['"fast"', "null", "0", "Infinity", "NaN"])
def test_a_file_that_holds_no_timings_is_named(tmp_path, capsys, speed):
    timing = '[{"model": "llama_30m", "recipe": "bf16", "tokens_per_second": '
    words = [f"measure={tmp_path}/bench.json", "device=CPU", f"table={tmp_path}/table.json"]
    for text, message in (("[{", "not JSON"), (timing + speed + "}]", "not what scripts/bench/bench_step.py")):
        (tmp_path / "bench.json").write_text(text)
        assert cost_module().main(words) == 2
        assert f"bench.json: {message}" in capsys.readouterr().err and not (tmp_path / "table.json").exists()
    (tmp_path / "bench.json").write_text(timing + "1000.4}]")
    assert (
        cost_module().main(words) == 0 and costs.load(tmp_path / "table.json")["rows"][0]["tokens_per_second"] == 1000
    )


@pytest.mark.parametrize("script", ["cost.py", "run_grid.py"])
def test_a_reader_that_leaves_early_sees_no_traceback(script):
    """A pipe whose reading end is closed, as `| head` leaves it."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(SCRIPT.with_name(script)), "experiment=c4_grid", "only=30M/0.75B/bf16"]
    extra = ["list=true"] if script == "run_grid.py" else []
    done = subprocess.run([*command, *extra], stdout=writing, stderr=subprocess.PIPE, timeout=120, text=True)
    os.close(writing)
    assert done.returncode == -signal.SIGPIPE and done.stderr == ""
