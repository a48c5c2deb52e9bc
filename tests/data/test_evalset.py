"""The validation list is fixed, counts every target once, and its bytes and documents are those of the text."""

from math import log

import numpy as np
import pytest
import torch

from data.evalset import EvalSet, available

SEQ = 64


@pytest.fixture
def full(tokens) -> EvalSet:
    return EvalSet(tokens, SEQ, None)


def stream_of(tokens) -> np.ndarray:
    out = np.empty(tokens.split("val").length, np.int64)
    tokens.split("val").read(0, out)
    return out


def fake_nats(sequences: int) -> np.ndarray:
    return np.random.default_rng(3).exponential(3.0, (sequences, SEQ)).astype(np.float32)


def test_full_counts_every_target_once(full, tokens):
    """Stream positions 1 .. end, each in exactly one segment, though the last sequence overlaps the one before it."""
    stream = stream_of(tokens)
    positions = []
    for sequence, begin, end in zip(full.segments.sequence, full.segments.begin, full.segments.end, strict=True):
        row = full.samples(int(sequence), 1)[0].tolist()
        start = min(int(sequence) * SEQ, len(stream) - 1 - SEQ)
        assert row == stream[start : start + SEQ + 1].tolist()
        positions += range(start + 1 + int(begin), start + 1 + int(end))
    assert sorted(positions) == list(range(1, len(stream)))
    assert full.targets == len(stream) - 1 and (len(stream) - 1) % SEQ  # there is a tail


def test_bytes_add_up_to_the_text(full, tokens):
    assert full.segments.bytes.sum() == tokens.manifest["splits"]["val"]["bytes"]


def test_bytes_and_bos_of_each_segment(full, tokens):
    """Recounted token by token: a BOS target stands alone with 0 bytes, no other segment holds one."""
    part = full.segments
    for i in range(len(part.sequence)):
        targets = full.samples(int(part.sequence[i]), 1)[0, 1:][int(part.begin[i]) : int(part.end[i])].numpy()
        assert part.bytes[i] == tokens.token_bytes[targets].sum()
        has_bos = (targets == tokens.bos_id).any()
        assert has_bos == (part.bytes[i] == 0) and (len(targets) == 1 or not has_bos)
    assert (part.bytes == 0).sum() == tokens.manifest["splits"]["val"]["documents"] - 1  # the first BOS is no target


def test_segments_name_documents_by_first_appearance(full, tokens):
    """Rows of one document share its number; numbers follow the text."""
    groups = tokens.split("val").documents[:, 2].tolist()
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    assert len(number) < len(groups)
    part = full.segments
    # In order of the text, a row of the document index begins at every BOS segment.
    row = np.cumsum(part.bytes == 0)
    assert part.document.tolist() == [number[groups[r]] for r in row]


def test_the_list_does_not_depend_on_batches(full):
    nats = fake_nats(full.sequences)
    whole = full.segment_nats(0, nats)
    for size in (1, 3, 16):
        firsts = range(0, full.sequences, size)
        parts = [full.segment_nats(i, nats[i : i + size]) for i in firsts]
        assert np.concatenate(parts).tolist() == whole.tolist()
        assert torch.equal(
            torch.cat([full.samples(i, min(size, full.sequences - i)) for i in firsts]), full.samples(0, full.sequences)
        )


def test_segment_nats_are_sums_over_their_targets(full):
    nats = fake_nats(full.sequences)
    part = full.segments
    expected = [
        nats[s, b:e].astype(np.float64).sum() for s, b, e in zip(part.sequence, part.begin, part.end, strict=True)
    ]
    # Differences of FP64 running sums of 64 numbers around 3: errors below 64 * 2^-53 * 200.
    np.testing.assert_allclose(full.segment_nats(0, nats), expected, rtol=0, atol=2e-12)


def test_summary_by_hand(full):
    """Loss over all counted targets, bits per byte without BOS, standard error between documents."""
    nats = fake_nats(full.sequences)
    counted = np.concatenate([nats[:-1].ravel(), nats[-1, -(full.targets - SEQ * (full.sequences - 1)) :]]).astype(
        float
    )
    is_bos = np.concatenate([(full.samples(i, 1)[0, 1:] == 0).numpy() for i in range(full.sequences)])
    is_bos = np.concatenate([is_bos[: SEQ * (full.sequences - 1)], is_bos[-(full.targets % SEQ) :]])
    summary = full.summary(full.segment_nats(0, nats))
    assert summary["loss"] == pytest.approx(counted.mean(), rel=1e-12)
    assert summary["bpb"] == pytest.approx(counted[~is_bos].sum() / log(2) / full.segments.bytes.sum(), rel=1e-12)
    part = full.segments
    sums, sizes = {}, {}
    for document, value, size in zip(part.document, full.segment_nats(0, nats), part.tokens, strict=True):
        sums[document] = sums.get(document, 0) + value
        sizes[document] = sizes.get(document, 0) + size
    n = len(sums)
    spread = sum((sums[d] - counted.mean() * sizes[d]) ** 2 for d in sums)
    assert summary["se"] == pytest.approx((n / (n - 1) * spread) ** 0.5 / full.targets, rel=1e-9)


def test_a_part_is_spread_over_the_text(tokens, full):
    part = EvalSet(tokens, SEQ, 5 * SEQ + 3)
    assert part.sequences == 5 and part.targets == 5 * SEQ
    there = full.sequences - 1
    for i in range(5):
        assert torch.equal(part.samples(i, 1), full.samples(i * there // 5, 1))
    assert len(np.unique(part.segments.document)) >= 4


@pytest.mark.parametrize("count", [SEQ - 1, 10**6])
def test_too_little_text_is_an_error_with_numbers(tokens, full, count):
    limit = (full.sequences - 1) * SEQ
    with pytest.raises(ValueError, match=rf"{count} evaluation tokens.*give {SEQ} to {limit} tokens"):
        EvalSet(tokens, SEQ, count)


def test_reading_past_the_end_is_an_error(full):
    with pytest.raises(ValueError, match=f"there are {full.sequences}"):
        full.samples(full.sequences - 1, 2)


def test_a_space_prefix_is_not_counted(tokens, monkeypatch):
    """A tokenizer that puts a space before each text: one byte less at the first target after each BOS."""
    plain = EvalSet(tokens, SEQ, None).segments
    monkeypatch.setitem(tokens.manifest["tokenizer"], "prefix_bytes", 1)
    less = plain.bytes - EvalSet(tokens, SEQ, None).segments.bytes
    rows = tokens.split("val").documents
    assert less.sum() == len(rows) and set(less.tolist()) == {0, 1}
    one_by_one = EvalSet(tokens, 1, None).segments.bytes
    monkeypatch.setitem(tokens.manifest["tokenizer"], "prefix_bytes", 0)
    less = EvalSet(tokens, 1, None).segments.bytes - one_by_one
    assert np.flatnonzero(less).tolist() == rows[:, 0].tolist()  # target i is token i + 1; a BOS is token rows[j, 0]


@pytest.mark.parametrize("packing", ["stream", "bos_bestfit"])
def test_what_is_available_is_told_without_reading(tokens, packing, monkeypatch):
    whole = EvalSet(tokens, SEQ, None, packing=packing).targets
    monkeypatch.setattr(type(tokens.split("val")), "read", None)
    assert available(tokens, SEQ, packing) == whole


def test_packed_rows_begin_with_a_document(tokens):
    packed = EvalSet(tokens, SEQ, None, packing="bos_bestfit")
    assert (packed.samples(0, packed.sequences)[:, 0] == tokens.bos_id).all()
    assert packed.targets == packed.sequences * SEQ
    targets = packed.samples(0, packed.sequences)[:, 1:].numpy()
    assert packed.segments.bytes.sum() == tokens.token_bytes[targets].sum()
