"""SHA-256 of files, remembered by what the file system says of them: path, size, both times and inode.

Hashing a corpus takes minutes, asking for its size and times takes none. A file that was changed and given its old
size and modification time back has another ctime, which nobody can set.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from base.files import sha256_of, write_json

NAME = "fingerprints.json"
_MAY_HASH = ContextVar("may_hash", default=True)


class NotRememberedError(LookupError):
    """The contents of a file are not known without reading it, and they may not be read here."""


@contextmanager
def only_remembered() -> Iterator[None]:
    """Within it nothing is hashed or fetched: NotRememberedError where that would be needed."""
    token = _MAY_HASH.set(False)
    try:
        yield
    finally:
        _MAY_HASH.reset(token)


def may_hash(what: str) -> None:
    """NotRememberedError, naming `what` would have to be read, within only_remembered()."""
    if not _MAY_HASH.get():
        raise NotRememberedError(what)


def sums(paths: Iterable[Path], root: Path) -> list[str]:
    """SHA-256 of the files' contents, remembered in root/fingerprints.json where that can be written."""
    cache = _remembered(root / NAME)
    known, found = dict(cache), []
    for path in paths:
        at = path.stat()
        key = f"{path.resolve()}|{at.st_size}|{at.st_mtime_ns}|{at.st_ctime_ns}|{at.st_ino}"
        if key not in cache:
            may_hash(str(path))
            cache[key] = sha256_of(path)
        found.append(cache[key])
    if cache != known:
        root.mkdir(parents=True, exist_ok=True)
    if cache != known and os.access(root, os.W_OK):  # prepared folders may lie where nothing can be written
        write_json(root / NAME, cache)
    return found


def _remembered(path: Path) -> dict[str, str]:
    """The sums in `path`; none where it is missing or damaged: they are only made again."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
