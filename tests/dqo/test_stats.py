"""The formulas against hand computations and brute force, coverage and p values by simulation."""

from itertools import combinations, product
from math import comb, sqrt

import numpy as np
import pytest
from scipy import stats

from dqo.stats import (
    Proportion,
    accuracy_interval,
    auc,
    auc_interval,
    calibration_bins,
    clustered_interval,
    paired_test,
    pass_at_k,
)


@pytest.fixture
def rng():
    return np.random.default_rng(20_241)


def test_the_interval_of_a_proportion_is_wilsons():
    share = Proportion(8, 10)
    z = stats.norm.ppf(0.975)
    center = (0.8 + z**2 / 20) / (1 + z**2 / 10)
    half = z / (1 + z**2 / 10) * sqrt(0.8 * 0.2 / 10 + z**2 / 400)
    assert share.mean == 0.8
    assert share.low == pytest.approx(center - half)
    assert share.high == pytest.approx(center + half)


@pytest.mark.parametrize("successes, total", [(3, 2), (-1, 4), (0, 0)])
def test_an_impossible_proportion_is_refused(successes, total):
    with pytest.raises(ValueError, match="not a proportion"):
        Proportion(successes, total)


@pytest.mark.parametrize("right", [0, 1, 37, 60])
def test_with_one_sample_a_problem_accuracy_is_a_proportion(right):
    scores = [1] * right + [0] * (60 - right)
    expected = Proportion(right, 60)
    assert accuracy_interval(scores) == pytest.approx(tuple(expected.interval))
    assert accuracy_interval(np.array(scores)[:, None]) == pytest.approx(tuple(expected.interval))


def test_copies_of_a_sample_do_not_narrow_the_interval_and_independent_samples_do(rng):
    once = rng.integers(0, 2, (200, 1))
    copies = accuracy_interval(np.repeat(once, 8, axis=1))
    assert copies == pytest.approx(accuracy_interval(once))
    independent = accuracy_interval(rng.integers(0, 2, (200, 8)))
    ratio = (independent.high - independent.low) / (copies.high - copies.low)
    assert ratio == pytest.approx(1 / sqrt(8), rel=0.15)


def test_the_accuracy_interval_covers_the_truth_when_problems_differ_in_difficulty(rng):
    covered = []
    for _ in range(1000):
        difficulty = rng.beta(3, 0.6, size=(120, 1))
        interval = accuracy_interval(rng.uniform(size=(120, 6)) < difficulty)
        covered.append(interval.low <= 3 / 3.6 <= interval.high)
    assert 0.925 <= np.mean(covered) <= 0.975


def test_all_right_is_not_a_certainty():
    interval = accuracy_interval(np.ones((50, 4)))
    assert interval.high == 1
    assert interval.low == pytest.approx(Proportion(50, 50).low)


def test_mcnemar_is_the_binomial_test_of_wins_against_losses():
    a = [1] * 8 + [0] * 2 + [1] * 20 + [0] * 5
    b = [0] * 8 + [1] * 2 + [1] * 20 + [0] * 5
    test = paired_test(a, b)
    assert test.test == "exact McNemar"
    assert (test.wins, test.losses) == (8, 2)
    assert test.p_value == pytest.approx(2 * (comb(10, 0) + comb(10, 1) + comb(10, 2)) / 2**10)
    assert test.difference == pytest.approx(6 / 35)
    center, discordant = 6 / 37, 12 / 37
    half = stats.norm.ppf(0.975) * sqrt((discordant - center**2) / 37)
    assert (test.low, test.high) == pytest.approx((center - half, center + half))


def test_the_sign_flip_test_enumerates_every_sign_for_few_problems():
    a = np.array([0.75, 0.5, 1.0, 0.25, 0.5, 0.875, 0.5])
    b = np.array([0.25, 0.5, 0.5, 0.50, 0.0, 0.750, 0.5])
    gaps = a - b
    means = np.array([np.mean(gaps * signs) for signs in product((1, -1), repeat=len(gaps))])
    above, below = np.mean(means >= gaps.mean() - 1e-12), np.mean(means <= gaps.mean() + 1e-12)
    test = paired_test(a, b)
    assert test.test == "sign-flip permutation"
    assert test.p_value == pytest.approx(2 * min(above, below))
    assert (test.wins, test.losses) == (4, 1)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (test.low, test.high) == pytest.approx((expected.low, expected.high))


def test_a_planted_difference_is_found_in_graded_scores_and_a_swap_changes_its_sign(rng):
    base = rng.binomial(8, 0.5, 300) / 8
    better = np.minimum(base + (rng.uniform(size=300) < 0.3) / 8, 1)
    forward, backward = paired_test(better, base), paired_test(base, better)
    assert forward.significant and forward.low > 0
    assert forward.p_value == backward.p_value
    assert forward.difference == -backward.difference
    assert (forward.wins, forward.losses) == (backward.losses, backward.wins)


@pytest.mark.parametrize("a, b", [([1, 0, 1], [1, 0, 1]), ([0.5, 0.25], [0.5, 0.25])])
def test_equal_scores_differ_by_nothing(a, b):
    test = paired_test(a, b)
    assert (test.difference, test.p_value, test.wins, test.losses) == (0, 1, 0, 0)
    assert test.low <= 0 <= test.high and not test.significant


@pytest.mark.slow
def test_p_values_of_graded_scores_are_uniform_when_there_is_no_difference(rng):
    p_values = []
    for _ in range(250):
        skill = rng.uniform(size=40)
        a, b = rng.binomial(8, skill) / 8, rng.binomial(8, skill) / 8
        p_values.append(paired_test(a, b).p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.10


def test_p_values_of_binary_scores_are_never_too_small_and_rarely_far_too_large(rng):
    p_values, covered = [], []
    for _ in range(1500):
        skill = rng.uniform(size=200)
        test = paired_test(rng.uniform(size=200) < skill, rng.uniform(size=200) < skill)
        p_values.append(test.p_value)
        covered.append(test.low <= 0 <= test.high)
    assert 0.015 <= np.mean(np.array(p_values) < 0.05) <= 0.06
    assert 0.93 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize("a, b", [([1, 0], [1]), ([], []), ([[1]], [[0]]), ([float("nan")], [0]), ([2], [0])], ids=str)
def test_unusable_pairs_are_refused(a, b):
    with pytest.raises(ValueError):
        paired_test(a, b)


def test_the_auc_counts_pairs_and_half_of_the_ties(rng):
    scores, labels = rng.integers(0, 6, 80), rng.integers(0, 2, 80)
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs))
    assert auc([0.9, 0.8, 0.1], [True, True, False]) == 1
    assert auc([1, 1, 1], [1, 0, 0]) == 0.5


def test_the_auc_of_one_class_is_none_and_nan_is_an_error():
    assert auc([0.1, 0.2], [1, 1]) is None
    assert auc_interval([0.1, 0.2], [0, 0]) is None
    with pytest.raises(ValueError, match="NaN"):
        auc([0.1, float("nan")], [0, 1])
    with pytest.raises(ValueError, match="0 or 1"):
        auc([0.1, 0.2], [0, 2])
    with pytest.raises(ValueError, match="length"):
        auc([0.1, 0.2], [0, 1, 1])


def test_the_auc_interval_covers_the_truth(rng):
    truth = stats.norm.cdf(1.2 / sqrt(2))
    covered = []
    for _ in range(600):
        labels = np.arange(90) < 30
        interval = auc_interval(rng.normal(size=90) + 1.2 * labels, labels)
        covered.append(interval.low <= truth <= interval.high)
    assert 0.92 <= np.mean(covered) <= 0.98


def test_copies_within_a_group_do_not_narrow_the_auc_interval(rng):
    labels = rng.integers(0, 2, 100)
    scores = labels + rng.normal(size=100)
    alone = auc_interval(scores, labels)
    copied = np.repeat(scores, 4), np.repeat(labels, 4)
    grouped = auc_interval(*copied, groups=np.repeat([f"problem {i}" for i in range(100)], 4))
    assert grouped == pytest.approx(alone)
    ungrouped = auc_interval(*copied)
    assert (ungrouped.high - ungrouped.low) / (alone.high - alone.low) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("shared", [0.0, 1.5], ids=["independent", "problems of different difficulty"])
def test_the_auc_interval_is_as_wide_as_the_bootstrap_over_problems(rng, shared):
    problems, k = 150, 6
    difficulty = rng.normal(size=(problems, 1)) * shared
    labels = rng.uniform(size=(problems, k)) < 0.12
    scores = 0.8 * labels + rng.normal(size=(problems, k)) + difficulty
    draws = [rng.integers(0, problems, problems) for _ in range(600)]
    spread = np.std([auc(scores[i].ravel(), labels[i].ravel()) for i in draws])
    interval = auc_interval(scores.ravel(), labels.ravel(), np.repeat(np.arange(problems), k))
    assert (interval.high - interval.low) / 2 / 1.96 == pytest.approx(spread, rel=0.12)


def test_perfect_separation_is_not_a_certainty():
    interval = auc_interval([0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1])
    assert interval.mean == 1 and interval.high == 1
    assert interval.low == pytest.approx(Proportion(3, 3).low)


@pytest.mark.parametrize("n, c, k", [(8, 3, 1), (8, 3, 4), (6, 0, 2), (6, 6, 1), (7, 4, 5)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, c, k):
    subsets = list(combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([min(subset) < c for subset in subsets]))


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_calibration_bins_hold_equal_counts_in_ascending_order(rng):
    predicted = rng.permutation(np.arange(100) / 100)
    observed = predicted > 0.5
    bins = calibration_bins(predicted, observed, bins=10)
    assert [count for _, _, count in bins] == [10] * 10
    assert bins[0][:2] == pytest.approx((0.045, 0.0))
    assert bins[5][:2] == pytest.approx((0.545, 0.9))
    assert bins[9][:2] == pytest.approx((0.945, 1.0))


def test_equal_predictions_share_a_calibration_bin():
    bins = calibration_bins([0.0] * 70 + [0.5] * 20 + [1.0] * 10, [1, 0] * 50)
    assert [(mean, count) for mean, _, count in bins] == [(0.0, 70), (0.5, 20), (1.0, 10)]
    assert calibration_bins([], []) == []
    with pytest.raises(ValueError, match="finite"):
        calibration_bins([float("nan")], [1])


def test_one_differing_problem_proves_nothing():
    assert paired_test([0.5, 0.25, 1.0], [0.5, 0.5, 1.0]).p_value == 1.0


def test_a_mean_over_groups_of_one_size_has_the_interval_of_accuracies(rng):
    scores = (rng.uniform(size=(60, 4)) < rng.uniform(size=(60, 1))).astype(float)
    of_groups = clustered_interval(scores.sum(axis=1), np.full(60, 4))
    assert of_groups == pytest.approx(accuracy_interval(scores))


def test_groups_of_unlike_sizes_weigh_as_much_as_they_hold():
    found = clustered_interval([3, 0, 2], [3, 1, 4])
    assert found.mean == pytest.approx(5 / 8)
    assert 0 < found.low < found.mean < found.high < 1


def test_of_one_group_nothing_is_known_of_others():
    assert clustered_interval([50], [100]) == clustered_interval([1], [2]) == pytest.approx((0.5, *_one_trial(0.5)))


def _one_trial(mean):
    z2 = stats.norm.ppf(0.975) ** 2
    center, half = (mean + z2 / 2) / (1 + z2), sqrt(z2) / (1 + z2) * sqrt(mean * (1 - mean) + z2 / 4)
    return center - half, center + half


@pytest.mark.parametrize("sums, counts", [([2], [1]), ([-1], [1]), ([0], [0]), ([], []), ([1, 1], [1])])
def test_impossible_sums_of_groups_are_refused(sums, counts):
    with pytest.raises(ValueError, match="group"):
        clustered_interval(sums, counts)
