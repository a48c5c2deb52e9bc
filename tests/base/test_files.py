"""Locks, what is said where a file system has none, and what an atomic write will not replace."""

import errno
import os

import pytest

from base import files
from training.ranks.signals import RunLock


@pytest.fixture
def no_locks(monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(files.fcntl, "flock", flock)


def prepare(path):
    with files.locked(path):
        pass


@pytest.mark.parametrize("use", [prepare, lambda path: RunLock(path.parent).acquire()])
def test_a_file_system_without_locks_is_named_with_the_remedy(tmp_path, capsys, no_locks, use):
    path = tmp_path / ".lock"
    path.touch()
    with pytest.raises(OSError, match=r"no locks \(flock\).*-o flock.*paths\.runs and paths\.data") as caught:
        use(path)
    assert caught.value.filename == str(path) and caught.value.errno == errno.ENOSYS
    assert capsys.readouterr().err == ""  # nobody else is preparing


def test_who_waits_for_another_preparation_says_so(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    holder = os.open(path, os.O_CREAT | os.O_RDWR)
    files.flock(holder, files.fcntl.LOCK_EX)
    said = []

    def say(text):
        said.append(text)
        os.close(holder)  # done: the wait ends

    monkeypatch.setattr(files, "say", say)
    prepare(path)
    assert len(said) == 1 and said[0].startswith("another process is preparing the same data")


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(OSError, match="not a regular file"):
            files.write_text(path, "x")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_path_from_an_ascii_locale_is_written_as_it_came(tmp_path):
    files.write_text(tmp_path / "config.yaml", "files: m\udcc3\udcbc")
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "files: mü"


def test_paths_are_written_out_as_a_shell_would(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/fast")
    monkeypatch.delenv("NOWHERE", raising=False)
    for typed, meant in (("~/a", "/home/me/a"), ("$SCRATCH/a", "/fast/a"), ("x/${SCRATCH}", "x//fast"), ("a~b", "a~b")):
        assert files.expanded(typed, "paths.runs") == meant
    with pytest.raises(ValueError, match=r"paths\.runs=\$NOWHERE/a: the environment variable NOWHERE isn't set"):
        files.expanded("$NOWHERE/a", "paths.runs")
    with pytest.raises(ValueError, match=r"paths\.runs=~nobody-here/a: there is no user"):
        files.expanded("~nobody-here/a", "paths.runs")
    (tmp_path / "$NOWHERE").touch()
    assert files.expanded(f"{tmp_path}/$NOWHERE", "data.files") == f"{tmp_path}/$NOWHERE"
