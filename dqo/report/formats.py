"""Numbers as a reader of the report wants them."""

from __future__ import annotations

from typing import Any

from dqo.stats import Interval, Paired


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign unless it rounds to zero."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def signed(value: float) -> str:
    """Two digits and a sign, unless it rounds to zero."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def p_text(p_value: float) -> str:
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def number_text(value: Any) -> str:
    """A number as a reader wants it; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if isinstance(value, int) or value.is_integer() and abs(value) >= 1000:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def measured(value: float | None, is_share: bool = False) -> str:
    """A metric, of three digits; shares in percent."""
    if value is None:
        return "–"
    if is_share:
        return f"{percent(value)}%"
    small = 5e-6 <= abs(value) < 0.0005  # below that it is rounding
    text = f"{value:.3g}" if small or abs(value) >= 100 else f"{value + 0.0:.3f}"
    text = "0.000" if text == "-0.000" else text
    return text.replace("-", "−")


def option_text(value: Any) -> str:
    """An option's value."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def rate_text(rate: Interval) -> str:
    return f"{percent(rate.mean)}% ({percent(rate.low)} to {percent(rate.high)})"


def plus_minus(rate: Interval) -> str:
    return f"{percent(rate.mean)} ±{percent((rate.high - rate.low) / 2)}"


def points_between(test: Paired) -> str:
    return f"{points(test.difference)} [{points(test.low)}, {points(test.high)}]".replace("−", "-")


def p_relation(test: Paired) -> str:
    text = p_text(test.p_value)
    return text.replace("<", "< ") if text.startswith("<") else f"= {text}"
