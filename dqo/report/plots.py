"""The plots of the report. An interval is a tuple (mean, low, high)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dqo.report.curves import curve_groups
from dqo.report.schema import Decoding, Report
from dqo.report.svg import DOTS, INK, MUTED, SERIES, Series, assign_series, inline_svg
from dqo.report.traces import trace_views


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
    curves = report.get("curves", [])
    names = [method["name"] for method in report.get("methods", [])]
    names += [curve["method"] for curve in curves if curve.get("method")]
    series = assign_series(list(dict.fromkeys(names)), headline, report.get("baseline"))
    return {
        "series": series,
        "interval_plots": {
            kind: interval_plot(kind, panel, seeds.get(kind, {}), series) for kind, panel in accuracies.items()
        },
        "pass_plot": pass_at_k_plot(passes, series) if passes else "",
        "sampled": list(passes),
        "curves": curve_groups(curves, series),
        "reliability_plot": reliability_plot(reliability) if reliability else "",
        "traces": trace_views(report.get("value_traces", [])),
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
