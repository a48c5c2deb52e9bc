"""Text from Hugging Face `datasets`: a hub name, a local dataset folder, or a packaged loader over local files.

Never runs code from the hub (`trust_remote_code` is not passed, and current `datasets` versions refuse scripts).
"""

import glob
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from base.files import expanded, shown
from base.fingerprints import may_hash
from data.schemas import cause_of, first_difference, is_of_the_data, unit_file
from data.sources import Row, checked_row, expand_any, file_fingerprints, make_row
from data.spec import DataSpec, as_list

_PACKAGED = ("json", "parquet", "text", "csv", "arrow")


class HubSource:
    """A split of a data set, one unit per file of it, so that a killed preparation does not read them again."""

    def __init__(self, spec: DataSpec, root: Path):
        files = [expanded(name, "data.hub_data_files") for name in as_list(spec.hub_data_files)]
        hub_path = expanded(spec.hub_path, "data.hub_path")
        self.spec, self.root = replace(spec, hub_path=hub_path, hub_data_files=files or None), root
        self.size = None
        self._unit = 0

    @cached_property
    def _dataset(self) -> Any:
        """Opened when rows are needed: to find a token folder that is there already takes no data set."""
        return _load(self.spec)

    @cached_property
    def units(self) -> int:
        """Number of pieces, one per file."""
        return max(self._dataset.num_shards, 1)

    def fingerprint(self) -> dict[str, Any]:
        """Name, configuration, split and the exact revision; for local data the files' SHA-256 instead."""
        spec = self.spec
        what = {"name": spec.hub_name, "split": spec.hub_split}
        local = _local_files(spec)
        if local:
            if spec.hub_path in _PACKAGED:  # its files are the ones listed; their folder is not part of what they say
                what |= {"loader": spec.hub_path}
            else:
                what |= {"loader": "folder", "data_files": as_list(spec.hub_data_files)}
            return {**what, "files": file_fingerprints(local, self.root)}
        may_hash(f"the revision of {spec.hub_path}")
        return {**what, "path": spec.hub_path, "revision": _revision(spec), "data_files": as_list(spec.hub_data_files)}

    def row_count(self) -> int | None:
        """Rows of the split as the data set's own description has them, or None."""
        splits = getattr(self._dataset.info, "splits", None) or {}
        return splits[self.spec.hub_split].num_examples if self.spec.hub_split in splits else None

    def progress(self) -> float | None:
        """Share of the units begun."""
        return self._unit / self.units

    def rows(self, unit: int, skip: int) -> Iterator[Row]:
        """Rows of one file of the data set after the first `skip`."""
        self._unit = unit
        part = self._dataset.shard(num_shards=self.units, index=unit) if self.units > 1 else self._dataset
        where = shown(unit_file(part) or f"{self.spec.hub_path}, unit {unit}")
        for number, row in enumerate(_unbroken(part.skip(skip) if skip else part, self.spec, where), skip + 1):
            yield checked_row(partial(make_row, row, self.spec, f"{where}, row {number}"), self.spec)


def _unbroken(rows: Any, spec: DataSpec, where: str) -> Iterator[dict[str, Any]]:
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            if is_of_the_data(cause_of(error)):
                raise ValueError(_unreadable(error, spec, where)) from error
            raise RuntimeError(
                f"reading {spec.hub_path} failed ({type(error).__name__}: {error}); where it was the network, run the "
                "same command again to go on: finished parts are kept"
            ) from error
        yield row


def _unreadable(error: BaseException, spec: DataSpec, where: str) -> str:
    """One line that names the file and, where files differ, the column."""
    reason = " ".join(str(cause_of(error)).split()) or repr(cause_of(error))
    differing = first_difference(_local_files(spec))
    return f"{where}: {type(cause_of(error)).__name__}: {reason}" + (f"; {differing}" if differing else "")


def _load(spec: DataSpec) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError("data.source=hub needs `datasets`: pip install 'nibble-train[hub]'") from error
    if Path(spec.hub_path, "state.json").is_file():  # a folder that save_to_disk wrote
        if spec.hub_name or spec.hub_data_files or spec.hub_split != "train":
            raise ValueError(
                f"data.hub_path={spec.hub_path} is one split that save_to_disk wrote, read as it is: leave out "
                "data.hub_name, data.hub_split and data.hub_data_files, or name the folder of another split"
            )
        return datasets.load_from_disk(spec.hub_path).to_iterable_dataset()
    options = {"data_files": _data_files(spec)} if spec.hub_data_files else {}
    try:
        loaded = datasets.load_dataset(
            spec.hub_path,
            spec.hub_name,
            split=spec.hub_split,
            revision=spec.hub_revision,
            streaming=spec.hub_streaming,
            **options,
        )
    except Exception as error:  # it looks into the first file: a cut off one gives EOFError, and so on
        what = (
            f"datasets could not open data.hub_path={spec.hub_path} (hub_name={spec.hub_name}, "
            f"hub_split={spec.hub_split}, hub_data_files={spec.hub_data_files})"
        )
        raise ValueError(_unreadable(error, spec, what)) from error
    return loaded if spec.hub_streaming else loaded.to_iterable_dataset()


def _data_files(spec: DataSpec) -> list[str]:
    """The names for `datasets`, which takes them for globs: what exists is named as it is."""
    return [glob.escape(name) if os.path.exists(name) else name for name in as_list(spec.hub_data_files)]


def _local_files(spec: DataSpec) -> list[Path]:
    """The local files that the data set is made of; [] if it comes from the hub."""
    folder = Path(spec.hub_path)
    if folder.is_dir():
        return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    names = as_list(spec.hub_data_files)
    if spec.hub_path in _PACKAGED and names and not any("://" in name for name in names):
        return expand_any(names, "data.hub_data_files")
    return []


def _revision(spec: DataSpec) -> str:
    """The commit behind the revision: a branch moves, and another text must give another token folder."""
    if spec.hub_revision and len(spec.hub_revision) == 40:
        return spec.hub_revision
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(spec.hub_path, revision=spec.hub_revision).sha
    except Exception as error:  # which classes mean "network" differs between versions of the hub's client
        raise RuntimeError(
            f"could not ask the hub which commit {spec.hub_path} is at ({type(error).__name__}: {error}); when "
            "offline, name the prepared folder, data.path=... (a grid's cell keeps its name and resumes), or give the "
            "commit, data.hub_revision=<40 hex digits>"
        ) from error
