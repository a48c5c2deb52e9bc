"""Full disk, read-only folder, damaged checkpoints, altered tokens, two processes: clear messages, nothing lost."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from forked import Ranks
from reading import differing_tensors, steps_of, train_rows

from training.checkpoint.manifest import checkpoints, latest_good, problems

pytestmark = pytest.mark.faults


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 96 MB: room for the 64 MB that a save wants to see free, and for a few checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def assert_same_run(folder: Path, straight: Path) -> None:
    assert train_rows(folder) == train_rows(straight)
    ends = [checkpoints(path / "checkpoints")[-1] for path in (straight, folder)]
    assert differing_tensors(*ends) == []


def kill_at(ranks: Ranks, folder: Path, step: int) -> None:
    while ranks.alive() and max([0, *steps_of(folder)]) < step:
        time.sleep(0.002)
    assert ranks.alive()
    ranks.kill([0])
    ranks.wait()


def good_names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder / "checkpoints") if not problems(path)]


def fill(disk: Path, leave_bytes: int) -> Path:
    ballast = disk / "ballast"
    size = shutil.disk_usage(disk).free - leave_bytes
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return ballast


def test_disk_too_full_before_a_save(overrides, small_disk, straight, tmp_path):
    """Seen in advance: one line that says how much is needed; with space again the same command goes on, bitwise."""
    command, log = overrides("full", runs=small_disk), tmp_path / "full.log"
    folder = small_disk / "full"
    ranks = Ranks(command, log)
    while not good_names(folder):
        time.sleep(0.002)
    ballast = fill(small_disk, 30_000_000)
    assert ranks.wait() == [1]
    assert "a checkpoint takes 0.07 GB, 0.03 GB are free" in log.read_text()
    assert "checkpoint.keep_last" in log.read_text() and "Traceback" not in log.read_text()
    assert good_names(folder)
    ballast.unlink()
    assert Ranks(command, log).wait() == [0]
    assert_same_run(folder, straight)


def test_disk_that_fills_up_during_a_save(overrides, small_disk, straight, tmp_path):
    """The free space was there when the save began (here: the check is off); ENOSPC comes from the write itself."""

    def no_check(rank):
        import training.checkpoint.state

        training.checkpoint.state.Checkpointer._check_space = lambda self, nbytes: None

    command, log = overrides("full", runs=small_disk), tmp_path / "full.log"
    folder = small_disk / "full"
    ranks = Ranks(command, log, patch=no_check)
    while not good_names(folder):
        time.sleep(0.002)
    ballast = fill(small_disk, 1_000_000)
    assert ranks.wait() == [1]
    assert "No space left on device" in log.read_text() and "Traceback" not in log.read_text()
    assert good_names(folder) and not list((folder / "checkpoints").glob(".tmp-*"))
    ballast.unlink()
    assert Ranks(command, log).wait() == [0]
    assert_same_run(folder, straight)


def test_read_only_folder_is_one_line_before_any_work(overrides, small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    log = tmp_path / "log"
    assert Ranks(overrides("run", runs=small_disk), log).wait() == [2]  # the command is to be changed
    assert f"paths.runs: can't make {small_disk}" in log.read_text() and "Read-only file system" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_checkpoint_folder_that_becomes_read_only(overrides, small_disk, straight, tmp_path):
    command, log = overrides("run"), tmp_path / "log"
    folder = tmp_path / "runs" / "run"
    ranks = Ranks(command, log)
    while not good_names(folder):
        time.sleep(0.002)
    # A disk can't be made read-only while the run holds its lock on it; this hides the folder behind one that is.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder / "checkpoints"], check=True)
    try:
        assert ranks.wait() == [1]
    finally:
        subprocess.run(["umount", "-l", folder / "checkpoints"], check=True)
    assert "Read-only file system" in log.read_text() and "Traceback" not in log.read_text()
    assert Ranks(command, log).wait() == [0]
    assert_same_run(folder, straight)


def newest_shard(folder: Path) -> Path:
    return checkpoints(folder / "checkpoints")[-1] / "shard_00000_00.safetensors"


def truncate(folder: Path) -> None:
    os.truncate(newest_shard(folder), 1000)


def flip_a_bit(folder: Path) -> None:
    data = bytearray(newest_shard(folder).read_bytes())
    data[len(data) // 2] ^= 4
    newest_shard(folder).write_bytes(data)


def lose_a_file(folder: Path) -> None:
    newest_shard(folder).unlink()


def plant_a_pickle(folder: Path) -> None:
    (newest_shard(folder).parent / ".metadata").write_bytes(b"\x80\x04\x95")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_a_file, plant_a_pickle])
def test_damaged_checkpoint_costs_one_interval_and_nothing_else(overrides, straight, tmp_path, damage):
    command, log = overrides("damaged"), tmp_path / "log"
    folder = tmp_path / "runs" / "damaged"
    kill_at(Ranks(command, log), folder, 8)
    newest = latest_good(folder)
    damage(folder)
    older = latest_good(folder, say=lambda text: None)
    assert older != newest
    assert Ranks(command, log).wait() == [0]
    assert f"checkpoint {newest} is damaged and skipped" in log.read_text()
    assert f"resuming from {older}" in log.read_text()
    assert_same_run(folder, straight)


def test_checkpoint_of_another_model_is_refused(overrides, straight, tmp_path):
    command, log = overrides("other"), tmp_path / "log"
    folder = tmp_path / "runs" / "other"
    bigger = overrides("bigger", "model.hidden=256", "steps=3")
    assert Ranks(bigger, tmp_path / "bigger.log").wait() == [0]
    kill_at(Ranks(command, log), folder, 5)
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(tmp_path / "runs" / "bigger" / "checkpoints", folder / "checkpoints")
    assert Ranks(command, log).wait() == [1]
    assert "belongs to a run with numerics hash" in log.read_text() and "Traceback" not in log.read_text()


def test_tokens_altered_while_training_stop_the_run_before_a_save(overrides, straight, tokens, tmp_path):
    private = tmp_path / "tokens"
    shutil.copytree(tokens, private)
    command = [f"paths.data={private}" if w.startswith("paths.data=") else w for w in overrides("altered")]
    log, folder = tmp_path / "log", tmp_path / "runs" / "altered"
    shard = next(private.rglob("train-0*.bin"))
    good = shard.read_bytes()
    ranks = Ranks(command, log)
    while not good_names(folder):
        time.sleep(0.002)
    with open(shard, "r+b") as file:  # valid token ids, only others
        file.write(good[100:300])
    assert ranks.wait() == [1]
    assert f"{shard} was altered while the run was reading it" in log.read_text() and "Traceback" not in log.read_text()
    shard.write_bytes(good)
    assert Ranks(command, log).wait() == [0]
    assert_same_run(folder, straight)


def test_second_process_in_the_same_folder_is_refused(overrides, straight, tmp_path):
    command, log = overrides("shared"), tmp_path / "log"
    first = Ranks(command, log)
    while not (tmp_path / "runs" / "shared" / "metrics.jsonl").exists():
        time.sleep(0.002)
    first.kill([0], signal.SIGSTOP)  # so that it can't finish before the second one looks
    second = Ranks(command, tmp_path / "second.log")
    assert second.wait() == [1]
    text = (tmp_path / "second.log").read_text()
    assert f"in use by another process (pid {first.pids[0]} on " in text and "run.name" in text
    first.kill([0], signal.SIGCONT)
    assert first.wait() == [0]
    assert_same_run(tmp_path / "runs" / "shared", straight)


def test_clock_that_jumps_changes_no_number(overrides, straight, tmp_path):
    def jumping(rank):
        real, calls = time.time, iter(range(10**9))
        time.time = lambda: real() + (-1) ** next(calls) * 86400.0

    assert Ranks(overrides("jump"), tmp_path / "log", patch=jumping).wait() == [0]
    assert_same_run(tmp_path / "runs" / "jump", straight)


def test_wandb_that_cannot_be_reached_does_not_stop_the_run(overrides, straight, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")

    def unreachable(rank):
        os.environ.update(WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40, WANDB_SILENT="true")

    log = tmp_path / "log"
    command = overrides("tracked", "logger.wandb.mode=online")
    assert Ranks(command, log, patch=unreachable).wait(240) == [0]
    assert "wandb is off for the rest of this run" in log.read_text()
    assert_same_run(tmp_path / "runs" / "tracked", straight)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 0)])
def test_signal_saves_and_ends_within_30_seconds(overrides, straight, tmp_path, number, code):
    command, log, folder = overrides("stopped"), tmp_path / "log", tmp_path / "runs" / "stopped"
    ranks = Ranks(command, log, world=2)
    while len(steps_of(folder)) < 4:
        time.sleep(0.002)
    begin = time.monotonic()
    ranks.kill([0, 1] if number == signal.SIGINT else [1], number)  # one rank's signal stops all of them together
    assert ranks.wait() == [code, code]
    assert time.monotonic() - begin < 30
    reached = max(steps_of(folder))
    assert reached < 12 and good_names(folder)[-1] == f"step_{reached:08d}"
