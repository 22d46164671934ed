"""The plots of the report: matplotlib figures as inline SVG with the colours and fonts of the page.

A figure is drawn with the light palette below; on the way out every colour of the palette becomes a reference
to the page's variable of that role, so that one SVG is legible in light and in dark. An interval is a tuple
(mean, low, high).
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Any
from zlib import crc32

import numpy as np

from dqo.report.schema import Curve, Decoding, Report, ValueTrace

INK, MUTED, GRID = "#3d4248", "#6b7178", "#d3d6da"
GOOD, BAD = "#00805d", "#c84b00"
# After Okabe and Ito, whose hues stay apart in the common forms of colour blindness, darkened where a line on
# white needs it. The first is for the headline method, the second, grey, for the baseline.
SERIES = ("#0072b2", "#7a7a7a", "#c47a00", "#009e74", "#b3588f", "#3399d1", "#8a6d3b", "#5b5ea6")
ROLES = {INK: "ink-2", MUTED: "muted", GRID: "grid", GOOD: "good", BAD: "bad"} | {
    color: f"series-{i}" for i, color in enumerate(SERIES)
}
LINES = ("-", "-", "--", ":", "--", ":", "--", ":")  # so that colour is never the only difference
DOTS = (0, (2, 3))
MOST_TRACES = 6
MOST_POINTS = 80  # of a curve; beyond it neighbours are averaged
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dqo",
    "text.parse_math": False,  # tokens and names may contain dollar signs
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "text.color": INK,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
STYLE |= dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GRID)
STYLE |= dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED)
STYLE |= dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 10)


@dataclass(frozen=True)
class Series:
    """What a method looks like in every plot."""

    index: int

    @property
    def color(self) -> str:
        return SERIES[self.index % len(SERIES)]

    @property
    def line(self) -> str:
        return LINES[self.index % len(LINES)]

    @property
    def variable(self) -> str:
        return f"var(--series-{self.index % len(SERIES)})"

    @property
    def border(self) -> str:
        return {"-": "solid", "--": "dashed", ":": "dotted"}[self.line]


def assign_series(names: Sequence[str], headline: str | None, baseline: str | None) -> dict[str, Series]:
    """The headline method is always blue and the baseline always grey, whatever the others are."""
    others = [name for name in names if name not in (headline, baseline)]
    order = {headline: 0, baseline: 1} | {name: 2 + i for i, name in enumerate(others)}
    return {name: Series(order[name]) for name in names}


def draw_all(
    report: Report,
    headline: str | None,
    accuracies: Mapping[Decoding, dict],
    passes: dict[str, dict],
    reliability: list,
) -> dict[str, Any]:
    """What the page draws, an empty string or list where there are no data.

    accuracies {decoding: {method: interval}}, passes {method: {k: interval}}, reliability [(prediction,
    interval of the outcome)].
    """
    curves, traces = report.get("curves", []), half_right(report.get("value_traces", []))
    names = [method["name"] for method in report.get("methods", [])]
    names += [curve["method"] for curve in curves if curve.get("method")]
    series = assign_series(list(dict.fromkeys(names)), headline, report.get("baseline"))
    limits = value_limits(traces)
    return {
        "series": series,
        "interval_plot": interval_plot(accuracies, series) if accuracies else "",
        "pass_plot": pass_at_k_plot(passes, series) if passes else "",
        "sampled": list(passes),
        "curves": curve_groups(curves, series),
        "reliability_plot": reliability_plot(reliability) if reliability else "",
        "traces": [{**trace, "svg": trace_plot(trace, limits)} for trace in traces],
    }


def interval_plot(panels: Mapping[Decoding, dict[str, tuple]], series: dict[str, Series]) -> str:
    """Accuracies with their intervals, a panel a way of decoding: {"greedy": {method: interval}}."""
    names = [name for name in series if any(name in panel for panel in panels.values())]

    def draw(figure):
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, panel) in zip(axes, panels.items()):
            for row, name in enumerate(names):
                if name in panel:
                    mean, low, high = (100 * x for x in panel[name])
                    axis.plot([low, high], [row, row], color=series[name].color, linewidth=2.4)
                    axis.plot(mean, row, "o", color=series[name].color, markersize=6.5)
            axis.set_title(title.capitalize(), fontsize=11, loc="left", color=INK, fontweight="bold")
            axis.set_yticks(range(len(names)), names)
            axis.tick_params(axis="y", labelcolor=INK, length=0)
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.set_xlabel("problems solved, %")
            axis.grid(axis="y", visible=False)

    return inline_svg(draw, (900, 70 + 26 * len(names)), "Accuracy of every method with its interval")


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

    return inline_svg(draw, (520, 300), "pass@k of every method")


def curve_groups(curves: list[Curve], series: dict[str, Series]) -> list[dict]:
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve["name"], []).append(curve)
    return [
        {"name": name, "how_to_read": members[0].get("how_to_read"), "svg": curve_plot(name, members, series)}
        for name, members in groups.items()
    ]


def curve_plot(name: str, curves: list[Curve], series: dict[str, Series]) -> str:
    """curves: of one quantity, {"method", "x", "y"}; y may hold None."""

    def draw(figure):
        axis = figure.subplots()
        for curve in curves:
            look = series.get(curve.get("method", ""), Series(0))
            x, y = thin(curve["x"], curve["y"])
            axis.plot(x, y, look.line, color=look.color, marker="." if len(x) < 12 else None)
        axis.margins(x=0.02)
        axis.set_xlabel(curves[0].get("x_label", "update"))

    return inline_svg(draw, (350, 210), name)


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


def trace_plot(trace: ValueTrace, limits: tuple[float, float]) -> str:
    """The value along one response: token i spans [i, i + 1], and the value before it stands at i."""
    tokens, values, ends = trace["tokens"], _with_gaps(trace["values"]), trace.get("step_ends") or []
    wrong = trace.get("first_wrong_step")
    wide, high = 540, 190
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
        axis.plot([*range(len(values)), len(tokens)], [*values, trace["reward"]], color=MUTED, linewidth=1,
                  linestyle=DOTS)  # fmt: skip
        axis.plot(range(len(values)), values, color=SERIES[0])
        axis.plot(len(tokens), trace["reward"], "o" if right else "X", color=GOOD if right else BAD,
                  markersize=7, clip_on=False)  # fmt: skip
        axis.set_xlim(0, max(len(tokens), 1))
        axis.set_ylim(*limits)
        axis.set_ylabel("value")
        axis.grid(axis="x", visible=False)
        _label_tokens(axis, tokens, wide)

    return inline_svg(draw, (wide, high), "Value along the response")


def thin(x: Sequence[float], y: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points, each the mean of as many neighbours; a mean skips missing values."""
    at, values = np.asarray(x, float), _with_gaps(y)
    if at.shape != values.shape:
        raise ValueError(f"a curve has {len(at)} x values and {len(values)} y values")
    if len(at) <= MOST_POINTS:
        return at, values
    block = np.arange(len(at)) * MOST_POINTS // len(at)
    seen = ~np.isnan(values)
    counts = np.bincount(block, weights=seen)
    sums = np.bincount(block, weights=np.where(seen, values, 0))
    means = np.divide(sums, counts, out=np.full(MOST_POINTS, np.nan), where=counts > 0)
    return np.bincount(block, weights=at) / np.bincount(block), means


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
    shown = [x for trace in traces for x in (*trace["values"], trace["reward"]) if x is not None]
    low, high = min([0.0, *shown]), max([1.0, *shown])
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _with_gaps(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)


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


def inline_svg(draw: Callable, size: tuple[int, int], label: str) -> str:
    """`size` is in CSS pixels: a point of the figure is a pixel of the page."""
    from io import StringIO

    import matplotlib
    from matplotlib.figure import Figure

    buffer = StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(size[0] / 72, size[1] / 72))
        draw(figure)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _for_the_page(buffer.getvalue(), label)


def _for_the_page(svg: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    # Its style element would apply to the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    # Ids of one page must differ: matplotlib starts anew with every figure.
    prefix = f"p{crc32(svg.encode()):x}-"

    def adapt(tag: re.Match) -> str:
        markup = re.sub(r'^<g id="[^"]*"', "<g", tag.group())
        markup = re.sub(r'\b(id="|url\(#|href="#)', rf"\1{prefix}", markup)
        markup = re.sub(r' transform="rotate\(-0 [^"]*"', "", markup)
        markup = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number.group()):.2f}", markup)
        for color, role in ROLES.items():
            markup = markup.replace(color, f"var(--{role}, {color})")
        # The page's fonts instead of matplotlib's list of them.
        markup = re.sub(r"'DejaVu Sans Mono'[^;\"]*", "var(--mono)", markup)
        return re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", markup)

    # Tags only: the text between them belongs to the user.
    svg = re.sub(r"<[^>]+>", adapt, svg)
    svg = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
