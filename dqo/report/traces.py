"""The value along responses: what the policy implies, the advantage of each token, and the value model beside them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from dqo.credit.steps import step_sums
from dqo.report.curves import with_gaps
from dqo.report.schema import ValueTrace
from dqo.report.svg import BAD, DOTS, GOOD, GRID, MUTED, SERIES, inline_svg

MOST_TRACES = 6
WIDE = 510  # of half a page
STRONGEST = 70  # percent of colour behind the token with the largest advantage


class Limits(NamedTuple):
    """One scale for all traces, so that they can be compared."""

    value: tuple[float, float]
    advantage: float  # from -advantage to advantage


def trace_views(traces: list[ValueTrace]) -> list[dict[str, Any]]:
    """Those that are shown, with their pictures and what the page writes below them."""
    shown = half_right(traces)
    limits = limits_of(shown)
    return [
        {**trace, "right": is_right(trace), "svg": trace_plot(trace, limits), **_in_words(trace, limits)}
        for trace in shown
    ]


def half_right(traces: list[ValueTrace]) -> list[ValueTrace]:
    """At most MOST_TRACES, right and wrong ones by turns; one kind fills up what the other lacks."""
    right = [trace for trace in traces if is_right(trace)]
    wrong = [trace for trace in traces if not is_right(trace)]
    half = MOST_TRACES // 2
    shown_right = right[: max(half, MOST_TRACES - len(wrong))]
    shown_wrong = wrong[: max(half, MOST_TRACES - len(right))]
    return [trace for pair in zip_longest(shown_right, shown_wrong) for trace in pair if trace is not None]


def is_right(trace: ValueTrace) -> bool:
    return trace.get("label", trace["reward"] > 0)


def limits_of(traces: list[ValueTrace]) -> Limits:
    of_values = [[*trace.get("values", []), *trace.get("implied", []), trace["reward"]] for trace in traces]
    values = [x for found in of_values for x in found if x is not None]
    advantages = [abs(x) for trace in traces for x in trace.get("advantages", []) if x is not None]
    low, high = min([0.0, *values]), max([1.0, *values])
    margin = 0.05 * (high - low)
    return Limits((low - margin, high + margin), max([1e-3, *advantages]))


def trace_plot(trace: ValueTrace, limits: Limits, wide: int = WIDE) -> str:
    """One response: token i spans [i, i + 1], the value before it stands at i, and its advantage is a bar over it."""
    tokens, advantages = trace["tokens"], trace.get("advantages") or []

    def draw(figure):
        if advantages:
            upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        else:
            upper = lower = figure.subplots()
        for axis in {upper, lower}:
            _draw_steps(axis, trace, numbered=axis is upper)
            axis.grid(axis="x", visible=False)
        _draw_values(upper, trace)
        upper.set_ylim(*limits.value)
        upper.set_ylabel("value")
        upper.tick_params(axis="x", length=0)
        if advantages:
            heights = with_gaps(advantages)
            colors = [BAD if height < 0 else GOOD for height in heights]
            lower.bar(np.arange(len(heights)) + 0.5, heights, width=0.8, color=colors, linewidth=0)
            lower.axhline(0, color=GRID, linewidth=1)
            lower.set_ylim(-1.1 * limits.advantage, 1.1 * limits.advantage)
            lower.set_ylabel("advantage")
            lower.locator_params(axis="y", nbins=4)
        lower.set_xlim(0, max(len(tokens), 1))
        _label_tokens(lower, tokens, wide)

    what = "Value and advantage" if advantages else "Value"
    return inline_svg(draw, (wide, 270 if advantages else 190), f"{what} along the response")


def _draw_steps(axis, trace: ValueTrace, numbered: bool) -> None:
    """Lines between the steps and a shade over the first wrong one."""
    ends, wrong = trace.get("step_ends") or [], trace.get("first_wrong_step")
    for number, (start, end) in enumerate(zip([0, *ends], ends)):
        if end < len(trace["tokens"]):
            axis.axvline(end, color=GRID, linewidth=1)
        if number == wrong:
            axis.axvspan(start, end, color=BAD, alpha=0.16, linewidth=0)
        if numbered:
            label, color = (f"{number + 1} ✗", BAD) if number == wrong else (str(number + 1), MUTED)
            axis.text((start + end) / 2, 1.0, label, transform=axis.get_xaxis_transform(), color=color,
                      fontsize=9, ha="center", va="bottom")  # fmt: skip


def _draw_values(axis, trace: ValueTrace) -> None:
    """The implied value leads; a value model's is dashed, and all lines end in the outcome that came."""
    length, reward = len(trace["tokens"]), trace["reward"]
    implied, values = with_gaps(trace.get("implied") or []), with_gaps(trace.get("values") or [])
    before = implied[:-1] if len(implied) else values
    if len(implied) and len(values):
        axis.plot(range(len(values)), values, "--", color=SERIES[2], linewidth=1.4)
    if len(before):
        axis.plot(range(len(before)), before, color=SERIES[0])
        axis.plot([len(before) - 1, length], [before[-1], reward], color=MUTED, linewidth=1, linestyle=DOTS)
    right = is_right(trace)
    axis.plot(length, reward, "o" if right else "X", color=GOOD if right else BAD, markersize=7, clip_on=False)


def _in_words(trace: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """shades: of each token (whether it is blamed, percent of colour); step_sums: advantage of each step; lowest: its index;
    dashed: whether the value model's line is drawn beside the implied one."""
    advantages = trace.get("advantages") or []
    dashed = bool(trace.get("implied")) and bool(trace.get("values"))
    if not advantages:
        return {"shades": [], "step_sums": [], "lowest": None, "dashed": dashed}
    strength = [STRONGEST * abs(x) / limits.advantage if x is not None else 0.0 for x in advantages]
    shades = [(x is not None and x < 0, round(percent)) for x, percent in zip(advantages, strength)]
    ends = [end - 1 for end in trace.get("step_ends") or []]
    sums = step_sums(with_gaps(advantages), ends).tolist() if ends else []
    lowest = int(np.argmin(sums)) if len(sums) > 1 else None
    return {"shades": shades, "step_sums": sums, "lowest": lowest, "dashed": dashed}


def _label_tokens(axis, tokens: list[str], wide: int) -> None:
    shown = [token.replace("\n", "↵").replace(" ", "·")[:8] for token in tokens]
    room = (wide - 60) / max(len(tokens), 1)
    axis.tick_params(axis="x", length=0)
    if room < 7:  # too many to read
        axis.set_xlabel("token")
        return
    labels = axis.set_xticks(np.arange(len(tokens)) + 0.5, shown, fontsize=9, family="monospace")
    for token, tick in zip(shown, labels):
        tick.label1.set_rotation(0 if len(token) * 5.6 <= room else 90)
