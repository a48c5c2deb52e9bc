"""The source that a data section names."""

from pathlib import Path

from data.hub import HubSource
from data.ids import IdSource
from data.pydocs import PydocsSource
from data.sources import FileSource, Source
from data.spec import DataSpec, as_list


def open_source(spec: DataSpec, root: Path, val: bool = False) -> Source:
    """The source that `spec` describes (its val_files if `val`). Raises ValueError when a file is missing."""
    if val or spec.source in ("files", "tokens"):
        kind = IdSource if spec.source == "tokens" else FileSource
        return kind(as_list(spec.val_files if val else spec.files), spec, root, "val_files" if val else "files")
    if spec.source == "pydocs":
        return PydocsSource()
    return HubSource(spec, root)
