import fcntl
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import wait_until

from analysis import early, states
from base.runfolder import RunError
from launcher import cellline, lookup, losers
from launcher import cells as experiments
from launcher.compose import Composer, compose
from launcher.naming import Text
from training.ranks.signals import RunLock

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "scripts" / "run_grid.py"
ONLY = "only=bf16/s[0-3]"


TEXT = Text(32_000, "f" * 8, "t" * 8, "0" * 12)


@pytest.fixture(scope="module")
def numerics(tmp_path_factory):
    """A file with the numerics of bf16/s0 to s3, by seed."""
    composer, table = Composer(), {}
    for seed in range(4):
        composed = composer.compose(["experiment=corpus_screen", f"cell=bf16/s{seed}"])
        table[str(seed)] = composer.numerics.of(composed.config, TEXT)
    path = tmp_path_factory.mktemp("numerics") / "numerics.json"
    path.write_text(json.dumps(table))
    return path


@pytest.fixture(autouse=True)
def known_text(numerics, monkeypatch, tmp_path):
    """The text is known, and no kept results are there."""
    monkeypatch.setenv("FAKE_NUMERICS", str(numerics))
    monkeypatch.setattr(lookup, "text_of", lambda config: TEXT)
    monkeypatch.setattr(lookup, "RESULTS", tmp_path / "no_results")


def describe(folder, seed=0, **changes):
    """Write run.json of bf16/s<seed>, with other numerics where `changes` says so."""
    table = json.loads(Path(os.environ["FAKE_NUMERICS"]).read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(
        json.dumps({"hash": "0123456789", "numerics": table["0"] | {"seed": seed} | changes})
    )


@pytest.fixture
def run_grid(monkeypatch):
    spec = importlib.util.spec_from_file_location("run_grid", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TRAIN", HERE / "fake_train.py")
    return module


def start_script(runs, *words):
    """run_grid.py as a process of its own, with the stand-in for train.py."""
    code = f"import sys, importlib.util as u; s = u.spec_from_file_location('run_grid', {str(SCRIPT)!r})\n"
    code += (
        "m = u.module_from_spec(s); sys.modules['run_grid'] = m; s.loader.exec_module(m); from pathlib import Path\n"
    )
    code += "from launcher import lookup, naming; lookup.RESULTS = Path('/nowhere')\n"
    code += f"lookup.text_of = lambda config: naming.{TEXT!r}\n"
    code += f"m.TRAIN = Path({str(HERE / 'fake_train.py')!r}); sys.exit(m.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "experiment=corpus_screen", ONLY, f"paths.runs={runs}", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def starts(runs, cell):
    return (runs / experiments.folder_name("corpus_screen", cell) / "starts").read_text().splitlines()


def hold(runs) -> Path:
    """Where a file keeps the run of bf16/s0 from going on."""
    path = runs / experiments.folder_name("corpus_screen", "bf16/s0") / "hold"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_runs_every_cell_once_and_never_again(run_grid, tmp_path, capsys):
    words = ["experiment=corpus_screen", ONLY, f"paths.runs={tmp_path}"]
    assert run_grid.main(words) == 0
    for seed in range(4):
        assert states.state_of(tmp_path, f"corpus_screen-bf16-s{seed}") == states.State("done", 20, 3.0)
    assert run_grid.main(words) == 0
    assert "4 cells, 0 to run, 1 at a time; so far 4 done\n" in capsys.readouterr().out
    assert all(len(starts(tmp_path, f"bf16/s{seed}")) == 1 for seed in range(4))


def test_one_run_a_gpu_side_by_side(run_grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_grid, "gpu_lanes", lambda wanted, per_gpu: ["0", "1"])
    words = ["experiment=corpus_screen", ONLY, f"paths.runs={tmp_path}", "log.every=5"]
    assert run_grid.main(words) == 0
    used = [starts(tmp_path, f"bf16/s{seed}")[0].split()[1] for seed in range(4)]
    assert sorted(used) == ["0", "0", "1", "1"]
    assert "1 running, 2 waiting" in capsys.readouterr().out


def test_gpu_lanes_take_each_gpu_before_a_second_lane(run_grid, monkeypatch, on_path):
    on_path(**{"nvidia-smi": "echo 'GPU 0: H100'\necho 'GPU 1: H100'"})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run_grid.gpu_lanes("all", 2) == ["0", "1", "0", "1"]
    assert run_grid.gpu_lanes("1", 1) == ["1"]
    with pytest.raises(experiments.CellError, match="no GPU 7 here"):
        run_grid.gpu_lanes("0,7", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert run_grid.gpu_lanes("all", 1) == ["1"]


def test_listing_starts_nothing(run_grid, tmp_path, capsys):
    assert run_grid.main(["experiment=corpus_screen", ONLY, f"paths.runs={tmp_path}", "list=True"]) == 0
    listed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    names = [compose(words[2:]).config.run.name for words in listed]  # behind python train.py
    assert names == [f"corpus_screen-bf16-s{seed}" for seed in range(4)] and not list(tmp_path.iterdir())


def test_cell_chooses_that_cell_alone(run_grid, tmp_path, capsys):
    words = ["experiment=corpus_screen", f"paths.runs={tmp_path}", "list=true"]
    assert run_grid.main([*words, "cell=bf16/s2"]) == 0
    (listed,) = capsys.readouterr().out.splitlines()
    assert "cell=bf16/s2" in listed and listed.count("cell=") == 1
    assert run_grid.main([*words, "cell=bf16/s[2]"]) == 2  # a name, not a pattern
    assert run_grid.main([*words, "only=bf16/*", "cell=bf16/s2"]) == 2
    assert "give one of only= and cell=" in capsys.readouterr().err


def test_a_failing_run_is_reported_and_the_others_go_on(run_grid, tmp_path, capsys):
    words = ["experiment=corpus_screen", "only=bf16/s0", f"paths.runs={tmp_path}", "seed=666"]
    assert run_grid.main(words) == 1
    output = capsys.readouterr().out
    log = output.split("FAILED bf16/s0: see ")[1].strip()
    assert "no such data" in Path(log).read_text()


def test_a_damaged_cell_is_left_alone_and_the_others_run(run_grid, tmp_path, capsys):
    result = tmp_path / "corpus_screen-bf16-s0" / "result.json"
    describe(result.parent)
    result.write_text("{bad")
    words = ["experiment=corpus_screen", "only=bf16/s[01]", f"paths.runs={tmp_path}"]
    assert run_grid.main([*words, "list=true"]) == 1
    out, error = capsys.readouterr()
    assert "cell=bf16/s1" in out and "cell=bf16/s0" not in out and f"mv -n {result} {result}.damaged (then" in error
    assert run_grid.main(words) == 1
    out, error = capsys.readouterr()
    assert "2 cells, 1 to run" in out and "1 damaged, 1 missing" in out and error.count("bf16/s0: damaged") == 1
    assert result.read_text() == "{bad" and states.state_of(tmp_path, "corpus_screen-bf16-s1").status == "done"


def test_a_diverged_run_is_left_alone_until_told_how_to_go_on(run_grid, tmp_path, capsys):
    folder = tmp_path / "corpus_screen-bf16-s0"
    describe(folder)
    train, bad = '{"kind": "train", "step": 6}\n', '{"kind": "event", "event": "nonfinite", "step": 6, "bad_step": 7}\n'
    (folder / "metrics.jsonl").write_text(train + bad)
    words = ["experiment=corpus_screen", "only=bf16/s0", f"paths.runs={tmp_path}"]
    assert states.state_of(tmp_path, folder.name) == states.State("diverged", 6)
    assert run_grid.main(words) == 0 and not (folder / "starts").exists()
    assert "1 cells, 0 to run" in (out := capsys.readouterr().out) and "bf16/s0: diverged, left as it is" in out
    skipped = '{"kind": "event", "event": "skip", "step": 7, "bad_step": 7}\n'
    (folder / "metrics.jsonl").write_text(train + bad + skipped)
    assert states.state_of(tmp_path, folder.name) == states.State("stopped", 6)
    (folder / "metrics.jsonl").write_text(train + bad + train.replace("6", "7"))
    assert states.state_of(tmp_path, folder.name) == states.State("stopped", 7)
    (folder / "metrics.jsonl").write_text(train + bad)
    assert run_grid.main([*words, "nonfinite=skip"]) == 0 and len(starts(tmp_path, "bf16/s0")) == 1


def test_a_run_that_diverges_in_spite_of_skip_is_not_told_to_skip(run_grid, tmp_path, capsys):
    words = ["seed=666", f"paths.runs={tmp_path}"]  # which fails
    folder = tmp_path / compose(["experiment=corpus_screen", "cell=bf16/s0", *words]).config.run.name
    describe(folder, 666)
    (folder / "metrics.jsonl").write_text('{"kind": "event", "event": "nonfinite", "step": 6, "bad_step": 7}\n')
    assert run_grid.main(["experiment=corpus_screen", "cell=bf16/s0", *words, "nonfinite=skip"]) == 1
    assert "bf16/s0: diverged in spite of nonfinite=skip\n" in capsys.readouterr().out


def test_a_loser_is_stopped_saved_and_left_alone_until_losers_go_on(run_grid, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(losers, "LOOK_S", 0.0)
    mine = SimpleNamespace(evals={"step": [3]}, info={"steps": 20}, name="mine")

    def read(folder):
        if not (folder / "metrics.jsonl").exists():
            raise RunError("it has only begun")
        return mine

    monkeypatch.setattr(losers, "read_run", read)
    monkeypatch.setattr(early, "refusal", lambda run: None)
    monkeypatch.setattr(early, "rivals_of", lambda run, runs: [])
    monkeypatch.setattr(early, "lost", lambda run, rivals, share: (SimpleNamespace(name="first"), 0.016))
    hold(tmp_path)
    words = ["experiment=corpus_screen", "only=bf16/s0", f"paths.runs={tmp_path}"]
    assert run_grid.main([*words, "stop_losers=true"]) == 0
    out = capsys.readouterr().out
    assert "bf16/s0: ended at step 3: 16.0e-3 behind first" in out and "FAILED" not in out
    assert run_grid.main([*words, "stop_losers=true"]) == 0
    assert "1 cells, 0 to run" in capsys.readouterr().out
    (tmp_path / "corpus_screen-bf16-s0" / "hold").unlink()
    assert run_grid.main(words) == 0
    assert states.state_of(tmp_path, "corpus_screen-bf16-s0").status == "done"
    assert run_grid.main([*words, "stop_losers=true", "launcher=slurm"]) == 2
    assert "leave it out with launcher=slurm" in capsys.readouterr().err


@pytest.mark.parametrize("size", [10, 150_000, 2_000_000])
def test_the_last_step_stands_before_an_evaluations_slots(tmp_path, size):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    rows = [{"kind": "train", "step": s} for s in range(1, 251)] + [{"kind": "slots", "step": 250, "slots": "x" * size}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert states.state_of(tmp_path, "run") == states.State("stopped", 250)
    (folder / "metrics.jsonl").write_text(json.dumps(rows[-1]) + "\n")
    assert states.state_of(tmp_path, "run") == states.State("stopped", 0)


def test_sigterm_stops_the_runs_saved_and_the_same_command_goes_on(tmp_path):
    held = hold(tmp_path)
    script = start_script(tmp_path)
    wait_until(lambda: states.last_step(held.parent) == 3)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=60) == 75
    assert states.state_of(tmp_path, "corpus_screen-bf16-s0") == states.State("stopped", 3)
    held.unlink()
    again = start_script(tmp_path, "log.every=1")
    assert again.wait(timeout=60) == 0
    assert states.state_of(tmp_path, "corpus_screen-bf16-s0").status == "done"
    assert len(starts(tmp_path, "bf16/s0")) == 2 and len(starts(tmp_path, "bf16/s3")) == 1


def test_sigterm_while_a_run_is_being_started_reaches_that_run(run_grid, tmp_path, monkeypatch):
    monkeypatch.setattr(run_grid, "gpu_lanes", lambda wanted, per_gpu: [None])
    start = run_grid.start

    def interrupted(*given):
        run = start(*given)
        wait_until((tmp_path / "corpus_screen-bf16-s0" / "starts").exists)  # its handler is installed
        os.kill(os.getpid(), signal.SIGTERM)
        return run

    monkeypatch.setattr(run_grid, "start", interrupted)
    words = ["experiment=corpus_screen", "only=bf16/s0", f"paths.runs={tmp_path}", "log.every=20"]
    assert run_grid.main(words) == 75
    assert states.state_of(tmp_path, "corpus_screen-bf16-s0").status == "stopped"


def test_ctrl_c_before_the_first_run_is_one_line(run_grid, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_grid.cellline, "read", interrupted)
    assert run_grid.main(["experiment=corpus_screen", ONLY, f"paths.runs={tmp_path}"]) == 130
    assert capsys.readouterr().err == "run_grid: interrupted\n" and not any(tmp_path.iterdir())


def test_kill_9_leaves_the_run_going_and_a_second_script_leaves_it_alone(tmp_path):
    held = hold(tmp_path)
    script = start_script(tmp_path)
    wait_until(lambda: states.last_step(held.parent) == 3)
    script.kill()
    script.wait()
    assert states.state_of(tmp_path, "corpus_screen-bf16-s0").status == "running"
    second = start_script(tmp_path, "log.every=1")
    output = second.communicate(timeout=60)[0]
    assert second.returncode == 0 and "4 cells, 3 to run, 1 at a time; so far 1 running, 3 missing\n" in output
    held.unlink()
    wait_until(lambda: states.state_of(tmp_path, "corpus_screen-bf16-s0").status == "done")
    assert len(starts(tmp_path, "bf16/s0")) == 1


def test_two_scripts_at_once_share_the_work(tmp_path):
    scripts = [start_script(tmp_path, "log.every=3") for _ in range(2)]
    assert [script.wait(timeout=90) for script in scripts] == [0, 0]
    assert all(len(starts(tmp_path, f"bf16/s{seed}")) == 1 for seed in range(4))


def test_who_asks_is_not_who_runs(run_grid, tmp_path):
    """Asking holds the lock shared: two who ask don't see each other as a run, and a start beside them waits."""
    path = tmp_path / ".lock"
    path.touch()
    asking = os.open(path, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    assert not states.is_locked(path)
    threading.Timer(0.05, os.close, [asking]).start()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert states.is_locked(path)
    lock.release()
    line = run_grid.cellline.read(["experiment=corpus_screen", "only=bf16/s0", f"paths.runs={tmp_path}"], run_grid.OWN)
    cell = states.cell_lock(tmp_path, line.run_name("bf16/s0"))
    cell.parent.mkdir()
    asking = os.open(cell, os.O_RDWR | os.O_CREAT)
    fcntl.flock(asking, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, [asking]).start()
    assert run_grid.start(line, ["bf16/s0"], None).process.wait(timeout=30) == 0


def test_slurm_submits_one_job_a_missing_cell(run_grid, tmp_path, capsys):
    pytest.importorskip("submitit", reason="submitit is not installed")
    words = [
        "experiment=corpus_screen",
        "only=bf16/s[01]",
        f"paths.runs={tmp_path}",
        "launcher=slurm",
        "slurm.cluster=local",
    ]
    assert run_grid.main([*words, "slurm.timeout_min=5"]) == 0
    assert capsys.readouterr().out.count("submitted as job") == 2
    wait_until(lambda: all(states.state_of(tmp_path, f"corpus_screen-bf16-s{s}").status == "done" for s in (0, 1)), 60)


@pytest.fixture
def cluster(tmp_path, on_path):
    """A SLURM that only queues: sbatch says the next id, squeue prints the file `queue`, srun is there."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    queue, submissions = tmp_path / "queue", tmp_path / "submissions"
    queue.touch()
    sbatch = f"echo x >>{submissions}; echo Submitted batch job 70$(grep -c x {submissions})"
    on_path(srun="true", squeue=f"cat {queue}", sbatch=sbatch)
    return queue


def test_slurm_leaves_alone_what_waits_or_runs(run_grid, tmp_path, capsys, cluster):
    words = ["experiment=corpus_screen", "only=bf16/s[01]", f"paths.runs={tmp_path}/runs", "launcher=slurm"]
    words.append("slurm.timeout_min=60")
    assert run_grid.main(words) == 0
    assert "bf16/s1: submitted as job 701_1\n" in capsys.readouterr().out
    cluster.write_text("701_1\n12\n")  # bf16/s0's job is gone, without a result: it goes in again
    assert run_grid.main(words) == 0
    out = capsys.readouterr().out
    assert "bf16/s1: in the queue as job 701_1, left alone" in out and "bf16/s0: submitted as job 702\n" in out
    cluster.write_text("701_1\n702\n")
    assert run_grid.main(words) == 0
    assert "0 of 2 cells submitted" in capsys.readouterr().out
    assert (tmp_path / "submissions").read_text() == "x\nx\n"


def test_nothing_is_submitted_blindly(run_grid, tmp_path, capsys, cluster, on_path):
    on_path(squeue="echo no controller >&2; exit 1")
    words = ["experiment=corpus_screen", "only=bf16/s0", f"paths.runs={tmp_path}/runs", "launcher=slurm"]
    assert run_grid.main(words) == 2
    assert "no controller; which cells wait or run already" in capsys.readouterr().err
    on_path(squeue="true")
    with run_grid.submitting(tmp_path / "runs" / ".grid" / "slurm"):
        assert run_grid.main(words) == 2
    assert "another run_grid.py is submitting" in capsys.readouterr().err
    assert not (tmp_path / "submissions").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=corpus_screen", "only=none/*"], "only=none/\\* matches none of the 76 cells"),
        (["experiment=corpus_screen", "only=bf16/*,quartte2/*"], "only=quartte2/\\* matches none of the 76 cells"),
        (["experiment=corpus_scren"], "did you mean corpus_screen"),
        (["experiment=corpus_screen", "launcher=slrum"], "write launcher=slurm"),
        (["experiment=corpus_screen", "lancher=slurm"], "unknown key 'lancher'; did you mean launcher"),
        (["only=bf16"], "experiment=<grid> is missing"),
        (["experiment=corpus_screen", "list=yes"], "list=yes: write list=true or list=false"),
        (["experiment=corpus_screen", "per_gpu=0"], "per_gpu=0: give a whole number, 1 or more"),
        (["experiment=corpus_screen", "per_gpu=x"], "per_gpu=x: give a whole number"),
        (["experiment=corpus_screen", "foo=1"], "unknown key 'foo'"),
        (["experiment=corpus_screen", "dry_run=true"], "dry_run=true runs no cell: list=true"),
        (["experiment=corpus_screen", "launcher=slurm", "slurm.partition"], "can't read 'slurm.partition'"),
    ],
)
def test_mistakes_are_named(run_grid, words, message, capsys, monkeypatch):
    monkeypatch.setattr(run_grid.subprocess, "Popen", None)  # nothing may start
    assert run_grid.main(words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def finished(folder, seed=0, **changes):
    describe(folder, seed, **changes)
    (folder / "result.json").write_text('{"status": "finished", "step": 20, "final_loss": 3.0}')


WORDS = ["experiment=corpus_screen", "only=bf16/s[01]"]


def test_a_folder_of_that_name_with_other_numerics_is_not_done(run_grid, tmp_path, capsys):
    """The grid's file, a recipe, a preset or the text was changed after the run."""
    for changes, key in (
        ({"schedule.steps": 6}, "schedule.steps: 6 (stored) -> 3052 (now)"),
        ({"model.hidden": 5}, "model.hidden: 5 (stored) -> 1792 (now)"),
        ({"quant.fprop.x.grid": "e2m1"}, "quant.fprop.x.grid: e2m1 (stored) -> none (now)"),
        ({"data.fingerprint": "other text"}, "data.fingerprint: other text (stored) -> ffffffff (now)"),
    ):
        folder = tmp_path / "corpus_screen-bf16-s0"
        finished(folder, **changes)
        assert run_grid.main([*WORDS, f"paths.runs={tmp_path}", "list=true"]) == 1
        out, error = capsys.readouterr()
        assert "cell=bf16/s1" in out and "cell=bf16/s0" not in out
        assert error.startswith("bf16/s0: other, left alone: ") and key in error and error.count("\n") == 1
        subprocess.run(error.partition(" type: ")[2].partition("; or")[0], shell=True, check=True)
        assert not folder.exists() and (tmp_path / "corpus_screen-bf16-s0-01234567" / "result.json").exists()
        shutil.rmtree(tmp_path / "corpus_screen-bf16-s0-01234567")


def test_done_is_what_a_folder_of_any_name_holds(run_grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lookup, "RESULTS", tmp_path / "results")
    finished(tmp_path / "runs" / "typed-by-hand", 0)
    finished(tmp_path / "results" / "kept" / "another", 1)
    finished(tmp_path / "runs" / "corpus_screen-bf16-s2", 2)
    words = ["experiment=corpus_screen", ONLY, f"paths.runs={tmp_path}/runs", "list=true"]
    assert run_grid.main(words) == 0
    assert [word for word in capsys.readouterr().out.split() if "cell=" in word] == ["cell=bf16/s3"]


def test_a_run_begun_under_another_name_goes_on_there(run_grid, tmp_path):
    describe(tmp_path / "typed-by-hand")
    (tmp_path / "typed-by-hand" / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    assert run_grid.main(["experiment=corpus_screen", "cell=bf16/s0", f"paths.runs={tmp_path}"]) == 0
    assert states.state_of(tmp_path, "typed-by-hand").status == "done"
    assert not (tmp_path / "corpus_screen-bf16-s0").exists()


def test_the_folder_of_the_runs_is_the_composed_one(run_grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    finished(tmp_path / "a b" / "corpus_screen-bf16-s0")
    finished(tmp_path / "runs" / "corpus_screen-bf16-s0")
    for place in (
        f'paths.runs="{tmp_path}/a b"',
        "paths.runs=${oc.env:SCRATCH}/runs",
        "++paths.runs=${oc.env:SCRATCH}/runs",
    ):
        assert run_grid.main([*WORDS, place, "list=true"]) == 0
        assert capsys.readouterr().out.count("cell=") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b", "runs"]


def test_spelling_makes_no_other_run(run_grid, tmp_path, capsys):
    finished(tmp_path / "any", **{"schedule.lr_peak": 1e-3})
    for rate in ("optim.lr=1e-3", "optim.lr=0.001", "++optim.lr=1.0e-03"):
        assert (
            run_grid.main(["experiment=corpus_screen", "cell=bf16/s0", f"paths.runs={tmp_path}", rate, "list=true"])
            == 0
        )
        assert capsys.readouterr().out == ""


def test_text_that_can_not_be_compared_is_unknown(run_grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lookup, "text_of", lambda config: None)
    finished(tmp_path / "corpus_screen-bf16-s0")
    finished(tmp_path / "corpus_screen-bf16-s1", 1, **{"schedule.steps": 5})
    assert run_grid.main([*WORDS, f"paths.runs={tmp_path}", "list=true"]) == 1
    error = capsys.readouterr().err
    assert "bf16/s0: unknown, left alone: " in error and "bf16/s1: other, left alone: " in error


def test_a_rerun_is_done_by_its_own_run_alone(run_grid, tmp_path, monkeypatch, capsys):
    """Its numerics are another cell's on purpose."""
    composed = compose(["experiment=corpus_noise", "cell=screen/bf16/rerun"])
    numerics = Composer().numerics.of(composed.config, TEXT)
    info = {"numerics": numerics, "experiment": "corpus_screen", "cell": "bf16/s0"}
    for name, more in (("first", {}), ("second", {"experiment": "corpus_noise", "cell": "screen/bf16/rerun"})):
        finished(tmp_path / name)
        (tmp_path / name / "run.json").write_text(json.dumps(info | more))
        assert (
            run_grid.main(["experiment=corpus_noise", "cell=screen/bf16/rerun", f"paths.runs={tmp_path}", "list=true"])
            == 0
        )
        assert ("rerun" in capsys.readouterr().out) == (name == "first")


@pytest.fixture
def tails(run_grid, tmp_path, monkeypatch):
    """tails(only, found, *words) runs these cells of corpus_tails, all but those in `found` ({cell: Found}) missing;
    returns (exit code, the cells of each process in order). A trunk's makes its checkpoint of step 2595."""

    def run(only, found, *words):
        missing = lookup.Found(states.State("missing"))
        monkeypatch.setattr(
            cellline.CellLine, "look", lambda self: {cell: found.get(cell, missing) for cell in self.cells}
        )
        started = []

        def start(line, cells, lane):
            started.append(cells)
            for cell in cells:
                folder = line.runs / line.cells[cell].config.run.name
                (folder / "checkpoints" / "step_00002595").mkdir(parents=True)
                for name, text in (("run.json", "{}"), ("config.yaml", "")):
                    (folder / name).write_text(text)
            return run_grid.Running(run_grid.BESIDE.join(cells), lane, subprocess.Popen(["true"]))

        monkeypatch.setattr(run_grid, "start", start)
        return run_grid.main(["experiment=corpus_tails", f"only={only}", f"paths.runs={tmp_path}", *words]), started

    return run


def test_forks_wait_for_their_trunks_checkpoint_and_are_named_if_it_never_comes(tails, capsys):
    """A trunk, a fork of it, and a fork at a step that the trunk doesn't keep."""
    code, started = tails("trunk/s0,same_85/s0,fprop_bf16_70/s0", {})
    assert code == 1 and started == [["trunk/s0"], ["same_85/s0"]]
    assert "fprop_bf16_70/s0: left alone, fork=corpus_tails-trunk-s0@2137 has no checkpoint" in capsys.readouterr().out


def test_overrides_that_rename_a_trunk_are_refused(tails, capsys):
    assert tails("trunk/s0,same_85/s0", {}, "optim.lr=6e-4") == (2, [])
    error = capsys.readouterr().err
    assert "optim.lr=6e-4: the trunk corpus_tails-trunk-s0 would be called corpus_tails-trunk-s0-" in error
    assert "set it in the base" in error and error.count("\n") == 1


def test_forks_of_one_trunk_share_a_process(tails):
    only = "trunk/s0,bf16_trunk/s0,same_85/s0,bf16_ema_85/s0,x_only_85/s0,w_only_85/s0"
    _, started = tails(only, {}, "in_one=2")
    assert sorted(started) == [
        ["bf16_ema_85/s0"],
        ["bf16_trunk/s0"],
        ["same_85/s0", "x_only_85/s0"],
        ["trunk/s0"],
        ["w_only_85/s0"],
    ]


def test_a_trunk_whose_result_alone_is_kept_is_run_for_its_forks(tails, tmp_path):
    kept = {"trunk/s0": lookup.Found(states.State("done", 3052, 3.6), tmp_path / "elsewhere")}
    assert tails("trunk/s0,same_85/s0", kept)[1] == [["trunk/s0"], ["same_85/s0"]]
    assert tails("trunk/s1,trunk/s0", kept)[1] == [["trunk/s1"]]  # no fork of it is wanted
    done = kept | {"same_85/s0": lookup.Found(states.State("done", 3052, 3.6), tmp_path / "tail")}
    assert tails("trunk/s0,same_85/s0", done)[1] == []


def test_a_trunks_checkpoints_go_with_its_last_fork(tails, tmp_path, capsys):
    folder = tmp_path / "corpus_tails-trunk-s0"
    for step in (2137, 2595, 3052):
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (folder / "result.json").write_text('{"status": "finished", "step": 3052, "final_loss": 3.6}')
    done = lookup.Found(states.State("done", 3052, 3.6), folder)
    forks = [cell for cell in all_cells() if trunk_of(cell) == folder.name]
    assert len(forks) > 10
    left = dict.fromkeys(["trunk/s0", *forks[1:]], done)
    assert tails("trunk/s0,same_85/s0", left | {"same_85/s0": done}, "trunks=delete")[0] == 0
    assert "its checkpoints stay, 1 forks of it are left, such as " + forks[0] in capsys.readouterr().out
    assert tails("trunk/s0", left | {forks[0]: done}, "trunks=keep")[0] == 0
    assert len(list((folder / "checkpoints").iterdir())) == 3
    assert tails("same_85/s0", left | {forks[0]: done}, "trunks=delete")[0] == 0
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00003052"]
    assert tails("same_85/s0", {}, "trunks=yes")[0] == 2
    assert tails("same_85/s0", {}, "trunks=delete", "launcher=slurm")[0] == 2
    assert tails("same_85/s0", {}, "in_one=0", "list=true")[0] == 2


def all_cells():
    return experiments.expand(experiments.load("corpus_tails"))


def trunk_of(cell):
    found = [word for word in all_cells()[cell] if word.startswith("fork=")]
    return found[0].removeprefix("fork=").replace("${seed}", cell[-1]).partition("@")[0] if found else None
