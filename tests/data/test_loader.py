"""Sample s is the same sequence whoever asks, whenever, in whatever portion."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch
from support import wait_until

from data.loader import PREFETCH_BATCHES, Loader
from data.prepare import prepare
from data.tokens import TokenSet

SEQ = 64


@pytest.fixture
def loader(tokens) -> Loader:
    return Loader(tokens, "train", SEQ, seed=5)


def whole_stream(tokens: TokenSet, split: str = "train") -> np.ndarray:
    out = np.empty(tokens.split(split).length, np.int64)
    tokens.split(split).read(0, out)
    return out


def test_portions_and_instances_agree(loader, tokens):
    """Across two epoch boundaries: all at once, one by one backwards, in sevens by a fresh loader."""
    count = 2 * loader.samples_per_epoch + 20
    batch = loader.samples(0, count)
    assert batch.shape == (count, SEQ + 1) and batch.dtype == torch.int64
    single = [loader.samples(i, 1) for i in reversed(range(count))]
    assert torch.equal(torch.cat(single[::-1]), batch)
    other = Loader(TokenSet(tokens.path), "train", SEQ, seed=5)
    assert torch.equal(torch.cat([other.samples(i, min(7, count - i)) for i in range(0, count, 7)]), batch)


def test_shard_length_does_not_matter(loader, spec, tmp_path):
    import dataclasses

    other = TokenSet(prepare(dataclasses.replace(spec, shard_tokens=777), tmp_path))
    assert torch.equal(Loader(other, "train", SEQ, seed=5).samples(3, 200), loader.samples(3, 200))


def test_an_epoch_is_every_window_once(loader, tokens):
    """Windows start seq_len apart from one offset, the offset differs between epochs, and so does the order."""
    stream = whole_stream(tokens)
    n = loader.samples_per_epoch
    offsets, orders = set(), set()
    for epoch in range(4):
        where = loader._locate(epoch * n, n)
        (offset,) = set(where[:, 1].tolist())
        assert sorted(where[:, 0].tolist()) == list(range(n)) and 0 <= offset < SEQ
        for row, index in zip(loader.samples(epoch * n, n), where[:, 0], strict=True):
            start = offset + index * SEQ
            assert row.tolist() == stream[start : start + SEQ + 1].tolist()
        offsets.add(offset)
        orders.add(tuple(where[:8, 0]))
    assert len(offsets) > 1 and len(orders) == 4
    assert n == (tokens.split("train").length - SEQ) // SEQ


def test_seeds_and_epochs_do_not_alias(tokens):
    """Seed 1 in epoch 1 is not seed 2 in epoch 0, as seed + epoch would make it."""
    one, two = (Loader(tokens, "train", SEQ, seed) for seed in (1, 2))
    n = one.samples_per_epoch
    assert one._locate(n, n)[:, 0].tolist() != two._locate(0, n)[:, 0].tolist()


def test_sample_hash_names_data_seed_and_place(loader, tokens, folder):
    def hash_of(source, first=10, count=6):
        return source.sample_hashes(first, count, 1)[0]

    base = hash_of(loader)
    assert len(base) == 16 and base == hash_of(Loader(tokens, "train", SEQ, 5))
    others = [hash_of(loader, 11), hash_of(loader, 10, 7), hash_of(Loader(tokens, "train", SEQ, 6))]
    others.append(hash_of(Loader(tokens, "train", 32, 5)))
    changed = TokenSet(folder)
    changed.fingerprint = "0" * 64
    others.append(hash_of(Loader(changed, "train", SEQ, 5)))
    named = Loader(tokens, "train", SEQ, 5)
    named.packing = "bos_bestfit"  # other windows under the same numbers
    others.append(hash_of(named))
    assert len({base, *others}) == 7


def test_every_offset_into_the_text_is_drawn(tokens):
    loader = Loader(tokens, "train", SEQ, 5)
    most = loader.windows.max_offset
    drawn = {loader._make_order(epoch)[1] for epoch in range(60 * (most + 1))}  # one is missed with e^-60
    assert drawn == set(range(most + 1))


def test_hashes_of_several_batches_are_those_of_each(loader):
    n = loader.samples_per_epoch  # the third batch lies in two epochs
    assert loader.sample_hashes(n - 15, 6, 4) == [loader.sample_hashes(n - 15 + 6 * i, 6, 1)[0] for i in range(4)]


def test_the_smallest_text_that_holds_a_sequence(tokens):
    length = tokens.split("val").length
    loader = Loader(tokens, "val", length - 1, seed=0)
    assert loader.samples_per_epoch == 1
    assert loader.samples(0, 1)[0].tolist() == whole_stream(tokens, "val").tolist() == loader.samples(9, 1)[0].tolist()
    with pytest.raises(ValueError, match=rf"val split of .* has {length} tokens and one sequence needs {length + 1}"):
        Loader(tokens, "val", length, seed=0)


def test_bad_ranges_are_errors(loader):
    for first, count in ((-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"first={first}, count={count}"):
            loader.samples(first, count)


def test_prefetch_yields_the_batches_in_order(loader):
    ranges = [(i * 7, 7) for i in range(30)]
    for batch, (first, count) in zip(loader.prefetch(ranges), ranges, strict=True):
        assert torch.equal(batch, loader.samples(first, count))


def test_prefetch_reads_ahead_but_not_without_bound(loader, monkeypatch):
    asked = []
    samples = loader.samples
    monkeypatch.setattr(loader, "samples", lambda first, count: asked.append(first) or samples(first, count))
    batches = loader.prefetch((i, 1) for i in itertools.count())
    next(batches)
    wait_until(lambda: len(asked) >= PREFETCH_BATCHES + 2)
    time.sleep(0.2)  # for one more, if it were unbounded
    # One was taken, the queue is full, and one more waits to enter it.
    assert asked == list(range(PREFETCH_BATCHES + 2))
    batches.close()
    assert not [t for t in threading.enumerate() if "_read_ahead" in t.name]


def test_prefetch_raises_what_went_wrong_in_its_thread(loader):
    batches = loader.prefetch([(0, 2), (-5, 2)])
    assert len(next(batches)) == 2
    with pytest.raises(ValueError, match="first=-5"):
        next(batches)
