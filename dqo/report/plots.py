"""The plots of the report. An interval is a tuple (mean, low, high)."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import numpy as np

from dqo.report.curves import curve_groups, with_gaps
from dqo.report.schema import Decoding, Report, ValueTrace
from dqo.report.svg import BAD, DOTS, GOOD, GRID, INK, MUTED, SERIES, Series, assign_series, inline_svg

MOST_TRACES = 6


def draw_all(
    report: Report,
    headline: str | None,
    accuracies: Mapping[Decoding, dict],
    seeds: Mapping[Decoding, dict],
    passes: dict[str, dict],
    reliability: list,
) -> dict[str, Any]:
    """What the page draws, an empty string or list where there are no data.

    accuracies {decoding: {method: interval}}, seeds {decoding: {method: accuracy of each run}}, passes {method: {k: interval}},
    reliability [(prediction, interval of the outcome)].
    """
    curves, traces = report.get("curves", []), half_right(report.get("value_traces", []))
    names = [method["name"] for method in report.get("methods", [])]
    names += [curve["method"] for curve in curves if curve.get("method")]
    series = assign_series(list(dict.fromkeys(names)), headline, report.get("baseline"))
    limits = value_limits(traces)
    return {
        "series": series,
        "interval_plots": {
            kind: interval_plot(kind, panel, seeds.get(kind, {}), series) for kind, panel in accuracies.items()
        },
        "pass_plot": pass_at_k_plot(passes, series) if passes else "",
        "sampled": list(passes),
        "curves": curve_groups(curves, series),
        "reliability_plot": reliability_plot(reliability) if reliability else "",
        "traces": [{**trace, "svg": trace_plot(trace, limits)} for trace in traces],
    }


def interval_plot(title: str, panel: dict[str, tuple], seeds: dict[str, list[float]], series: dict[str, Series]) -> str:
    """Accuracies of one way of decoding with their intervals, {method: interval}, and those of each seed as rings."""
    names = [name for name in series if name in panel]

    def draw(figure):
        axis = figure.subplots()
        for row, name in enumerate(names):
            mean, low, high = (100 * x for x in panel[name])
            axis.plot([low, high], [row, row], color=series[name].color, linewidth=2.4)
            axis.plot(mean, row, "o", color=series[name].color, markersize=6.5)
            for one in seeds.get(name, []):
                axis.plot(100 * one, row + 0.28, "o", color=series[name].color, markersize=3.6, fillstyle="none")
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(axis="y", labelcolor=INK, length=0)
        axis.set_ylim(len(names) - 0.5, -0.5)
        left, right = axis.get_xlim()
        middle = (left + right) / 2
        axis.set_xlim(max(-2, min(left, middle - 10)), min(102, max(right, middle + 10)))
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel("problems solved, %")
        axis.grid(axis="y", visible=False)

    return inline_svg(draw, (350, 60 + 30 * len(names)), f"Accuracy of every method, {title}")


def pass_at_k_plot(curves: dict[str, dict[int, tuple]], series: dict[str, Series]) -> str:
    """curves: method -> {k: interval}."""
    ticks = sorted({k for curve in curves.values() for k in curve})

    def draw(figure):
        axis = figure.subplots()
        for name, curve in curves.items():
            mean, low, high = (100 * np.array(column) for column in zip(*curve.values()))
            axis.fill_between(list(curve), low, high, color=series[name].color, alpha=0.15, linewidth=0)
            axis.plot(list(curve), mean, series[name].line, color=series[name].color, marker="o", markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(k) for k in ticks])
        axis.set_xlabel("k, samples a problem")
        axis.set_ylabel("pass@k, %")

    return inline_svg(draw, (350, 250), "pass@k of every method")


def reliability_plot(points: list[tuple[float, tuple]]) -> str:
    """points: (mean prediction, interval of the mean outcome)."""

    def draw(figure):
        axis = figure.subplots()
        shown = [0, 1, *(x for mean, outcome in points for x in (mean, outcome[0]))]
        axis.plot([min(shown), max(shown)], [min(shown), max(shown)], color=MUTED, linewidth=1, linestyle=DOTS)
        for predicted, (mean, low, high) in points:
            axis.plot([predicted, predicted], [low, high], color=SERIES[0], linewidth=1.6)
            axis.plot(predicted, mean, "o", color=SERIES[0], markersize=6)
        axis.set_aspect("equal")
        axis.set_xlabel("predicted value")
        axis.set_ylabel("mean outcome")

    return inline_svg(draw, (350, 330), "Predicted value against outcome")


def trace_plot(trace: ValueTrace, limits: tuple[float, float], size: tuple[int, int] = (540, 190)) -> str:
    """The value along one response: token i spans [i, i + 1], and the value before it stands at i. An implied value comes first,
    and the value model's, where there is one, is dashed."""
    tokens, values, ends = trace["tokens"], with_gaps(trace["values"]), trace.get("step_ends") or []
    implied = with_gaps(trace.get("implied") or [])
    wrong = trace.get("first_wrong_step")
    step_starts = [0, *ends][: len(ends)]

    def draw(figure):
        axis = figure.subplots()
        if wrong is not None and wrong < len(ends):
            axis.axvspan(step_starts[wrong], ends[wrong], color=BAD, alpha=0.16, linewidth=0)
        for number, (start, end) in enumerate(zip(step_starts, ends)):
            if end < len(tokens):
                axis.axvline(end, color=GRID, linewidth=1)
            label = f"{number + 1} ✗" if number == wrong else str(number + 1)
            color = BAD if number == wrong else MUTED
            axis.text((start + end) / 2, 1.0, label, transform=axis.get_xaxis_transform(), color=color,
                      fontsize=9, ha="center", va="bottom")  # fmt: skip
        right = trace["reward"] > 0
        if len(implied):
            axis.plot(range(len(values)), values, "--", color=SERIES[1])
            axis.plot([len(tokens)] * 2, [implied[-1], trace["reward"]], color=INK, linewidth=1.2, linestyle=DOTS)
            axis.plot(range(len(implied)), implied, color=SERIES[0])
        else:
            axis.plot([*range(len(values)), len(tokens)], [*values, trace["reward"]], color=MUTED, linewidth=1,
                      linestyle=DOTS)  # fmt: skip
            axis.plot(range(len(values)), values, color=SERIES[0])
        axis.plot(len(tokens), trace["reward"], "o" if right else "X", color=GOOD if right else BAD,
                  markersize=7, clip_on=False)  # fmt: skip
        axis.set_xlim(0, max(len(tokens), 1))
        axis.set_ylim(*limits)
        axis.set_ylabel("value")
        axis.grid(axis="x", visible=False)
        _label_tokens(axis, tokens, size[0])

    return inline_svg(draw, size, "Value along the response")


def half_right(traces: list[ValueTrace]) -> list[ValueTrace]:
    """At most MOST_TRACES, right and wrong ones by turns; one kind fills up what the other lacks."""
    right = [trace for trace in traces if trace["reward"] > 0]
    wrong = [trace for trace in traces if trace["reward"] <= 0]
    half = MOST_TRACES // 2
    shown_right = right[: max(half, MOST_TRACES - len(wrong))]
    shown_wrong = wrong[: max(half, MOST_TRACES - len(right))]
    return [trace for pair in zip_longest(shown_right, shown_wrong) for trace in pair if trace is not None]


def value_limits(traces: list[ValueTrace]) -> tuple[float, float]:
    """One scale for all traces, so that they can be compared."""
    lines = [(*trace["values"], *(trace.get("implied") or ()), trace["reward"]) for trace in traces]
    shown = [x for line in lines for x in line if x is not None]
    low, high = min([0.0, *shown]), max([1.0, *shown])
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


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
