"""Which errors become one line, and which keep their traceback."""

import errno
import os

import pytest
import torch

from base.files import disk_full_explained
from training.config import choice
from training.ranks.signals import RunLock
from training.records.runfolder import ROOM_FOR_RUNS
from training.start.failures import one_line_errors


def test_our_value_error_is_one_line_and_code_2(capsys):
    with one_line_errors() as outcome:
        choice("backend", "tritn", ("auto", "triton"))
    assert outcome.code == 2
    assert capsys.readouterr().err == (
        "train.py: error: backend=tritn: needs one of auto, triton; did you mean triton?\n"
    )


def test_what_the_machine_refuses_is_one_line_and_code_1(tmp_path, capsys):
    first = RunLock(tmp_path)
    first.acquire()
    with one_line_errors() as outcome:
        RunLock(tmp_path).acquire()
    assert outcome.code == 1
    message = capsys.readouterr().err
    assert "is in use by another process" in message and f"pid {os.getpid()}" in message and "run.name" in message


def test_full_disk_names_the_folder_and_the_way_out(tmp_path, capsys):
    """/dev/full is a disk without space."""
    with (
        one_line_errors() as outcome,
        disk_full_explained(tmp_path / "run", ROOM_FOR_RUNS),
        open("/dev/full", "w") as file,
    ):
        file.write("x")
        file.flush()
    assert outcome.code == 1
    message = capsys.readouterr().err
    assert str(tmp_path / "run") in message and "paths.runs" in message and len(message.splitlines()) == 1


def test_os_error_is_one_line(capsys):
    with one_line_errors() as outcome:
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/a/metrics.jsonl")
    assert outcome.code == 1
    assert capsys.readouterr().err == ("train.py: error: [Errno 28] No space left on device: '/runs/a/metrics.jsonl'\n")


def test_out_of_memory_says_what_to_change(capsys):
    with one_line_errors() as outcome:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    assert outcome.code == 1
    message = capsys.readouterr().err
    assert "batch.micro" in message and "Tried to allocate 2 GiB" in message and len(message.splitlines()) == 1


def test_errors_from_inside_libraries_keep_their_traceback():
    with pytest.raises(RuntimeError, match=r"same dtype|expected"), one_line_errors():
        torch.einsum("ij,jk->ik", torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int64)).backward()
    with pytest.raises(RuntimeError, match="cannot be multiplied"), one_line_errors():
        torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(KeyError), one_line_errors():
        {}["our own bug"]


def test_success_passes_its_code_through():
    with one_line_errors() as outcome:
        outcome.code = 75
    assert outcome.code == 75


def test_our_errors_are_told_without_their_sources(monkeypatch, capsys):
    """As in an installation of compiled files alone."""
    monkeypatch.setattr("linecache.getline", lambda *_: "")
    monkeypatch.setattr("linecache.getlines", lambda *_: [])
    with one_line_errors() as outcome:
        choice("backend", "tritn", ("auto", "triton"))
    assert outcome.code == 2 and "did you mean triton?" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_an_error_from_c_that_our_line_calls_keeps_its_traceback(error):
    call = {ValueError: lambda: int("x"), RuntimeError: lambda: torch.ones(2).view(3)}[error]
    with pytest.raises(error), one_line_errors():
        call()


GLOO = "[/pytorch/gloo/transport/tcp/pair.cc:{}] {}. This is typically caused by a remote worker."


def raised_in_c(text: str) -> None:
    exec(compile("raise RuntimeError(text)", "/gloo", "exec"), {"text": text})


@pytest.mark.parametrize(
    "text",
    [
        GLOO.format(553, "Connection closed by peer [127.0.0.1]:420"),
        GLOO.format(537, "Read error [127.0.0.1]:32640: Connection reset by peer"),
    ],
)
def test_a_rank_that_lost_another_says_so_in_one_line(text, capsys):
    """As torch words it. What the dead rank says would drown in the tracebacks of the others."""
    with one_line_errors() as outcome:
        raised_in_c(text)
    assert outcome.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "another rank" in line and "peer" in line and "last checkpoint" in line


def test_what_gloo_says_of_our_own_mistakes_keeps_its_traceback():
    with pytest.raises(RuntimeError), one_line_errors():
        raised_in_c(GLOO.format(1, "op.preamble.length <= op.nbytes"))
