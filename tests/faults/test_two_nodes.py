"""Two nodes on one machine: two torchrun agents that meet by c10d, one rank each over gloo, and an elastic restart."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from reading import steps_of, train_rows
from support import wait_until

from base.processes import descendants, kill_tree
from base.runfolder import read_metrics

# 99 s on two busy cores: two agents, three starts of two ranks. By hand: pytest -m slow tests/faults/test_two_nodes.py
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def agents(words: list[str], log: Path) -> list[subprocess.Popen]:
    """torchrun as it is started on each of two nodes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = [f"--rdzv-endpoint=localhost:{port}", "--rdzv-backend=c10d", f"--rdzv-id={port}", "--nnodes=2"]
    command = [sys.executable, "-m", "launcher.torchrun", *meeting, "--nproc-per-node=1", "--max-restarts=3"]
    with open(log, "ab") as out:
        return [
            subprocess.Popen([*command, "train.py", *words], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
            for _ in range(2)
        ]  # fmt: skip


def finish(started: list[subprocess.Popen], log: Path) -> None:
    try:
        assert [agent.wait(timeout=240) for agent in started] == [0, 0], log.read_text()[-3000:]
    finally:
        for agent in started:
            kill_tree(agent, signal.SIGKILL)


def test_a_killed_rank_restarts_both_nodes_and_the_curve_is_that_of_no_fault(overrides, tmp_path):
    words = ["parallel=fsdp", "checkpoint.asynchronous=false"]
    log = tmp_path / "log"
    finish(agents(overrides("straight", *words), log), log)
    started = agents(overrides("faulty", *words), log)
    folder = tmp_path / "runs" / "faulty"
    wait_until(lambda: max([0, *steps_of(folder)]) >= 5, limit_s=120)
    (rank,) = descendants(started[1].pid)[:1]
    os.kill(rank, signal.SIGKILL)
    finish(started, log)
    rows = train_rows(folder)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows == train_rows(tmp_path / "runs" / "straight")
    events = [row["event"] for row in read_metrics(folder) if row["kind"] == "event"]
    assert "resume" in events and events[-1] == "finish"
