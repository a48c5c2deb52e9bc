"""-m: every combination in its own process, one after another, or one a GPU at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import multirun
from launcher.compose import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """Replace train.py by a script that writes its arguments down; exit code 3 where seed=1 is among them."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, pathlib\n"
        f"with open({str(tmp_path / 'ran')!r}, 'a') as f: f.write(' '.join(sys.argv[1:]) + '\\n')\n"
        "sys.exit(3 if 'seed=1' in sys.argv else 0)\n"
    )
    monkeypatch.setattr(multirun, "TRAIN", script)
    return lambda: (tmp_path / "ran").read_text().splitlines() if (tmp_path / "ran").exists() else []


def test_runs_every_combination_in_order_and_goes_on_after_a_failure(jobs, capfd):
    assert multirun.run_all(["quant=bf16,sr", "seed=0,1"]) == 3
    assert jobs() == [f"quant={quant} seed={seed}" for quant in ("bf16", "sr") for seed in (0, 1)]
    summary = capfd.readouterr().out.splitlines()[-4:]
    assert summary[0].split() == ["ok", "quant=bf16", "seed=0"]
    assert summary[1].split() == ["exit", "code", "3", "quant=bf16", "seed=1"]


def test_a_wrong_combination_is_found_before_the_first_run(jobs):
    with pytest.raises(ConfigError, match=r"optim\.lr=-1 seed=0: optim\.lr=-1"):
        multirun.run_all(["optim.lr=1e-3,-1", "seed=0"])
    with pytest.raises(ConfigError, match=r"batch\.micro=3: batch of 512 sequences is not a multiple"):
        multirun.run_all(["batch.sequences=512", "batch.micro=4,3"])
    assert jobs() == []


def test_two_runs_of_one_name_are_refused_before_the_first(jobs):
    with pytest.raises(ConfigError, match=r"run\.name=same: .*seed=0.* and .*seed=1.* would share one folder"):
        multirun.run_all(["seed=0,1", "run.name=same"])
    assert jobs() == []


@pytest.mark.parametrize(("word", "twin"), [("seed=0,0", "seed=0"), ("seed=0,00", "seed=00")])
def test_the_same_run_twice_is_refused_before_the_first(jobs, word, twin):
    with pytest.raises(
        ConfigError, match=f"^quant=sr seed=0 and quant=sr {twin} are the same run; list each value once$"
    ):
        multirun.run_all(["quant=sr", word])
    assert jobs() == []


def test_refused_under_torchrun(jobs, monkeypatch):
    ours = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in (ours | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"-m .* torchrun"):
        multirun.run_all(["seed=0,1"])
    with pytest.raises(ConfigError, match=r"launcher=slurm .* torchrun"):
        multirun.submit_all(["seed=0"], False, {})
    monkeypatch.delenv("RANK")
    with pytest.raises(ConfigError, match="without RANK"):
        multirun.run_all(["seed=0,1"])
    assert jobs() == []


@pytest.mark.parametrize(("number", "ends", "code"), [("SIGTERM", 75, 75), ("SIGINT", 0, 130), ("SIGINT", 130, 130)])
def test_a_stop_reaches_the_run_and_ends_the_sequence(tmp_path, number, ends, code):
    """The child ends by itself with its own code, which after Ctrl-C says nothing, and no further run starts."""
    script = tmp_path / "train.py"
    script.write_text(
        "import signal, sys, time\n"
        f"signal.signal(signal.{number}, lambda *a: sys.exit({ends}))\n"
        "print('running', flush=True)\ntime.sleep(60)\n"
    )
    run = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom launcher import multirun\n"
        f"multirun.TRAIN = Path({str(script)!r})\nsys.exit(multirun.run_all(['seed=0,1,2']))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", run], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while (line := parent.stdout.readline()).strip() != "running":
        assert line, parent.stderr.read()  # it ended
    if number == "SIGINT":
        os.killpg(parent.pid, signal.SIGINT)  # as the keyboard does
    else:
        parent.send_signal(signal.SIGTERM)
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == code
    assert "stopped; 2 of 3 runs not started" in err
    assert "running" not in out and out.splitlines()[-1].split() == ["stopped", "seed=0"]


@pytest.fixture
def two_gpus(monkeypatch, on_path):
    on_path(**{"nvidia-smi": "echo 'GPU 0: H200'\necho 'GPU 1: H200'"})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_one_run_a_gpu_at_once_with_its_output_in_a_file(jobs, two_gpus, tmp_path, capfd):
    """Each waits until another is running, so that one after another would never end."""
    (tmp_path / "train.py").write_text(
        "import os, pathlib, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "gpu, seed = os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[1]\n"
        "(here / f'on-{gpu}-{seed}').touch()\n"
        "other = '1' if gpu == '0' else '0'\n"
        "deadline = time.monotonic() + 30\n"
        "while not list(here.glob(f'on-{other}-*')):\n"
        "    assert time.monotonic() < deadline\n"
        "    time.sleep(0.02)\n"
        "print('said', seed)\n"
        "sys.exit(3 if seed == 'seed=1' else 0)\n"
    )
    assert multirun.run_all(["seed=0,1,2", f"paths.runs={tmp_path / 'runs'}"]) == 3
    out = capfd.readouterr().out
    assert "said" not in out
    ends = [line.split() for line in out.splitlines()[-3:]]
    assert [end[:-2] for end in ends] == [["ok"], ["exit", "code", "3"], ["ok"]]
    logs = {path.read_text().strip() for path in (tmp_path / "runs" / multirun.LOGS).iterdir()}
    assert logs == {"said seed=0", "said seed=1", "said seed=2"}
    assert len(list(tmp_path.glob("on-0-*"))) and len(list(tmp_path.glob("on-1-*")))


def test_a_stop_reaches_every_run_at_once(jobs, two_gpus, tmp_path, capfd):
    (tmp_path / "train.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / f'on-{sys.argv[1]}').touch()\n"
        "while len(list(here.glob('on-*'))) < 2: time.sleep(0.02)\n"
        "if sys.argv[1] == 'seed=0': os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    assert multirun.run_all(["seed=0,1,2", f"paths.runs={tmp_path / 'runs'}"]) == 75
    found = capfd.readouterr()
    assert "1 of 3 runs not started" in found.err
    assert [line.split()[0] for line in found.out.splitlines()[-2:]] == ["stopped", "stopped"]
