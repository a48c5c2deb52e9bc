"""Output whose reader goes away, or whose encoding lacks a letter, ends no program."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = """
import sys, pathlib
from base.terminal import any_letters, outlive_readers
outlive_readers()
for i in range(2000):
    print("line", i, flush=True)
    print("warning", i, file=sys.stderr)
pathlib.Path(sys.argv[1]).write_text("done")
"""


def start(code: str, *words: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=environment, **options)


@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_goes_ends_nothing_and_is_noted_once(tmp_path, both):
    done, log = tmp_path / "done", tmp_path / "log"
    reading, writing = os.pipe()
    with open(log, "w") as file:
        process = start(LINES, str(done), stdout=writing, stderr=writing if both else file)
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    assert process.wait(timeout=60) == 0 and done.read_text() == "done"
    notes = [line for line in log.read_text().splitlines() if line.startswith("note:")]
    assert notes == [] if both else len(notes) == 1 and "standard output is dropped (Broken pipe)" in notes[0]


def test_a_full_disk_under_the_log_ends_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        process = start(LINES, str(tmp_path / "done"), stdout=full, stderr=subprocess.DEVNULL)
    assert process.wait(timeout=60) == 0 and (tmp_path / "done").exists()


BAR = """
import sys, pathlib
from base.terminal import outlive_readers
from training.records.console import Console
outlive_readers()
console = Console(True, 100)
row = {"ms_per_step": 1.0, "tokens_per_second": 1.0, "mfu": None, "loss": 1.0, "grad_norm": 1.0, "lr": 1.0}
pathlib.Path(sys.argv[1]).write_text("ready")
sys.stdin.readline()
for step in range(100):
    console.step({**row, "step": step})
    console.say("evaluated")
console.close()
pathlib.Path(sys.argv[1]).write_text("done")
"""


def test_a_closed_terminal_ends_no_progress_bar(tmp_path):
    import time

    terminal, side = pty.openpty()
    said = tmp_path / "said"
    process = start(BAR, str(said), stdin=subprocess.PIPE, stdout=side, stderr=subprocess.PIPE, env={"TERM": "xterm"})
    os.close(side)
    while not said.exists() and process.poll() is None:
        time.sleep(0.05)
    os.close(terminal)
    _, errors = process.communicate(b"go\n", timeout=60)
    assert process.returncode == 0 and said.read_text() == "done", errors.decode()
    assert b"standard output is dropped" in errors and b"Traceback" not in errors


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("prepare", ["outlive_readers", "quiet_pipes"])
def test_letters_that_a_terminal_lacks_are_escaped(encoding, prepare):
    code = f"from base.terminal import {prepare} as p; p(); print('run \\u0416\\u2014 ends')"
    process = start(code, stdout=subprocess.PIPE, env={"PYTHONIOENCODING": encoding})
    assert process.communicate(timeout=60)[0] == b"run \\u0416\\u2014 ends\n" and process.returncode == 0
