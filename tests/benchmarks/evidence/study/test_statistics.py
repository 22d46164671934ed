"""The study's test has the size that it says where seeds differ, and its corrections are those of the textbook."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.evidence.study.statistics import Difference, ahead_of_each, holm, paired_over_seeds


def test_the_size_under_the_null_is_the_level_where_seeds_differ():
    """Two methods of one accuracy, whose runs vary: a test over problems finds a difference far too often."""
    rng = np.random.default_rng(0)
    runs, seeds, problems = 1000, 5, 100
    difficulty = rng.normal(0.6, 0.1, (runs, seeds, problems))
    draws = [rng.random((runs, seeds, problems)) for _ in range(2)]
    of_run = [rng.normal(0, 0.07, (runs, seeds, 1)) for _ in range(2)]
    a, b = ((draw < difficulty + shift).astype(float) for draw, shift in zip(draws, of_run))
    found = [paired_over_seeds(x, y) for x, y in zip(a, b)]
    assert np.mean([one.p_value < 0.05 for one in found]) == pytest.approx(0.05, abs=0.02)
    assert np.mean([one.low <= 0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.02)
    gaps = (a - b).reshape(runs, -1)
    over_problems = stats.ttest_1samp(gaps, 0, axis=1).pvalue
    assert np.mean(over_problems < 0.05) > 0.2


def test_a_difference_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(1)
    a, b = rng.random((5, 7)), rng.random((5, 7))
    found = paired_over_seeds(a, b)
    expected = stats.ttest_rel(a.mean(axis=1), b.mean(axis=1))
    assert found.mean == pytest.approx((a - b).mean()) and found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert paired_over_seeds(b, a).mean == -found.mean
    assert paired_over_seeds(a[:1], b[:1]) is None
    assert paired_over_seeds(a, a).p_value == 1
    with pytest.raises(ValueError, match="seeds, problems"):
        paired_over_seeds(a, b[:4])


def test_holm_by_hand_and_on_family_errors():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.001]) == pytest.approx([0.9, 0.002]) and holm([]) == []
    p_values = np.random.default_rng(2).random((4000, 6))  # six true nulls
    assert np.mean([min(holm(list(row))) < 0.05 for row in p_values]) == pytest.approx(0.05, abs=0.012)


def test_ahead_of_each_is_the_weakest_of_all_and_1_where_one_is_not_behind():
    strong, weak, behind = (
        Difference(0.2, 0.1, 0.3, 1e-4),
        Difference(0.1, 0, 0.2, 0.03),
        Difference(-0.1, -0.2, 0, 1e-6),
    )
    assert ahead_of_each([strong, weak]) == 0.03
    assert ahead_of_each([strong, behind]) == 1.0 == ahead_of_each([])
