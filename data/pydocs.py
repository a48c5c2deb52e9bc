"""The English text that every Python ships: `pydoc_data.topics` and the standard library's docstrings, about 2 MB.

Read from source files with `ast`: nothing is imported or downloaded, and a given Python gives the same text each time.
"""

import ast
import os
import platform
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from base.files import json_hash
from data.sources import Row

_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "lib2to3", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class PydocsSource:
    """One document per documentation topic and per standard library module; a single unit."""

    units = 1
    size = 0  # nothing to fetch: always small

    def __init__(self) -> None:
        self.root = Path(sysconfig.get_paths()["stdlib"])
        self.paths = sorted(_modules(self.root))
        self._read = 0
        self._texts: dict[Path, str] = {}  # the text is read twice, for the tokenizer and the tokens; parsing takes 4 s

    def fingerprint(self) -> dict[str, str]:
        """Python's version and the names and sizes of the modules that are read (parsing them takes seconds)."""
        listing = [(p.relative_to(self.root).as_posix(), p.stat().st_size) for p in self.paths]
        return {
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "files": json_hash(listing),
        }

    def row_count(self) -> int | None:
        """Unknown before the modules are parsed: one without a docstring is left out."""
        return None

    def progress(self) -> float | None:
        """Share of the modules read."""
        return self._read / max(len(self.paths), 1)

    def rows(self, unit: int, skip: int) -> Iterator[Row]:
        """Topics first, by name; then modules, by path."""
        return islice(self._rows(), skip, None)

    def _rows(self) -> Iterator[Row]:
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield Row(topics[name].strip() + "\n", "pydoc", name)
        for number, path in enumerate(self.paths, 1):
            self._read = number
            if path not in self._texts:
                self._texts[path] = module_text(path)
            if self._texts[path]:
                yield Row(self._texts[path], "stdlib", path.relative_to(self.root).as_posix())


def _modules(root: Path) -> Iterator[Path]:
    """Without a look at what is left out: installed packages lie there, a hundred times as many files."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_PROSE]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def module_text(path: Path) -> str:
    """The docstrings of a module in source order, each under the name of what it documents; "" if there is none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a few files of the library are not meant to be parsed
        return ""
    found = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED) and ast.get_docstring(node)]
    found.sort(key=lambda node: getattr(node, "lineno", 0))
    parts = [f"{getattr(node, 'name', path.stem)}\n\n{ast.get_docstring(node)}\n" for node in found]
    return "\n".join(parts)
