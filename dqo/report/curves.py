"""Curves over the training: the runs of all methods over each other, on axes that do not make mountains of noise."""

from collections.abc import Sequence

import numpy as np

from dqo.report.schema import Curve
from dqo.report.svg import GRID, MUTED, Series, inline_svg

MOST_POINTS = 80  # of a curve; beyond it neighbours are averaged
ALONE = {"loss", "loss/policy", "grad_norm"}  # the levels of different methods do not compare: a plot a method
# The least that an axis shows: a change that is small beside it looks small. All other axes show 0.
LEAST = {
    "kl": (0.0, 0.01),
    "entropy": (0.0, 0.1),
    "rewards/margins": (-0.05, 0.05),
    "rewards/chosen": (-0.05, 0.05),
    "rewards/rejected": (-0.05, 0.05),
    "rewards/accuracies": (0.0, 1.0),
    "value/explained_variance": (0.0, 1.0),
    "sampling/importance_sampling_ratio/mean": (0.0, 2.0),
    "importance_weight/effective_sample_share": (0.0, 1.0),
    "importance_weight/clipped_frac": (0.0, 1.0),
    "grad_norm": (0.0, 0.1),
    "critic/grad_norm": (0.0, 0.1),
}


def curve_groups(curves: list[Curve], series: dict[str, Series]) -> list[dict]:
    """A plot for each quantity; of ALONE, for each quantity and method."""
    several = len({curve.get("method") for curve in curves}) > 1
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        alone = several and curve["name"] in ALONE
        groups.setdefault((curve["name"], curve.get("method", "") if alone else ""), []).append(curve)
    return [
        {
            "name": name,
            "method": method,
            "how_to_read": members[0].get("how_to_read"),
            "warmup": max(curve.get("warmup", 0) for curve in members) > 0,
            "svg": curve_plot(name, members, series),
        }
        for (name, method), members in groups.items()
    ]


def curve_plot(name: str, curves: list[Curve], series: dict[str, Series]) -> str:
    """curves: of one quantity, {"method", "x", "y"}; y may hold None. Those of several seeds are thin, under their mean."""
    by_method: dict[str, list[Curve]] = {}
    for curve in curves:
        by_method.setdefault(curve.get("method", ""), []).append(curve)
    drawn: list[np.ndarray] = []

    def draw(figure):
        axis = figure.subplots()
        warmup = max(curve.get("warmup", 0) for curve in curves)
        if warmup:
            axis.axvspan(0, warmup, color=GRID, alpha=0.45, linewidth=0)
            axis.text(
                0, 1.01, "value warm-up", transform=axis.get_xaxis_transform(), color=MUTED, fontsize=10.5, va="bottom"
            )
        for method, members in by_method.items():
            look = series.get(method, Series(0))
            lines = [thin(curve["x"], curve["y"]) for curve in members]
            if len(lines) > 1:
                for x, y in lines:
                    axis.plot(x, y, color=look.color, linewidth=0.8, alpha=0.35)
                lines = [*lines, mean_line(lines)]
            x, y = lines[-1]
            axis.plot(x, y, look.line, color=look.color, marker="." if len(x) < 12 else None)
            drawn.extend(values for _, values in lines)
        axis.set_ylim(*axis_limits(name, np.concatenate(drawn)))
        axis.margins(x=0.02)
        axis.set_xlim(left=min(0, axis.get_xlim()[0]))
        axis.locator_params(axis="y", nbins=5)
        axis.locator_params(axis="x", nbins=6, integer=True)
        axis.set_xlabel(curves[0].get("x_label", "update"))

    return inline_svg(draw, (350, 210), name)


def axis_limits(name: str, values: np.ndarray) -> tuple[float, float]:
    """Of the y axis: all values, 0, and the least that LEAST names, with a small margin. values (N,), NaN where there is none."""
    seen = values[np.isfinite(values)]
    least = LEAST.get(name, (0.0, 0.0))
    low, high = min([least[0], *seen.tolist()]), max([least[1], *seen.tolist()])
    if low == high:
        low, high = low - 0.5, high + 0.5
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def mean_line(lines: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of several lines at each x that all of them have; of lines that share none, the last one."""
    shared = sorted(set.intersection(*(set(x.tolist()) for x, _ in lines)))
    if not shared:
        return lines[-1]
    columns = [dict(zip(x.tolist(), y.tolist())) for x, y in lines]
    return np.array(shared), np.array([[column[x] for column in columns] for x in shared]).mean(axis=1)


def thin(x: Sequence[float], y: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points, each the mean of as many neighbours; a mean skips missing values."""
    at, values = np.asarray(x, float), with_gaps(y)
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


def with_gaps(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)
