"""How a rank's process begins and ends."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from training.ranks import distributed

BODY = """
import atexit, sys
from training.ranks.distributed import leave
class Late:
    def __del__(self):
        print("finalized")
late = Late()
atexit.register(print, "handlers ran")
sys.stdout.write("not yet flushed, ")
leave(75)
print("alone")
"""


ROOT = Path(__file__).parents[2]


def run(world: str) -> subprocess.CompletedProcess:
    command, environment = [sys.executable, "-c", BODY], {**os.environ, "WORLD_SIZE": world}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_a_rank_ends_with_its_code_and_handlers_but_without_finalization():
    done = run("2")
    assert done.returncode == 75, done.stderr
    assert done.stdout == "not yet flushed, handlers ran\n"


def test_a_process_alone_goes_on_to_its_usual_end():
    done = run("1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "not yet flushed, alone\nhandlers ran\nfinalized\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_nobody_joins_ends_in_one_line(monkeypatch, capfd, rank):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ours = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    for name, value in (ours | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "JOIN_S", 1)
    monkeypatch.setattr(distributed, "WORD_AFTER_S", 0.2)
    with pytest.raises(RuntimeError, match=f"rank {rank} of 2 .*127.0.0.1:{port}.*unset WORLD_SIZE") as caught:
        distributed.setup("cpu")
    assert "\n" not in str(caught.value)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and f"rank {rank} of 2 waits" in said[0]


def test_train_refuses_half_of_the_variables_before_any_work(tmp_path):
    environment = {**os.environ, "WORLD_SIZE": "x"}  # which the process's end reads, too
    command = [sys.executable, "train.py", "model=llama_tiny", "data=text", "data.files=absent"]
    command.append(f"paths.runs={tmp_path}/runs")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "WORLD_SIZE is no" in line
    assert not (tmp_path / "runs").exists()
