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


def text_name(text: str) -> int:
    """63-bit name of a text, to find copies of it; spaces and line ends around it don't count."""
    return _hash64(text.strip()) & _SIXTY_THREE_BITS


def ids_name(ids: np.ndarray) -> int:
    """63-bit name of a document that is known by its token ids."""
    return int.from_bytes(hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8).digest(), "little") >> 1


def is_val_by_hash(spec: DataSpec, group: int) -> bool:
    """The hash rule: a seeded hash of the document below val_fraction.

    It needs to know nothing else, so a document keeps its side when more text is added.
    """
    return _draw(spec, group) < int(spec.val_fraction * 2**64)


def least_val_fraction(spec: DataSpec, groups: Iterable[int]) -> float:
    """The smallest data.val_fraction, to three digits, with which the hash rule takes one of these documents."""
    return ceil(1000 * (min(_draw(spec, group) for group in groups) + 1) / 2**64) / 1000


def _draw(spec: DataSpec, group: int) -> int:
    return _hash64(f"{spec.split_seed}\0{group}")


def paper_choice(spec: DataSpec, groups: Callable[[], Iterable[int]], row_count: int | None) -> list[int]:
    """The paper's rule: the row numbers (where each row is a document, id_key None) or groups that are validation.

    `datasets`' train_test_split(test_size=0.0005, seed=2357) over documents in the order of their first row. Needs
    their number: `row_count` where each row is a document and the source knows it, else one pass over the source,
    `groups()`.
    """
    if spec.id_key is None:
        count = min(row_count, spec.max_documents or row_count) if row_count else sum(1 for _ in groups())
        return paper_val_documents(count, spec.split_seed).tolist()
    documents = list(dict.fromkeys(groups()))
    return [documents[i] for i in paper_val_documents(len(documents), spec.split_seed)]


def paper_val_documents(count: int, seed: int) -> np.ndarray:
    """Indices of the validation documents among `count`: what `datasets`' train_test_split puts in its test part."""
    return np.random.default_rng(seed).permutation(count)[: ceil(PAPER_VAL_FRACTION * count)]


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
