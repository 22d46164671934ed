"""Numbers as a reader wants them."""

import pytest

from dqo.report.formats import measured, option_text


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"), (0, "0.000"), (-4.5e-11, "0.000"), (1.8e-15, "0.000"), (0.00023, "0.00023"), (-0.0001, "−0.0001"),
        (0.4221, "0.422"), (-1.5, "−1.500"), (12.3456, "12.346"), (1234.5, "1.23e+03"), (-0.0004999, "−0.0005"),
    ],
)  # fmt: skip
def test_a_metric_has_three_digits_and_rounding_is_zero(value, text):
    assert measured(value) == text


def test_a_share_is_in_percent():
    assert measured(0.9673, True) == "96.7%" and measured(None, True) == "–"


@pytest.mark.parametrize(
    "value, text", [(32.0, "32"), (1e-4, "0.0001"), (None, "none"), (["a", "b"], "a, b"), (True, "True"), (3, "3")]
)
def test_an_option_is_shown_as_it_is_given(value, text):
    assert option_text(value) == text
