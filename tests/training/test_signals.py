"""Stop signals, exit codes, and one process per run folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from training.ranks.signals import EXIT_KILLED_BY_USER, INTERRUPT, PREEMPT, RunLock, StopFlag

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stop():
    flag = StopFlag()
    yield flag
    flag.restore()


@pytest.mark.parametrize(
    ("number", "level", "code"),
    [
        (signal.SIGINT, INTERRUPT, 0),
        (signal.SIGTERM, PREEMPT, 75),
        (signal.SIGUSR1, PREEMPT, 75),
        (signal.SIGHUP, PREEMPT, 75),
    ],
)
def test_signal_sets_the_level_and_the_exit_code(stop, number, level, code):
    assert stop.level == 0
    os.kill(os.getpid(), number)
    assert stop.level == level
    assert StopFlag.exit_code(stop.level) == code


def test_preemption_outranks_an_interrupt_in_any_order(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.level == PREEMPT


def test_a_closed_terminal_is_not_heard_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    flag = StopFlag()
    os.kill(os.getpid(), signal.SIGHUP)
    flag.restore()
    assert flag.level == 0 and signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    StopFlag().restore()
    assert signal.getsignal(signal.SIGTERM) is before


def child(body: str, *arguments: str) -> subprocess.Popen:
    text = f"import sys, time\nfrom training.ranks.signals import *\n{body}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-c", text, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("before", [None, signal.SIGTERM, signal.SIGUSR1])
def test_second_ctrl_c_ends_at_once(before):
    process = child("flag = StopFlag()\nprint('ready', flush=True)\nwhile True: time.sleep(0.01)")
    if before is not None:
        process.send_signal(before)
    process.send_signal(signal.SIGINT)
    while "Ctrl-C: saving after this batch" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == EXIT_KILLED_BY_USER
    assert "resumes from the last checkpoint" in process.stderr.read()


HOLDER = "lock = RunLock(sys.argv[1])\nlock.acquire()\nprint('ready', flush=True)\ntime.sleep(60)"


def test_second_process_is_refused_and_kill_9_frees_the_folder(tmp_path):
    process = child(HOLDER, str(tmp_path))
    with pytest.raises(RuntimeError, match=rf"in use by another process \(pid {process.pid} on .*run\.name"):
        RunLock(tmp_path).acquire()
    process.kill()
    process.wait()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_lock_can_be_taken_again_after_release(tmp_path):
    for _ in range(2):
        lock = RunLock(tmp_path)
        lock.acquire()
        with pytest.raises(RuntimeError, match="in use"):
            RunLock(tmp_path).acquire()
        lock.release()
