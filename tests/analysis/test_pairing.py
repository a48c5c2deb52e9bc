import math

import numpy as np
import pytest
from scipy.stats import ttest_ind
from synthetic import eval_rows

from analysis.pairing import (
    DIVERGED,
    NOT_RESOLVED,
    ONE_SEED,
    RESOLVED,
    Floor,
    paired_gap,
    seed_gap,
    t_quantile,
)
from analysis.runs import EvalRows


def rows(documents, nats, tokens):
    n = len(documents)
    return EvalRows(np.arange(n), np.array(documents), np.array(nats, float), np.array(tokens), np.array(tokens) * 4)


def test_gap_and_clustered_error_by_hand():
    # Documents A (two rows), B: differences 3 + 1 over 20 tokens, 2 over 20. Gap = 6/40 = .15.
    # Without A the gap is .1, without B .2: jackknife variance = 1/2 * (.05^2 + .05^2), the error .05.
    base = rows([0, 0, 1], [10, 10, 20], [10, 10, 20])
    run = rows([0, 0, 1], [13, 11, 22], [10, 10, 20])
    gap = paired_gap([run], [base])
    assert gap.value == pytest.approx(0.15) and gap.se == pytest.approx(0.05)
    assert (gap.documents, gap.effective) == (2, 2)


def test_rows_pair_by_sequence_and_document_not_by_position():
    base = EvalRows(**eval_rows(3.0))
    run = EvalRows(**{k: v[::-1] for k, v in eval_rows(3.1).items()})
    gap = paired_gap([run], [base])
    assert gap.value == pytest.approx(0.1) and gap.se == pytest.approx(0.0, abs=1e-12)


def test_documents_are_clustered_right_in_a_file_of_any_order():
    columns = eval_rows(3.1)
    columns["nats"] = columns["nats"] + columns["document"] % 3 * 5.0  # a difference that varies by document
    mixed = np.random.default_rng(0).permutation(len(columns["nats"]))
    base, run, shuffled = (EvalRows(**c) for c in (eval_rows(3.0), columns, {k: v[mixed] for k, v in columns.items()}))
    expected, gap = paired_gap([run], [base]), paired_gap([shuffled], [base])
    assert (gap.value, gap.se) == pytest.approx((expected.value, expected.se)) and gap.se > 1e-3
    assert paired_gap([shuffled, run], [base, base]).se == pytest.approx(expected.se)


def test_other_validation_tokens_do_not_pair():
    with pytest.raises(ValueError, match="differ in document"):
        paired_gap([EvalRows(**eval_rows(3.0, seed=1))], [EvalRows(**eval_rows(3.0, seed=2))])
    short = EvalRows(**{k: v[:-1] for k, v in eval_rows(3.0).items()})
    with pytest.raises(ValueError, match="not the same validation tokens"):
        paired_gap([short], [EvalRows(**eval_rows(3.0))])
    with pytest.raises(ValueError, match="differ in tokens"):
        paired_gap([rows([0, 1], [30, 30], [10, 11])], [rows([0, 1], [30, 30], [10, 10])])


def test_seeds_scored_on_other_text_than_the_first_have_no_mean():
    pairs = [[EvalRows(**eval_rows(loss, seed=seed)) for seed in (1, 2)] for loss in (3.1, 3.0)]
    with pytest.raises(ValueError, match="differ in document"):
        paired_gap(*pairs)


def test_clustered_error_is_the_spread_over_fresh_documents():
    """Rows of a document move together: the clustered error must match the spread of the mean over redrawn documents
    within 10 % (400 draws of a standard deviation: 1/sqrt(800) = 3.5 %). Unclustered, it is a third of that."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    document = np.repeat(np.arange(40), 10)
    for _ in range(400):
        nats = (3 + rng.normal(size=40)[document]) * 100
        gap = paired_gap([rows(document, nats, np.full(400, 100))], [rows(document, np.zeros(400), np.full(400, 100))])
        means.append(gap.value)
        errors.append(gap.se)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_error_of_a_text_that_is_mostly_five_books():
    """5 documents of 100 tokens and 100 of 5, each with its own mean: the error is known, and the linear estimate, of
    residuals about a mean that five documents make, is 6 % below it."""
    rng = np.random.default_rng(0)
    n = np.array([100] * 5 + [5] * 100)
    base = rows(np.arange(len(n)), np.zeros(len(n)), n)
    gaps = [paired_gap([rows(base.document, rng.normal(size=len(n)) * n, n)], [base]) for _ in range(2000)]
    error = math.sqrt((n @ n) / n.sum() ** 2)
    assert 0.99 < math.sqrt(np.mean([gap.se**2 for gap in gaps])) / error < 1.05
    assert gaps[0].effective == pytest.approx(1 / error**2)


def test_mean_over_seeds_of_a_paired_gap():
    base = EvalRows(**eval_rows(3.0))
    runs = [EvalRows(**eval_rows(3.0 + d)) for d in (0.1, 0.3)]
    assert paired_gap(runs, [base, base]).value == pytest.approx(0.2)


def test_t_interval_of_per_seed_gaps_by_hand():
    # gaps .04 .05 .06: mean .05, sd .01, t(2) = 4.3027, half width 4.3027 * .01 / sqrt(3) = .02484
    gap = seed_gap({0: 3.04, 1: 3.15, 2: 2.96}, {0: 3.0, 1: 3.1, 2: 2.9})
    assert gap.mean == pytest.approx(0.05) and gap.half_width == pytest.approx(0.024841, abs=1e-6)
    assert gap.verdict == RESOLVED and gap.seeds == 3 and gap.method == "paired t, 3 seeds"
    assert t_quantile(2) == pytest.approx(4.302653, abs=1e-5)


def test_a_correlation_needs_more_seeds_than_a_gap():
    ours, theirs = ({seed: base + 0.01 * seed**power for seed in range(6)} for base, power in ((3.1, 2), (3.0, 1)))
    known = np.corrcoef(list(ours.values()), list(theirs.values()))[0, 1]
    assert seed_gap(ours, theirs).correlation == pytest.approx(known)
    del ours[5]  # of five seeds and fewer it says next to nothing
    assert math.isnan(seed_gap(ours, theirs).correlation)


def test_verdict_words():
    assert seed_gap({0: 3.05}, {0: 3.0}).verdict == ONE_SEED
    assert seed_gap({0: 3.5}, {0: 3.0, 1: 3.001, 2: 3.002}).verdict == ONE_SEED
    assert seed_gap({0: 3.5}, {0: 3.0}, floor=Floor((1e-6, 50))).verdict == ONE_SEED
    assert seed_gap({0: 3.04, 1: 2.98}, {0: 3.0, 1: 3.0}).verdict == NOT_RESOLVED
    assert seed_gap({0: 3.0, 1: 3.1}, {0: 3.0, 1: 3.1}).verdict == NOT_RESOLVED  # 0 +- 0
    whole, cut = {0: 3.0, 1: 3.0}, {0: float("nan"), 1: 3.0}
    without_partner = {0: 3.0, 1: 3.0, 2: float("nan")}
    for pair in ((cut, whole), (whole, cut), (without_partner, whole), (whole, without_partner)):
        assert seed_gap(*pair).verdict == DIVERGED


def test_noise_floor_interval_by_hand():
    # t(8) = 2.3060; 2.306 * .003 * sqrt(1/2 + 1/2) = .006918
    gap = seed_gap({0: 3.01, 1: 3.02}, {0: 3.0, 1: 3.0}, floor=Floor((0.003, 8)))
    assert gap.half_width == pytest.approx(0.006918, abs=1e-6) and gap.verdict == RESOLVED
    assert gap.method.startswith("noise floor sd 3.00e-3")


def test_noise_floor_interval_of_unequal_sides_by_hand():
    # 2.3060 * .003 * sqrt(1/2 + 1/4) = .005991
    two, four = {0: 3.01, 1: 3.02}, {0: 3.0, 1: 3.0, 2: 3.01, 3: 3.01}
    for sides, mean in (((two, four), 0.01), ((four, two), -0.01)):
        gap = seed_gap(*sides, floor=Floor((0.003, 8)))
        assert (gap.mean, gap.half_width) == pytest.approx((mean, 0.005991), abs=1e-6) and gap.seeds == 2


def test_welch_interval_of_unequal_sides_agrees_with_scipy():
    few, many = {0: 3.01, 1: 3.04}, {10: 3.0, 11: 3.02, 12: 2.99, 13: 3.03, 14: 3.0}
    for a, b in ((few, many), (many, few)):
        gap = seed_gap(a, b)
        expected = ttest_ind(list(a.values()), list(b.values()), equal_var=False).confidence_interval(0.95)
        assert gap.interval == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert gap.method == f"Welch t, {len(a)} and {len(b)} seeds" and gap.seeds == 2


def test_paired_noise_floor_interval_by_hand():
    # t(6) = 2.44691; 2.44691 * .001 * sqrt(2 / 3) = .0019979; seed 3 has no partner and does not count
    floor = Floor((0.03, 8), (0.001, 6))
    gap = seed_gap({0: 3.01, 1: 3.04, 2: 3.07, 3: 9.0}, {0: 3.0, 1: 3.03, 2: 3.06}, floor)
    assert gap.mean == pytest.approx(0.01) and gap.half_width == pytest.approx(0.0019979, abs=1e-7)
    assert gap.method == "paired noise floor sd 1.00e-3, df 6, 3 seeds" and gap.verdict == RESOLVED
    assert seed_gap({0: 3.01, 4: 3.02}, {0: 3.0, 5: 3.0}, floor).method.startswith("noise floor sd 30.00e-3")


def test_intervals_cover_the_truth_95_percent_of_the_time():
    """2,000 draws of 3 paired seeds with true gap .01: coverage .95 +- 4 standard errors (.0049); Welch with 4 + 4."""
    rng = np.random.default_rng(1)
    paired = unpaired = 0
    for _ in range(2000):
        common = rng.normal(scale=0.03, size=3)
        a = dict(enumerate(3.01 + common + rng.normal(scale=0.002, size=3)))
        b = dict(enumerate(3.0 + common + rng.normal(scale=0.002, size=3)))
        low, high = seed_gap(a, b).interval
        paired += low < 0.01 < high
        a = dict(enumerate(3.01 + rng.normal(scale=0.02, size=4)))
        b = {10 + k: v for k, v in enumerate(3.0 + rng.normal(scale=0.02, size=4))}
        low, high = seed_gap(a, b).interval
        unpaired += low < 0.01 < high
    assert paired / 2000 == pytest.approx(0.95, abs=0.02)
    assert unpaired / 2000 == pytest.approx(0.95, abs=0.025)  # Welch is slightly conservative at these sizes
