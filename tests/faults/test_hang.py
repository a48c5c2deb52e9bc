"""A rank that hangs, and a launcher that is killed: every process ends, and the message names the cause."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import wait_until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.faults
BODY = """
import os, sys, time
import torch
from training.ranks import distributed
from training.ranks.watchdog import Watchdog
ranks = distributed.setup("cpu")
open(f"{sys.argv[1]}/pid-{ranks.rank}", "w").write(str(os.getpid()))
with Watchdog(ranks, timeout_s=3) as watchdog:
    for step in range(10**6):
        time.sleep(0.05)
        if ranks.rank == 1 and step == 5 and sys.argv[2] == "hang":
            time.sleep(3600)  # as if reading data
        watchdog.beat(step, "training")
        ranks.sum(torch.ones(()))
"""


def launch(folder: Path, how: str) -> subprocess.Popen:
    worker = folder / "worker.py"
    worker.write_text(BODY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    return subprocess.Popen(
        [*command, str(folder), how],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ranks_alive(folder: Path) -> list[int]:
    pids = [int(path.read_text()) for path in folder.glob("pid-*")]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_hung_rank_is_named_and_everything_ends(tmp_path):
    process = launch(tmp_path, "hang")
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "made no progress for 3 s" in stderr
    assert "rank 1: step 4, training" in stderr and "rank 0: step 5, training" in stderr
    assert "rank 1 on " in stderr and "is furthest behind: look there first." in stderr
    assert stderr.count("This rank's stacks:") == 2 and 'worker.py", line 14' in stderr  # the line that hangs
    wait_until(lambda: not ranks_alive(tmp_path), 5)


def test_ranks_end_when_the_launcher_is_killed(tmp_path):
    process = launch(tmp_path, "run")
    wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 2 and len(ranks_alive(tmp_path)) == 2, 60)
    time.sleep(2)
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not ranks_alive(tmp_path), 15)
