"""Small file helpers: checksums, atomic writes, a lock between processes, and a clear word when the disk is full."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_VARIABLE = re.compile(r"\$\{?(\w+)\}?", re.ASCII)
ROOM_FOR_TOKENS = (
    "Token shards take about 0.5 bytes per byte of text, twice that while they are made. Free some space or set "
    "paths.data to another disk, then run the same command again: finished parts are kept"
)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's contents."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def code_hash(folders: Iterable[Path], *suffixes: str) -> str:
    """Hex SHA-256 of the files in `folders` and below whose names end so, in the order of folders and then of paths."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in suffixes:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; rename it to `path` when the block ends without an error, else remove it.

    The contents are on disk before the rename, so a reader sees the whole file or none, also after a power cut.
    Raises OSError, also for a device or a pipe: root would replace /dev/null by a file.
    """
    if path.is_char_device() or path.is_fifo():
        raise OSError(errno.EINVAL, "not a regular file; give a file's name", str(path))
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if str(error.filename) == str(temporary):
            error.filename = str(path)  # the one that the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Bytes of a path that an ASCII locale couldn't decode are written as they came."""
    with atomic_write(path) as handle:
        handle.write(text.encode(errors="surrogateescape"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON-able value atomically, one key a line."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def shown(name: Any) -> str:
    """A path or another name as one printable line: a line feed or an escape in it would steer the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


def expanded(path: str, key: str) -> str:
    """A path as a shell would have read it without quotation marks: ~, $NAME and ${NAME} written out. A path that
    exists is itself. Raises ValueError, with the option's name, for a user or a variable that isn't there."""
    if not path or os.path.lexists(path):
        return path
    whole = os.path.expandvars(os.path.expanduser(path))
    if whole.startswith("~"):
        raise ValueError(f"{key}={path}: there is no user {whole.split('/')[0]}")
    if unset := _VARIABLE.search(whole):
        raise ValueError(f"{key}={path}: the environment variable {unset[1]} isn't set")
    return whole


def glob_paths(pattern: str) -> list[Path]:
    """The files and folders that a pattern means, sorted. What exists is itself, also with * ? or [ in its name."""
    if os.path.lexists(pattern):
        return [Path(pattern)]
    known = next(folder for folder in Path(pattern).parents if os.path.exists(folder))
    found = glob.glob(str(Path(pattern).relative_to(known)), root_dir=known, recursive=True)
    return [known / name for name in sorted(found)]


def flock(descriptor: int, how: int) -> None:
    """fcntl.flock, with a word on what to do where the file system has no locks (Lustre mounted without them).

    Raises BlockingIOError if another process has the lock and `how` doesn't wait, OSError.
    """
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        reason = (
            "this file system has no locks (flock), and without them two processes may write one folder; have it "
            "mounted with them (Lustre: -o flock), or set paths.runs and paths.data to another one"
        )
        raise OSError(error.errno, reason, os.readlink(f"/proc/self/fd/{descriptor}")) from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; waits (and says so once) while another process holds it.

    The kernel frees the lock when its holder dies, kill -9 included, so a lock file left behind means nothing.
    """
    with open(path, "a") as handle:
        try:
            flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is preparing the same data; waiting for it ({path})")
            flock(handle.fileno(), fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def disk_full_explained(root: Path, remedy: str) -> Iterator[None]:
    """Turn "no space left on device", which names no file, into a RuntimeError that says where, and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
        free = os.statvfs(there).f_bavail * os.statvfs(there).f_frsize
        raise RuntimeError(f"the disk that holds {root} is full ({free / 1e6:.0f} MB free). {remedy}") from error


def make_folder(key: str, folder: Path) -> None:
    """mkdir -p. Raises ValueError that names the option `key` where nothing can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # disk_full_explained
        raise ValueError(f"{key}: can't make {folder} ({error.strerror}); set {key} to where you can write") from error


def say(text: str) -> None:
    """One line for the person who watches; standard error, so that output stays clean."""
    print(text, file=sys.stderr, flush=True)
