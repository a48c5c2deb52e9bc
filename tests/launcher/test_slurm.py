"""Jobs through submitit's local executor, which runs what a SLURM job would, signals and requeueing included."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import wait_until

from base.processes import descendants
from launcher import multirun, slurm
from launcher.cells import CellError
from launcher.cli import read_command_line
from launcher.compose import ConfigError

submitit = pytest.importorskip("submitit", reason="submitit is not installed")
# Counts its starts; the first start waits for the signal, "saves" for a second and leaves as train.py does.
FAKE_TRAIN = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
started = folder / f"started-{rank}.json"
starts = json.loads(started.read_text()) if started.exists() else []
started.write_text(json.dumps([*starts, world]))
asked = []
signal.signal(signal.SIGUSR1, lambda *a: asked.append(1))
while not starts and sys.argv[2] == "wait":
    (folder / f"ready-{rank}").touch()
    time.sleep(0.05)
    if asked:
        time.sleep(1)
        (folder / "saved").touch()
        sys.exit(75)
if sys.argv[2] == "scancel":
    os.kill(os.getppid(), signal.SIGTERM)
    sys.exit(74)
if sys.argv[2] in ("hang", "hang once") and int(rank) == int(world) - 1:
    if sys.argv[2] == "hang" or not starts:
        sys.exit(74)
if not starts and sys.argv[2] == "orphan":
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(71)
if sys.argv[2] == "disk full":
    sys.exit(1)
(folder / f"done-{rank}").touch()
"""


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(slurm, "FAILURE_PAUSE_S", 0)  # a Task carries it into its job


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "fake_train.py"
    path.write_text(FAKE_TRAIN)
    return path


def local_executor(folder):
    executor = submitit.LocalExecutor(folder=folder)
    executor.update_parameters(timeout_min=5)
    return executor


@pytest.mark.parametrize("processes", [1, 2])
def test_preempted_job_saves_first_and_its_requeued_start_finishes(tmp_path, script, monkeypatch, processes):
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", slurm.PREEMPT_SIGNAL)
    words = [sys.executable, str(script), str(tmp_path), "wait"]
    executor = local_executor(tmp_path / "jobs")
    job = executor.submit(slurm.Task(processes), words)
    wait_until((tmp_path / f"ready-{processes - 1}").exists)
    task = descendants(job._process.pid)[0]
    os.kill(task, signal.SIGUSR1)  # what SLURM sends before it takes the machine away; submitit then requeues the job
    assert job.result() == 0
    assert (tmp_path / "saved").exists()
    assert json.loads((tmp_path / "started-0.json").read_text()) == [str(processes)] * 2
    assert (tmp_path / "done-0").exists()


def test_several_processes_per_node_meet_through_torchrun(tmp_path, script):
    words = [sys.executable, str(script), str(tmp_path), "run"]
    assert local_executor(tmp_path / "jobs").submit(slurm.Task(2), words).result() == 0
    assert [json.loads((tmp_path / f"started-{rank}.json").read_text()) for rank in (0, 1)] == [["2"], ["2"]]


def test_command_on_several_nodes(monkeypatch):
    class Environment:
        num_nodes, job_id, hostnames = 3, "4711_2", ["node-a", "node-b", "node-c"]

    monkeypatch.setattr(submitit, "JobEnvironment", Environment)
    words = slurm.Task(8).launched(["python", "train.py", "model=llama_1b9"])
    assert words[:4] == [sys.executable, "-m", "launcher.torchrun", "--nproc-per-node=8"]
    assert words[4:] == [
        "--nnodes=3",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node-a:27112",
        "--rdzv-id=27112",
        "train.py",
        "model=llama_1b9",
    ]


@pytest.mark.parametrize(("processes", "fault"), [(1, "hang once"), (2, "hang once"), (2, "orphan")])
def test_a_hang_or_a_lost_launcher_requeues_the_job(tmp_path, script, monkeypatch, processes, fault):
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", slurm.PREEMPT_SIGNAL)
    job = local_executor(tmp_path / "jobs").submit(
        slurm.Task(processes), [sys.executable, str(script), str(tmp_path), fault]
    )
    assert job.result() == 0
    assert json.loads((tmp_path / "started-0.json").read_text()) == [str(processes)] * 2
    assert "requeueing (1 of 3)" in job.stdout()


@pytest.mark.parametrize(("how", "code", "starts"), [("hang", 74, 4), ("disk full", 1, 1)])
def test_a_run_that_always_hangs_or_fails_by_itself_ends_its_job(tmp_path, script, monkeypatch, how, code, starts):
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", slurm.PREEMPT_SIGNAL)
    job = local_executor(tmp_path / "jobs").submit(slurm.Task(), [sys.executable, str(script), str(tmp_path), how])
    assert f"failed with exit code {code}" in str(job.exception())
    assert len(json.loads((tmp_path / "started-0.json").read_text())) == starts


@pytest.mark.parametrize(
    ("how", "node", "requeues"), [("hang once", 0, "requeue 4711\n"), ("hang once", 1, ""), ("scancel", 0, "")]
)
def test_the_first_node_asks_slurm_to_requeue_unless_cancelled(tmp_path, script, on_path, how, node, requeues):
    """The job's own process as SLURM starts it on a node, with a scontrol that writes down what it is asked."""
    asked, jobs = tmp_path / "asked", tmp_path / "jobs"
    asked.touch()
    on_path(sbatch="echo Submitted batch job 4711", srun="true", scontrol=f'echo "$@" >>{asked}')
    words = [sys.executable, str(script), str(tmp_path), how]
    slurm.submit("name", jobs, [words], {"timeout_min": "60"})
    slurms = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2", "SLURM_PROCID": str(node), "SLURM_NODEID": str(node)}
    done = subprocess.run(
        [sys.executable, "-m", "submitit.core._submit", jobs],
        env={**os.environ, **slurms, "SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_PREEMPT_SIGNAL": slurm.PREEMPT_SIGNAL},
        timeout=60,
    )
    assert done.returncode != 0 and asked.read_text() == requeues
    if requeues:
        assert submitit.core.utils.DelayedSubmission.load(jobs / "4711_submitted.pkl").function.faults == 1


def test_a_preemption_forgets_earlier_faults():
    assert slurm.Task(2, faults=3).checkpoint(["true"]).function.faults == 0


def test_failing_command_fails_the_job(tmp_path):
    job = local_executor(tmp_path).submit(slurm.Task(), [sys.executable, "-c", "import sys; sys.exit(3)"])
    assert "failed with exit code 3" in str(job.exception())


def test_debug_executor_runs_in_this_process(tmp_path, script):
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="debug")
    assert executor.submit(slurm.Task(), [sys.executable, str(script), str(tmp_path), "run"]).result() == 0
    assert (tmp_path / "done-0").exists()


def test_sbatch_options_reach_sbatch(tmp_path, monkeypatch):
    """submitit writes the batch script; no SLURM is needed to see what would be submitted."""
    seen = {}

    class Executor:
        def __init__(self, folder, cluster, **options):
            seen.update(options, cluster=cluster)

        def update_parameters(self, **parameters):
            seen.update(parameters)

        def map_array(self, task, commands):
            seen["processes"], seen["commands"] = task.processes, commands
            return []

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: "/usr/bin/srun")
    options = {"partition": "gpu", "nodes": "2", "gpus_per_node": "8", "timeout_min": "60", "folder": str(tmp_path)}
    assert slurm.submit_runs([["model=llama_1b9"]], options) == []
    assert (seen["cluster"], seen["slurm_partition"], seen["nodes"], seen["gpus_per_node"]) == ("slurm", "gpu", 2, 8)
    assert (seen["timeout_min"], seen["tasks_per_node"], seen["processes"]) == (60, 1, 8)
    assert seen["commands"][0][1:] == [str(slurm.TRAIN), "model=llama_1b9"]


@pytest.mark.parametrize(("options", "delay"), [({}, 180), ({"signal_delay_s": "600"}, 600)])
def test_a_job_outlives_many_time_limits_and_has_time_to_save(tmp_path, on_path, options, delay):
    on_path(sbatch="echo Submitted batch job 4711", srun="true")
    slurm.submit("weeks", tmp_path / "jobs", [["true"], ["true"]], {"timeout_min": "240", **options})
    assert f"@{delay}\n" in (tmp_path / "jobs" / "4711_submission.sh").read_text()
    for task in (0, 1):
        job = submitit.core.utils.DelayedSubmission.load(tmp_path / "jobs" / f"4711_{task}_submitted.pkl")
        assert job._timeout_min == 240 and job._timeout_countdown >= 28 * 6  # four weeks of four-hour jobs


@pytest.mark.parametrize(
    "more", [{}, {"mem_gb": "64", "signal_delay_s": "600", "array_parallelism": "1", "qos": "high"}]
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_dry_run_shows_the_script_that_submitit_then_submits(tmp_path, on_path, monkeypatch, count, more):
    # submitit reads our choice from the environment when it is imported, which this file has done already.
    monkeypatch.setattr(submitit.core.job_environment.JobEnvironment, "USR_SIG", slurm.PREEMPT_SIGNAL)
    options = {"timeout_min": "240", "nodes": "2", "gpus_per_node": "8", "partition": "gpu long", **more}
    monkeypatch.chdir(tmp_path)
    jobs = [["seed=0"]] * count
    shown = slurm.described(jobs, options | {"folder": "jobs"})
    assert shown.splitlines()[0].endswith("of 2 nodes x 8 processes on slurm; nothing is submitted")
    assert not Path("jobs").exists()
    on_path(sbatch="echo Submitted batch job 4711", srun="true")
    slurm.submit_runs(jobs, options | {"folder": "jobs"})
    script = Path("jobs/4711_submission.sh").read_text()
    assert script.strip() in shown and "/jobs/" in script and f"--signal={slurm.PREEMPT_SIGNAL}@" in script


def test_a_dry_run_needs_no_slurm_and_shows_the_plan_for_all_ranks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = "-m model=llama_1b9 seed=0,1 dry_run=true launcher=slurm slurm.nodes=2 slurm.gpus_per_node=8"
    line = read_command_line([*words.split(), "slurm.timeout_min=60"])
    assert multirun.submit_all(line.overrides, line.multirun, line.slurm) == 0
    shown = capsys.readouterr().out
    assert "dry run    2 jobs of 2 nodes x 8 processes" in shown and "\n#SBATCH --gpus-per-node=8\n" in shown
    assert shown.count("16 processes, parallel=hsdp") == 2 and shown.count("#SBATCH --array=0-1%2\n") == 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"needs submitit: pip install"):
        multirun.submit_all(line.overrides, line.multirun, line.slurm)


def test_a_batch_that_the_jobs_ranks_cannot_share_is_not_submitted():
    with pytest.raises(ConfigError, match=r"don't divide over 3 GPUs; set batch\.micro"):
        multirun.submit_all([], False, {"gpus_per_node": "3", "timeout_min": "60"})


def test_a_dry_run_checks_the_options():
    with pytest.raises(CellError, match=r"slurm\.foo=1.*submitit refuses"):
        slurm.described([[]], {"foo": "1", "timeout_min": "60"})


@pytest.mark.parametrize(
    "word",
    [
        "nodes=two",
        "nodes=0",
        "nodes=true",
        "nodes=false",
        "gpus_per_node=x",
        "processes_per_node=0",
        "time=24:00:00",
        "timeout_min=24h",
        "slurm_time=1-0",
        "signal_delay_s=x",
        "array_parallelism=x",
    ],
)
def test_numbers_are_whole_numbers(word):
    key, value = word.split("=")
    with pytest.raises(CellError, match=f"slurm.{word}: give a whole number"):
        slurm.ranks_of({"timeout_min": "60", key: value})


@pytest.mark.parametrize("key", ["use_srun", "slurm_use_srun"])
def test_jobs_without_srun_are_refused(key):
    """submitit would take "false" for true; and without srun nobody hears --signal=USR1@180."""
    with pytest.raises(CellError, match=r"^slurm\.use_srun: jobs start through srun.* Leave slurm\.use_srun out$"):
        slurm.ranks_of({"timeout_min": "60", key: "false"})


def test_a_node_without_gpus_runs_one_process():
    assert slurm.ranks_of({"timeout_min": "60", "gpus_per_node": "0", "nodes": "2"}) == (2, 1)


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    with pytest.raises(CellError, match="no srun"):
        slurm.submit("name", tmp_path, [["true"]], {"timeout_min": "60"})


def test_a_job_needs_a_time_limit(tmp_path, on_path):
    on_path(sbatch="echo Submitted batch job 4711", srun="true")
    with pytest.raises(CellError, match=r"needs a time limit: slurm\.timeout_min="):
        slurm.submit("name", tmp_path, [["true"]], {"nodes": "2"})
    assert slurm.submit("name", tmp_path, [["true"]], {"time": "60"}) == ["4711"]
    assert slurm.ranks_of({"cluster": "local"}) == (1, 1)


@pytest.mark.parametrize("cluster", ["slurm", "local"])
@pytest.mark.parametrize("options", [{"mem_gb": "abc", "timeout_min": "5"}, {"foo": "1", "timeout_min": "5"}])
def test_a_wrong_option_is_one_line(tmp_path, monkeypatch, options, cluster):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: "/usr/bin/srun")
    monkeypatch.setattr("submitit.slurm.slurm.SlurmExecutor.affinity", lambda *_: 2)
    key, value = next(iter(options.items()))
    with pytest.raises(CellError, match=rf"slurm\.{key}={value}.*submitit"):
        slurm.submit("name", tmp_path, [["true"]], {**options, "cluster": cluster})


def test_what_sbatch_refuses_is_one_line(tmp_path, on_path):
    on_path(sbatch="echo sbatch: error: invalid partition >&2; echo sbatch: error: failed >&2; exit 1", srun="true")
    with pytest.raises(CellError, match=r"^launcher=slurm: sbatch: error: invalid partition; sbatch: error: failed$"):
        slurm.submit("name", tmp_path, [["true"]], {"timeout_min": "60", "partition": "gqu"})
    with pytest.raises(CellError, match=r"slurm\.additional_parameters=x: submitit refuses it"):
        slurm.submit("name", tmp_path, [["true"]], {"timeout_min": "60", "additional_parameters": "x"})
    (tmp_path / "file").touch()
    with pytest.raises(CellError, match=r"^launcher=slurm: .*file"):
        slurm.submit("name", tmp_path / "file", [["true"]], {"timeout_min": "60"})


@pytest.mark.parametrize("key", ["srun_args", "slurm_srun_args"])
def test_srun_gets_words(tmp_path, on_path, key):
    on_path(sbatch="echo Submitted batch job 4711", srun="true")
    options = {"timeout_min": "60", key: "--mpi=pmix --container-image='a b'"}
    slurm.submit("name", tmp_path, [["true"]], options)
    assert " --mpi=pmix '--container-image=a b' " in (tmp_path / "4711_submission.sh").read_text()
    assert " --mpi=pmix '--container-image=a b' " in slurm.described([[]], options)
    with pytest.raises(CellError, match=rf"^slurm\.{key}=--x='a: No closing quotation$"):
        slurm.submit("name", tmp_path, [["true"]], options | {key: "--x='a"})


@pytest.mark.parametrize("prefix", ["", "slurm_"])
def test_setup_and_teardown_are_lines_of_the_batch_script(tmp_path, on_path, prefix):
    on_path(sbatch="echo Submitted batch job 4711", srun="true")
    options = {"timeout_min": "60", f"{prefix}setup": "module load cuda\nulimit -n 9999", f"{prefix}teardown": "date"}
    slurm.submit("name", tmp_path, [["true"]], options)
    before, _, after = (tmp_path / "4711_submission.sh").read_text().partition("\nsrun ")
    assert "\nmodule load cuda\nulimit -n 9999\n" in before and after.endswith("\ndate")


@pytest.mark.parametrize("prefix", ["", "slurm_"])
def test_true_is_a_flag_and_false_none(tmp_path, on_path, prefix):
    on_path(sbatch="echo Submitted batch job 4711", srun="true")
    options = {"timeout_min": "60", f"{prefix}exclusive": "true", f"{prefix}overcommit": "False"}
    options |= {"stderr_to_stdout": "false"}
    slurm.submit("name", tmp_path, [["true"]], options)
    script = (tmp_path / "4711_submission.sh").read_text()
    assert "\n#SBATCH --exclusive\n" in script and "overcommit" not in script and "\n#SBATCH --error=" in script


def test_a_wrong_cluster_is_one_line(tmp_path):
    with pytest.raises(CellError, match=r"slurm\.cluster=foo: submitit refuses it"):
        slurm.submit("name", tmp_path, [["true"]], {"cluster": "foo"})


def test_launcher_words_are_taken_off_the_command_line():
    line = read_command_line(["seed=1", "launcher=slurm", "slurm.partition=gpu", "slurm.nodes=2"])
    assert line.overrides == ["seed=1"] and line.slurm == {"partition": "gpu", "nodes": "2"}
    assert read_command_line(["seed=1"]).slurm is None
    with pytest.raises(ConfigError, match="write launcher=slurm"):
        read_command_line(["launcher=slrum"])
    with pytest.raises(ConfigError, match=r"write slurm\.partition=\.\.\."):
        read_command_line(["launcher=slurm", "slurm.partition"])
    with pytest.raises(ConfigError, match="without launcher=slurm"):
        read_command_line(["slurm.partition=gpu"])


def test_a_dry_run_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ({}, {"cluster": "local"}, {"folder": "jobs/of/mine"}):
        slurm.described([[]], {"timeout_min": "60", **more})
    assert not list(tmp_path.iterdir())


def test_words_that_look_like_numbers_stay_as_they_are_typed():
    options = {"timeout_min": "60", "account": "007", "qos": "1e3", "reservation": "2024_11", "array_parallelism": "4"}
    given = slurm.read_options("x", options).parameters
    assert [given[f"slurm_{key}"] for key in options if key != "timeout_min"] == ["007", "1e3", "2024_11", 4]
