"""Measures of a score against hand computations and brute force, and their intervals against simulation."""

from itertools import product

import numpy as np
import pytest

from dqo.credit.quality import Judged, auc_within_prompt, chance_of_wrong, lowest_is_wrong, quality_of
from dqo.stats import auc_interval


def steps(scores, wrong, prompt=0):
    return prompt, np.array(scores, float), wrong


def test_the_auc_within_a_prompt_counts_pairs_of_one_prompt_alone():
    # prompt 0: right 3 and 1 against wrong 2 and 1: pairs 1, 1, 0, 1/2; prompt 1: right 9 against wrong 10: 0; prompt 2: none
    scores, labels = [3, 1, 2, 1, 9, 10, 5], [1, 1, 0, 0, 1, 0, 1]
    found = auc_within_prompt(scores, labels, [0, 0, 0, 0, 1, 1, 2])
    assert found.mean == pytest.approx(2.5 / 5)
    assert found.low < found.mean < found.high
    assert auc_within_prompt([1, 2], [1, 0], ["a", "b"]) is auc_within_prompt([], [], []) is None


def test_the_auc_within_a_prompt_is_that_of_all_pairs():
    rng = np.random.default_rng(1)
    scores, labels, prompts = rng.integers(0, 4, 80), rng.integers(0, 2, 80), rng.integers(0, 12, 80)
    pairs = [(i, j) for i, j in product(range(80), repeat=2) if labels[i] > labels[j] and prompts[i] == prompts[j]]
    shares = [(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for i, j in pairs]
    assert auc_within_prompt(scores, labels, prompts).mean == pytest.approx(np.mean(shares))


def test_what_only_knows_the_prompt_has_an_auc_and_none_within_prompts():
    rng = np.random.default_rng(2)
    ease = np.repeat(rng.uniform(0.1, 0.9, 200), 4)
    labels, prompts = rng.uniform(size=800) < ease, np.repeat(np.arange(200), 4)
    assert auc_interval(ease, labels, prompts).low > 0.6
    within = auc_within_prompt(ease, labels, prompts)
    assert within.mean == 0.5


@pytest.mark.parametrize("asked, shift", [("within", 0.5), ("lowest", 0.6)])
def test_the_intervals_hold_the_truth_about_as_often_as_they_say(asked, shift):
    rng = np.random.default_rng(3)

    def sample(prompts):
        if asked == "within":
            labels = rng.uniform(size=(prompts, 4)) < 0.5
            scores = shift * labels + rng.normal(size=labels.shape) * np.exp(0.5 * rng.normal(size=(prompts, 1)))
            return auc_within_prompt(scores.ravel(), labels.ravel(), np.repeat(np.arange(prompts), 4))
        chances = rng.beta(1.2, 0.8, prompts)  # responses to one prompt are alike: shift is their mean
        hits = rng.uniform(size=(prompts, 3)) < chances[:, None]
        return lowest_is_wrong([steps([-1, 0] if hit else [0, -1], 0, p) for p, row in enumerate(hits) for hit in row])

    truth = sample(20_000).mean
    found = [sample(40) for _ in range(300)]
    assert 0.91 < np.mean([one.low <= truth <= one.high for one in found]) < 0.985


def test_the_lowest_step_is_the_first_wrong_one_or_shares_it():
    assert lowest_is_wrong([steps([0, -3, 1], 1)]).mean == 1
    assert lowest_is_wrong([steps([0, -3, 1], 0)]).mean == 0
    assert lowest_is_wrong([steps([-3, -3, 1], 0)]).mean == 0.5
    asked = [steps([0, -3, 1], 1), steps([0, 0, 0, 0], 3, 1), steps([-1], 0, 2), steps([0, -1], None, 3)]
    assert lowest_is_wrong(asked).mean == pytest.approx((1 + 0.25) / 2)
    assert lowest_is_wrong(asked[2:]) is chance_of_wrong(asked[2:]) is None


def test_chance_is_the_mean_of_one_over_the_number_of_steps_and_what_a_score_of_zeros_gets():
    asked = [steps(np.zeros(count), count - 1, count) for count in (2, 5, 10)]
    assert chance_of_wrong(asked).mean == lowest_is_wrong(asked).mean == pytest.approx((1 / 2 + 1 / 5 + 1 / 10) / 3)


def test_among_some_steps_the_others_are_never_blamed():
    asked = [steps([-9, -3, 1], 1), steps([-9, -3, 1], 0, 1)]
    among = [np.array([False, True, True])] * 2
    assert lowest_is_wrong(asked, among).mean == 0.5  # the first is found, the second is not among them
    assert chance_of_wrong(asked, among).mean == pytest.approx((1 / 2 + 0) / 2)


def test_a_score_that_is_zero_everywhere_knows_nothing():
    judged = [
        Judged(p, right, np.zeros(6), [1, 3, 5], None if right else 1) for p in range(5) for right in (True, False)
    ]
    found = quality_of(judged)
    assert found.auc.mean == found.auc_within_prompt.mean == 0.5
    assert found.first_wrong_step.mean == found.first_wrong_step_chance.mean == pytest.approx(1 / 3)


def test_advantages_that_blame_the_wrong_step_are_found_out():
    right = [Judged(p, True, np.full(4, 0.1), [1, 3]) for p in range(4)]
    wrong = [Judged(p, False, np.array([0.1, 0.1, 0.1, -0.3]), [1, 3], 1) for p in range(4)]
    assert [measure.mean for measure in quality_of(right + wrong)] == [1.0, 1.0, 1.0, 0.5]
    assert quality_of(right) == (None, None, None, None)
