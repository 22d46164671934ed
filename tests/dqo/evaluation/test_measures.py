"""Each estimate against all choices of k samples, against numbers made by hand, and errors by simulation."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqo.evaluation.measures import best_at_k, holm, majority_at_k, powers_of_two, standard_error
from dqo.stats import pass_at_k

SAMPLES = st.lists(st.sampled_from([None, "1", "2", "3"]), min_size=1, max_size=8)


def enumerated_majority(answers, scores, k):
    found = []
    for chosen in combinations(range(len(answers)), k):
        votes = [answers[i] for i in chosen if answers[i] is not None]
        most = max((votes.count(a) for a in votes), default=0)
        tied = {a for a in votes if votes.count(a) == most}
        of_answer = [np.mean([s for a, s in zip(answers, scores) if a == answer]) for answer in tied]
        found.append(np.mean(of_answer) if tied else 0.0)
    return np.mean(found)


def test_majority_by_hand():
    # 18, 18, 17: of the three pairs {18, 18} gives 18, each of the two {18, 17} is a tie worth 1/2
    assert majority_at_k(["18", "18", "17"], [1, 1, 0], 2) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert majority_at_k(["18", "18", "17"], [1, 1, 0], 3) == 1
    assert majority_at_k(["18", "18", "17"], [1, 1, 0], 1) == pytest.approx(2 / 3)
    # one right answer outvotes samples without any, and two without any give nothing
    assert majority_at_k(["18", None, None], [1, 0, 0], 2) == pytest.approx(2 / 3)
    assert majority_at_k([None, None], [0, 0], 2) == 0
    # a wrong majority loses what pass@1 has
    assert majority_at_k(["1", "2", "2"], [1, 0, 0], 3) == 0


@given(SAMPLES, st.data())
def test_majority_is_the_mean_over_all_choices(answers, data):
    right = data.draw(st.sampled_from(["1", "2", "3"]))
    scores = [float(answer == right) for answer in answers]
    k = data.draw(st.integers(1, len(answers)))
    assert majority_at_k(answers, scores, k) == pytest.approx(enumerated_majority(answers, scores, k))


def test_a_vote_of_one_is_pass_at_1_and_many_samples_are_counted_fast():
    answers = [str(i % 23) for i in range(60)] + [None] * 4
    scores = [float(a == "3") for a in answers]
    assert majority_at_k(answers, scores, 1) == pytest.approx(np.mean(scores))
    assert 0 < majority_at_k(answers, scores, 32) < 1


@given(st.data())
def test_best_of_k_is_the_mean_over_all_choices(data):
    n = data.draw(st.integers(1, 7))
    ranks = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    scores = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n))
    k = data.draw(st.integers(1, n))
    found = []
    for chosen in combinations(range(n), k):
        top = max(ranks[i] for i in chosen)
        # a tie of the rank is broken by chance among all that have it, chosen or not: by symmetry the same
        found.append(np.mean([scores[i] for i in chosen if ranks[i] == top]))
    assert best_at_k(ranks, scores, k) == pytest.approx(np.mean(found))


def test_best_of_k_by_hand():
    # ranks 3, 2, 1 of which the first is wrong: two of the three pairs hold it
    assert best_at_k([3, 2, 1], [0, 1, 1], 2) == pytest.approx(1 / 3)
    # ranked by the truth, best of k is pass@k
    assert best_at_k([1, 0, 0, 1, 0], [1, 0, 0, 1, 0], 3) == pytest.approx(pass_at_k(5, 2, 3))


@pytest.mark.parametrize("n", [65, 100, 1536])
def test_many_samples_that_are_all_right_give_exactly_1(n):
    # floats do not tell so many choices apart: a mean above 1 would be no accuracy, and 10**400 is no float
    ranks = [i * 7 % 41 for i in range(n)]
    assert [best_at_k(ranks, [1.0] * n, k) for k in powers_of_two(n)] == [1.0] * len(powers_of_two(n))


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=24), st.data())
def test_a_majority_of_answers_that_are_all_right_is_exactly_right(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    assert majority_at_k(answers, [1.0] * len(answers), k) == 1


def test_the_standard_error_is_that_of_repeated_draws_of_problems():
    rng = np.random.default_rng(3)
    means, errors = [], []
    for _ in range(400):
        scores = rng.uniform(size=(60, 8)) < rng.beta(0.5, 0.5, size=(60, 1))
        means.append(scores.mean())
        errors.append(standard_error(scores))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.08)
    # as if samples were independent it would be far too small
    assert np.sqrt(0.25 / 480) < 0.6 * np.mean(errors)
    assert standard_error([[1, 0, 1]]) is None
    assert standard_error([1, 0]) == pytest.approx(0.5)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []


@pytest.mark.parametrize("measure", [majority_at_k, best_at_k])
@pytest.mark.parametrize("count, k", [(3, 0), (3, 4), (2, 1)])
def test_impossible_choices_are_refused(measure, count, k):
    with pytest.raises(ValueError, match="1 <= k <= n"):
        measure(["1", "2", "3"], [1.0] * count, k)


def test_powers_end_at_the_number_itself():
    assert (powers_of_two(1), powers_of_two(8), powers_of_two(6)) == ([1], [1, 2, 4, 8], [1, 2, 4, 6])
