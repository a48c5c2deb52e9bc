"""How a rank's process ends."""

import os
import subprocess
import sys
from pathlib import Path

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


def run(world: str) -> subprocess.CompletedProcess:
    command, environment = [sys.executable, "-c", BODY], {**os.environ, "WORLD_SIZE": world}
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)


def test_a_rank_ends_with_its_code_and_handlers_but_without_finalization():
    done = run("2")
    assert done.returncode == 75, done.stderr
    assert done.stdout == "not yet flushed, handlers ran\n"


def test_a_process_alone_goes_on_to_its_usual_end():
    done = run("1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "not yet flushed, alone\nhandlers ran\nfinalized\n"
