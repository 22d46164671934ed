"""Axes that show what is there and do not make mountains of noise, and the mean of several seeds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqo.report.curves import LEAST, MOST_POINTS, axis_limits, curve_groups, mean_line, thin
from dqo.report.svg import Series

NUMBERS = st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=20)


@given(st.sampled_from([*LEAST, "loss", "anything"]), NUMBERS)
def test_an_axis_shows_every_value_zero_and_the_least_of_its_metric(name, values):
    low, high = axis_limits(name, np.array(values))
    seen = [x for x in values if np.isfinite(x)]
    assert low < min([0.0, *seen]) and high > max([0.0, *seen]) or low < high and not seen
    least = LEAST.get(name, (0.0, 0.0))
    assert low <= least[0] and high >= least[1]


@pytest.mark.parametrize("name", [name for name, (low, high) in LEAST.items() if name != "kl"])
def test_a_change_of_a_thousandth_is_a_flat_line(name):
    low, high = axis_limits(name, np.array([0.001, 0.002]))
    assert 0.001 / (high - low) < 0.02


def test_a_level_far_from_zero_is_seen_as_a_level():
    low, high = axis_limits("loss", np.array([5.0, 5.01, 4.99]))
    assert low < 0 and 0.02 / (high - low) < 0.01


def test_the_mean_of_seeds_is_taken_where_all_have_a_point():
    lines = [
        (np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])),
        (np.array([2.0, 3.0, 4.0]), np.array([4.0, 5.0, 6.0])),
    ]
    x, y = mean_line(lines)
    assert x.tolist() == [2, 3] and y.tolist() == [3, 4]
    apart = [(np.array([1.0]), np.array([1.0])), (np.array([2.0]), np.array([7.0]))]
    assert mean_line(apart)[1].tolist() == [7]


def test_losses_of_different_methods_have_plots_of_their_own():
    curves = [
        {"name": name, "method": method, "x": [1, 2], "y": [1, 2]} for name in ("loss", "kl") for method in ("a", "b")
    ]
    groups = curve_groups(curves, {"a": Series(0), "b": Series(1)})
    assert [(group["name"], group["method"]) for group in groups] == [("loss", "a"), ("loss", "b"), ("kl", "")]


def test_a_long_curve_is_thinned_to_means_and_keeps_its_gaps():
    x = np.arange(10 * MOST_POINTS)
    y = [None if i < 15 else float(i) for i in x]
    short_x, short_y = thin(x, y)
    assert len(short_x) == MOST_POINTS
    assert short_x[:2] == pytest.approx([4.5, 14.5])
    assert np.isnan(short_y[0]) and short_y[1:3] == pytest.approx([17.0, 24.5])
    assert thin([1, 2], [3, None])[0] == pytest.approx([1, 2])
