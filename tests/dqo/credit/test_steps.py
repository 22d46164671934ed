"""Sums of tokens as sums of steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqo.credit.steps import first_wrong_step, highest_half, step_highest, step_sums, wrong_mark

VALUES = [1.0, 2.0, -5.0, 4.0, 8.0]


def test_a_step_has_its_tokens_and_the_last_one_what_follows():
    assert step_sums(VALUES, [1, 3]).tolist() == [3.0, -1.0 + 8.0]
    assert step_highest(VALUES, [1, 3]).tolist() == [2.0, 8.0]
    assert step_sums(VALUES, [4]).tolist() == [10.0]


def test_a_response_without_steps_has_no_sums():
    assert step_sums(VALUES, []).shape == step_highest(VALUES, []).shape == (0,)


def test_a_step_without_a_token_of_its_own_is_empty():
    assert step_sums(VALUES, [1, 1, 4]).tolist() == [3.0, 0.0, 7.0]
    assert step_highest(VALUES, [1, 1, 4]).tolist() == [2.0, -np.inf, 8.0]


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=12), st.data())
def test_sums_are_those_of_slices(values, data):
    ends = sorted(data.draw(st.sets(st.integers(0, len(values) - 1), min_size=1)))
    bounds = [0, *(end + 1 for end in ends[:-1]), len(values)]
    slices = [values[begin:end] for begin, end in zip(bounds, bounds[1:])]
    assert step_sums(values, ends).tolist() == [sum(piece) for piece in slices]
    assert step_highest(values, ends).tolist() == [max(piece) for piece in slices]


@pytest.mark.parametrize("ends", [[5], [3, 1], [-1], [[1, 3]]])
def test_ends_outside_of_the_response_are_refused(ends):
    with pytest.raises(ValueError, match="response of 5 tokens"):
        step_sums(VALUES, ends)


def test_the_higher_half_of_steps_is_rounded_up_and_prefers_the_earlier():
    assert highest_half([1.0, 3.0, 2.0]).tolist() == [False, True, True]
    assert highest_half([1.0, 1.0, 1.0, 1.0]).tolist() == [True, True, False, False]
    assert highest_half([]).tolist() == []


def first_wrong(rewards, potentials=False, file=()):
    return first_wrong_step(rewards, wrong_mark([*rewards, *file], potentials))


def test_the_whole_file_tells_which_rewards_mark_a_wrong_step():
    assert first_wrong([1.0, 0.0, 1.0]) == 1  # labels
    assert first_wrong([1.0, 0.0, 1.0], file=[-1.0]) is None  # ratings: 0 is neutral
    assert first_wrong([0.0, 1.0, -0.5, -1.0]) == 2
    assert first_wrong([0.5, 0.25, 0.0, 0.0]) == first_wrong([0.5, 0.25, 0.0, 0.0], potentials=True) == 2
    assert first_wrong([0.0, 0.0]) is first_wrong([]) is first_wrong([0.5], potentials=True) is None
    assert first_wrong([0.0, 0.0], potentials=True) == 0  # no completion was ever right
    assert first_wrong([0.0, 3.0]) is None  # points
    assert first_wrong([0.2, -0.3], potentials=True) is None  # a model's values
    assert first_wrong([1.0, -1.0], potentials=True) == 1


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=6), st.booleans())
def test_no_response_without_the_mark_has_a_wrong_step(rewards, potentials):
    found = first_wrong(rewards, potentials)
    lowest = min(rewards)
    if found is not None:
        assert rewards[found] <= 0 and all(r > 0 or lowest < 0 == r for r in rewards[:found])
    assert (found is None) == (lowest > 0 or (max(rewards) == 0 == lowest and not potentials)) or (
        potentials and lowest < 0 and 0.5 in rewards
    )
