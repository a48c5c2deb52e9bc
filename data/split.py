"""Which documents are validation. Rows are grouped by (source, id) first: no document is on both sides."""

import hashlib
from collections.abc import Callable, Iterable
from math import ceil

import numpy as np

from data.sources import Row
from data.spec import PAPER_VAL_FRACTION, DataSpec

_SIXTY_THREE_BITS = (1 << 63) - 1


def group_of(row: Row, role: str, ordinal: int) -> int:
    """63-bit name of the row's document: a hash of (source, id), or of (role, row number) when the row has no id."""
    parts = ("id", row.source, row.id) if row.id is not None else ("row", role, str(ordinal))
    return _hash64("\0".join(parts)) & _SIXTY_THREE_BITS


def val_rule(spec: DataSpec, groups: Callable[[], Iterable[int]], row_count: int | None) -> Callable[[int, int], bool]:
    """The function (group, row number) -> is it validation?

    hash: a seeded hash of the group below val_fraction; needs to know nothing else, so it never changes for a document
    when more text is added. paper: `datasets`' train_test_split(test_size=0.0005, seed=2357) over documents in the
    order of their first row, which needs their number: `row_count` where each row is a document and the source knows
    it, else one pass over the source, `groups()`.
    """
    if spec.val_rule == "hash":
        limit = int(spec.val_fraction * 2**64)
        return lambda group, ordinal: _hash64(f"{spec.split_seed}\0{group}") < limit
    if spec.id_key is None:
        count = min(row_count, spec.max_documents or row_count) if row_count else sum(1 for _ in groups())
        rows = set(paper_val_documents(count, spec.split_seed).tolist())
        return lambda group, ordinal: ordinal in rows
    documents = list(dict.fromkeys(groups()))
    chosen = {documents[i] for i in paper_val_documents(len(documents), spec.split_seed)}
    return lambda group, ordinal: group in chosen


def paper_val_documents(count: int, seed: int) -> np.ndarray:
    """Indices of the validation documents among `count`: what `datasets`' train_test_split puts in its test part."""
    return np.random.default_rng(seed).permutation(count)[: ceil(PAPER_VAL_FRACTION * count)]


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
