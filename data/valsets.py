"""Further texts that a run is evaluated on, by name: data.val_sets={web: FOLDER, code: FOLDER}."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from base.files import expanded
from data.spec import DataSpec
from data.tokens import TokenSet

NAME = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)  # part of a field's and of a folder's name


def folders(spec: DataSpec) -> dict[str, Path]:
    """name -> prepared token folder, of which the val side is scored. Raises ValueError for what is no such mapping,
    FileNotFoundError for a folder that isn't there."""
    if not spec.val_sets:
        return {}
    if not isinstance(spec.val_sets, Mapping):
        raise ValueError(
            f"data.val_sets={spec.val_sets}: needed are names and folders: 'data.val_sets={{web: FOLDER}}'"
        )
    found = {}
    for name, folder in spec.val_sets.items():
        if not NAME.fullmatch(str(name)):
            raise ValueError(
                f"data.val_sets: the name {name!r} must begin with a letter; letters, digits and . _ - follow"
            )
        path = Path(expanded(str(folder), f"data.val_sets.{name}"))
        if not (path / "manifest.json").is_file():
            raise FileNotFoundError(
                f"data.val_sets.{name}={folder} is no token folder (no manifest.json in it); make one with "
                "scripts/prepare_data.py"
            )
        found[str(name)] = path
    return found


def fingerprints(spec: DataSpec) -> dict[str, str]:
    """What each name stands for, for run.json."""
    return {
        name: json.loads((path / "manifest.json").read_text())["fingerprint"] for name, path in folders(spec).items()
    }


def open_val_sets(spec: DataSpec, tokens: TokenSet) -> dict[str, TokenSet]:
    """The named texts, which `tokens` is trained beside. Raises ValueError for another tokenizer than its."""
    sets = {name: TokenSet(path, verify=spec.verify) for name, path in folders(spec).items()}
    for name, other in sets.items():
        if (other.tokenizer_hash, other.bos_id) != (tokens.tokenizer_hash, tokens.bos_id):
            raise ValueError(
                f"data.val_sets.{name}: {other.path} has another tokenizer than {tokens.path}: prepare it again with "
                f"data.tokenizer={tokens.path}/tokenizer.json"
            )
    return sets
