"""From a DataSpec to a token folder: prepare() does the work, ensure() does it only where it is small.

root/<name>-<vocabulary>-<key>/ holds manifest.json, tokenizer.json, token_bytes.npy and for train and val the shards
and the document index. `key` names the sources' contents and every option that matters, so a changed source gives
another folder. While it is made the folder is called .<name>-...; the last step is its rename.
"""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from base.files import ROOM_FOR_TOKENS, disk_full_explained, expanded, json_hash, locked, make_folder, say, write_json
from data import valsets
from data.assemble import FORMAT, EmptySideError, assemble
from data.open import open_source
from data.parts import tokenize_source
from data.sources import Source
from data.spec import DataSpec, as_list, hydra_value
from data.split import group_of, is_val_by_hash, least_val_fraction, paper_choice
from data.tail import CutSource, cut_of
from data.tokenizer import TextTokenizer, tokenizer_file, train_bpe

# A training run prepares sources of up to this size on disk by itself: some ten seconds of one core. Above it the
# person should know that it happens (GPUs would wait for it).
SMALL_SOURCE_BYTES = 32_000_000
IsVal = Callable[[int, int], bool]


def ensure(spec: DataSpec, root: Path | str, seq_len: int | None = None) -> Path:
    """The token folder of `spec`, made now if its source is small; for a training run of sequences of `seq_len`.

    Raises FileNotFoundError with the command to type when the source is large and not yet prepared.
    """
    valsets.folders(spec)  # a wrong name is told before hours of work
    if spec.mix:
        spec.check()
        folders = [_token_folder(folder, "data.mix") for folder in spec.mixed_folders()]
        return folders[0]
    if spec.path:
        return _given(spec)
    with disk_full_explained(Path(root), ROOM_FOR_TOKENS):
        make_folder("paths.data", Path(root))
        wanted = _wanted(spec, Path(root))
    if wanted.folder.is_dir():
        return wanted.folder
    if wanted.train.size is None or wanted.train.size > SMALL_SOURCE_BYTES:
        size = "on the hub" if wanted.train.size is None else f"{wanted.train.size / 1e6:.0f} MB"
        raise FileNotFoundError(
            f"this text is not tokenized yet ({wanted.folder} does not exist) and it is large ({size}); "
            f"type this first:\n  {prepare_command(spec, Path(root), seq_len)}"
        )
    return prepare(spec, root)


def token_folder(spec: DataSpec, root: Path | str) -> Path:
    """Where the tokens of `spec` lie, or would lie; makes nothing. Raises ValueError where a source is missing, and
    NotRememberedError within only_remembered() where a file would have to be hashed or a revision asked for."""
    return _given(spec) if spec.path else _wanted(spec, Path(root)).folder


def prepare_command(spec: DataSpec, root: Path, seq_len: int | None = None) -> str:
    """The command line that prepares `spec` under `root`; packed rows, too, where the sequence length is known."""
    where = shlex.quote(f"paths.data={hydra_value(str(root))}")
    # Another length's layout is of no use to the run, which would then pack on one core while its GPUs wait.
    length = [f"batch.seq_len={seq_len}"] if seq_len and spec.packing == "bos_bestfit" else []
    return " ".join(["python scripts/prepare_data.py", *spec.overrides(), *length, where])


def prepare(spec: DataSpec, root: Path | str) -> Path:
    """Tokenize `spec`'s text into a folder under `root` and return the folder; verify it if it is there already.

    Can be killed at any moment and called again: finished parts are kept. Two calls at once do the work once.
    Raises ValueError for wrong options or data, RuntimeError for a full disk or a damaged folder.
    """
    if spec.mix:
        spec.check()
        for folder in spec.mixed_folders():
            _verify(_token_folder(folder, "data.mix"))
        return Path(spec.mixed_folders()[0])
    if spec.path:
        folder = _given(spec)
        _verify(folder)
        return folder
    with disk_full_explained(Path(root), ROOM_FOR_TOKENS):
        make_folder("paths.data", Path(root))
        wanted = _wanted(spec, Path(root))
        if wanted.folder.is_dir():  # without the lock: a finished folder may lie where nothing can be written
            _verify(wanted.folder)
            return wanted.folder
        with locked(wanted.root / f".lock-{wanted.key}"):
            if not wanted.folder.is_dir():
                _make(wanted)
    return wanted.folder


@dataclass
class _Wanted:
    spec: DataSpec
    root: Path
    train: Source
    val: Source | None
    sources: dict[str, Any]
    tokenizer: dict[str, Any]
    key: str

    @property
    def folder(self) -> Path:
        return self.root / f"{self.spec.name}-{self.tokenizer['vocab_size']}-{self.key}"


def _wanted(spec: DataSpec, root: Path) -> _Wanted:
    """Look at the sources (not into them) and derive the folder's name. Makes nothing."""
    spec.check()
    train = open_source(spec, root)
    val = open_source(spec, root, val=True) if as_list(spec.val_files) else None
    sources = {
        "train": train.fingerprint(),
        "val": val.fingerprint() if val else {"rule": spec.val_rule, "seed": spec.split_seed},
        "keys": [spec.text_key, spec.source_key, spec.id_key],
        "max_documents": spec.max_documents,
    }
    for option, side in (("data.files", sources["train"]), ("data.val_files", sources["val"])):
        if isinstance(side, list):
            _check_once(side, option)
    if val and isinstance(sources["train"], list):
        _check_disjoint(sources["train"], sources["val"])
    if not val and spec.val_rule == "hash":
        sources["val"]["fraction"] = spec.val_fraction
    # Options that came later are named only where they are used, so that older folders keep their names.
    sources |= {"bad_rows": spec.bad_rows} if spec.bad_rows != "error" else {}
    sources |= {"val_copies": spec.val_copies} if spec.val_copies != "keep" else {}
    tokenizer = _tokenizer_identity(spec, sources)
    key = json_hash([FORMAT, sources, tokenizer, spec.shard_tokens])[:12]
    return _Wanted(spec, root, train, val, sources, tokenizer, key)


def _check_once(files: list[dict[str, Any]], option: str) -> None:
    """Raise ValueError for contents given twice: rows without ids would lie in train and in val."""
    names: dict[str, str] = {}
    for entry in files:
        if entry["size"] and entry["sha256"] in names:
            raise ValueError(
                f"{option} has the contents of {names[entry['sha256']]} twice, the second time as {entry['file']}: "
                "give each text once (do two patterns find the same file?)"
            )
        names[entry["sha256"]] = entry["file"]


def _check_disjoint(train: list[dict[str, Any]], val: list[dict[str, Any]]) -> None:
    """Raise ValueError for a file on both sides. Its rows need no ids for that, which assemble() compares."""
    names = {entry["sha256"]: entry["file"] for entry in train}
    for entry in val:
        if entry["sha256"] in names:
            raise ValueError(
                f"{entry['file']} of data.val_files has the contents of {names[entry['sha256']]} of data.files: give "
                "validation text that isn't trained on, or leave data.val_files out (data.val_fraction is split off)"
            )


def _tokenizer_identity(spec: DataSpec, sources: dict[str, Any]) -> dict[str, Any]:
    if spec.tokenizer is None:
        return {"trained_on": json_hash(sources), "vocab_size": spec.vocab_size, "bytes": spec.tokenizer_train_bytes}
    given = TextTokenizer(tokenizer_file(spec.tokenizer), spec.bos)
    return {"hash": given.hash, "vocab_size": given.vocab_size, "bos": given.bos}


def _make(wanted: _Wanted) -> None:
    say(f"preparing {wanted.folder}")
    work = wanted.root / f".{wanted.folder.name}"
    (work / "parts").mkdir(parents=True, exist_ok=True)
    wanted = _cut_if_one_document(wanted)
    is_val = (lambda group, ordinal: False) if wanted.val else _val_rule(wanted, work)
    tokenizer = _tokenizer(wanted, work, is_val)
    parts = {"train": _tokenize(wanted, "train", is_val, tokenizer, work)}
    if wanted.val:
        parts["val"] = _tokenize(wanted, "val", lambda group, ordinal: True, tokenizer, work)
    _check_unchanged(wanted, work)
    manifest = _assembled(wanted, work, parts, tokenizer)
    manifest["source"] = wanted.sources
    manifest["tokenizer"]["made_by"] = wanted.tokenizer
    write_json(work / "manifest.json", manifest)
    shutil.rmtree(work / "parts")
    work.rename(wanted.folder)
    _report(wanted.folder, manifest)


def _assembled(wanted: _Wanted, work: Path, parts: dict[str, list[Path]], tokenizer: TextTokenizer) -> dict[str, Any]:
    """assemble(), and what to type where a side is empty."""
    spec = wanted.spec
    try:
        return assemble(work, parts, tokenizer, spec.shard_tokens, wanted.val is not None, spec.val_copies == "drop")
    except EmptySideError as error:
        remedy = "give data.val_files=..., another data.val_fraction, or more text"
        documents = np.fromfile(work / "train-documents.bin", "<i8").reshape(-1, 3)
        groups = set(documents[:, 2].tolist())
        if groups and wanted.val is None and spec.val_rule == "hash":
            remedy = f"type data.val_fraction={least_val_fraction(spec, groups)}, or give data.val_files=..."
        if len(groups) < len(documents):
            remedy += f"; its {len(documents)} rows have {len(groups)} ids (data.id_key=null: each is its own document)"
        raise ValueError(f"{error}: {remedy}") from None


def _check_unchanged(wanted: _Wanted, work: Path) -> None:
    """Raise RuntimeError if a source file was altered meanwhile: the folder would be named after another text."""
    for source, before in ((wanted.train, wanted.sources["train"]), (wanted.val, wanted.sources["val"])):
        if not isinstance(before, list):
            continue
        for old, new in zip(before, source.fingerprint(), strict=True):
            if old != new:
                shutil.rmtree(work)
                raise RuntimeError(f"{old['file']} was altered while it was read: run the same command again")


def _tokenize(wanted: _Wanted, role: str, is_val: IsVal, tokenizer: TextTokenizer, work: Path) -> list[Path]:
    source = wanted.val if role == "val" else wanted.train
    limit = wanted.spec.max_documents if role == "train" else 0
    return tokenize_source(source, role, is_val, tokenizer, work / "parts", wanted.spec.workers, limit)


def _cut_if_one_document(wanted: _Wanted) -> _Wanted:
    """What is wanted of a text that can't be split by documents, with a source that cuts it; else as it is."""
    spec = wanted.spec
    if wanted.val or spec.val_rule != "hash" or spec.max_documents or spec.source == "tokens":
        return wanted
    train = cut_of(wanted.train, spec.val_fraction)
    if train is None:
        return wanted
    say(f"the text is one document: its last part (data.val_fraction={spec.val_fraction}) is validation")
    return replace(wanted, train=train)


def _val_rule(wanted: _Wanted, work: Path) -> IsVal:
    """The function (group, row number) -> is it validation? Kept on disk where it takes a pass over the text."""
    spec = wanted.spec
    if isinstance(wanted.train, CutSource):
        tail = wanted.train.tail_group
        return lambda group, ordinal: group == tail
    if spec.val_rule == "hash":
        return lambda group, ordinal: is_val_by_hash(spec, group)
    file = work / "parts" / "val.json"
    if not file.exists():
        groups = (group for _, group in _train_rows(wanted))
        write_json(file, paper_choice(spec, lambda: groups, wanted.train.row_count()))
    chosen = set(json.loads(file.read_text()))
    return lambda group, ordinal: (ordinal if spec.id_key is None else group) in chosen


def _train_rows(wanted: _Wanted) -> Iterator[tuple[str, int]]:
    """(text, group) of every train row, in order."""
    rows = (row for unit in range(wanted.train.units) for row in wanted.train.rows(unit, 0))
    for ordinal, row in enumerate(islice(rows, wanted.spec.max_documents or None)):
        yield row.text, group_of(row, "train", ordinal)


def _tokenizer(wanted: _Wanted, work: Path, is_val: IsVal) -> TextTokenizer:
    """Copy the given tokenizer, or the one trained for these sources (kept under root/tokenizers), into the folder."""
    if wanted.spec.tokenizer is not None:
        file = tokenizer_file(wanted.spec.tokenizer)
    else:
        file = wanted.root / "tokenizers" / f"bpe-{wanted.spec.vocab_size}-{json_hash(wanted.tokenizer)[:12]}.json"
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            texts = (text for i, (text, group) in enumerate(_train_rows(wanted)) if not is_val(group, i))
            train_bpe(texts, wanted.spec.vocab_size, wanted.spec.tokenizer_train_bytes, file)
    shutil.copyfile(file, work / "tokenizer.json")
    return TextTokenizer(work / "tokenizer.json", wanted.spec.bos)


def _given(spec: DataSpec) -> Path:
    return _token_folder(expanded(spec.path, "data.path"), "data.path")


def _token_folder(name: str, option: str) -> Path:
    if not Path(name, "manifest.json").is_file():
        raise FileNotFoundError(
            f"{option}={name} is no token folder (no manifest.json in it); make one with scripts/prepare_data.py"
        )
    return Path(name)


def _verify(folder: Path) -> None:
    from data.tokens import TokenSet  # here, so that tokenizing processes start without what TokenSet needs

    tokens = TokenSet(folder, verify=True)
    say(f"{folder} is complete; all checksums agree")
    _report(folder, tokens.manifest)


def _report(folder: Path, manifest: dict[str, Any]) -> None:
    for name, split in manifest["splits"].items():
        say(
            f"{name}: {split['tokens']:,} tokens, {split['documents']:,} documents, {split['bytes']:,} bytes of text "
            f"({split['bytes'] / split['tokens']:.3f} a token), {len(split['shards'])} shards"
        )
    for line in _remarks(manifest):
        say(f"  {line}")
    say(f"tokenizer {manifest['tokenizer']['hash'][:12]}, data {manifest['fingerprint'][:12]}: {folder}")


def _remarks(manifest: dict[str, Any]) -> Iterator[str]:
    """What a reader of results should know of the text."""
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    if lossy := val.get("lossy_documents", val["inexact_documents"]):
        yield (
            f"{lossy:,} validation documents don't survive the tokenizer unchanged: bits per byte are approximate, and "
            "are marked with ~"
        )
    if copies := train.get("copies_of_val"):
        what = f"{copies:,} train rows ({train['copies_of_val_bytes']:,} bytes) have the text of a validation row"
        if train["copies_dropped"]:
            yield f"{what} and were left out"
        else:
            yield f"{what}: the validation loss will look too good; data.val_copies=drop leaves them out"
    for role, count in manifest.get("bad_rows", {}).items():
        if count:
            yield f"{count:,} rows of the {role} text could not be read and were left out"
