"""What to say where `datasets` stops at a file: its errors name neither the file nor the column that differs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from base.files import shown


def is_of_the_data(error: BaseException) -> bool:
    """An error of contents, such as a value of another type, which another try will meet again. Everything else may be
    the network: which classes mean that differs between versions of the hub's client."""
    return isinstance(error, ValueError | TypeError | LookupError | ArithmeticError | EOFError) or (
        type(error).__module__.startswith("pyarrow") and not isinstance(error, OSError)
    )


def cause_of(error: BaseException) -> BaseException:
    """What went wrong below a DatasetGenerationError, which says nothing itself."""
    while error.__cause__ is not None and type(error).__module__.startswith("datasets"):
        error = error.__cause__
    return error


def unit_file(part: Any) -> str | None:
    """The file that a piece of a streamed data set is read from, where `datasets` tells."""
    examples = getattr(part, "_ex_iterable", None)
    while hasattr(examples, "ex_iterable"):
        examples = examples.ex_iterable
    options = getattr(examples, "kwargs", {})
    names = options.get("original_files") or options.get("files") or options.get("base_files") or []
    return str(names[0]) if len(names) == 1 and isinstance(names[0], str | Path) else None


def first_difference(files: Iterable[Path]) -> str:
    """Which local file can't be read, or has other columns or a column of another type than the first one of its kind;
    "" where none is found."""
    firsts: dict[str, tuple[Path, dict[str, str]]] = {}
    for path in files:
        columns = _columns(path)
        if columns is None:
            if path.suffix == ".parquet":
                return f"{shown(path)} is cut off or damaged"
            continue
        first, expected = firsts.setdefault(path.suffix, (path, columns))
        for name in sorted(columns.keys() | expected.keys()):
            here, there = columns.get(name, "missing"), expected.get(name, "missing")
            if here != there:
                return (
                    f"column {shown(name)} is {here} in {shown(path)} and {there} in {shown(first)}, and the files of "
                    "a data set need equal columns; data=text data.files=... reads local files whose other columns "
                    "differ"
                )
    return ""


def _columns(path: Path) -> dict[str, str] | None:
    """The types of a file's columns (of a JSON file's first megabyte); None where it can't be read."""
    try:
        import pyarrow.json
        import pyarrow.parquet

        if path.suffix == ".parquet":
            schema = pyarrow.parquet.read_schema(path)
        else:
            schema = pyarrow.json.open_json(path).schema
    except (ImportError, OSError, ValueError, pyarrow.ArrowException):
        return None
    return {field.name: str(field.type) for field in schema}
