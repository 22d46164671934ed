"""The study's plots: accuracy of every method on every task, and what each change of the ablations does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.study.sizes import title_of

WIDE = 3  # panels beside one another
GREY, OURS, OTHERS = "#808080", "#d55e00", "#0072b2"  # grey is readable on white and on black


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY})
    plt.rcParams.update({"xtick.color": GREY, "ytick.color": GREY, "font.family": "sans-serif", "svg.hashsalt": "dqo"})
    plt.rcParams.update({"axes.titlecolor": GREY})
    return plt


def _finish(panel, names: list[str], label: str) -> None:
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel(label)
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.invert_yaxis()


def draw_tasks(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel for each task: the seeds of each method as dots, their mean with its interval as a bar."""
    plt = _pyplot()
    tall = max(len(found) for found in rows.values())
    wide, high = min(WIDE, len(rows)), math.ceil(len(rows) / WIDE)
    figure, panels = plt.subplots(high, wide, figsize=(4 * wide, high * (1 + 0.28 * tall)), squeeze=False)
    for panel in panels.flat[len(rows) :]:
        panel.axis("off")
    for panel, (task, found) in zip(panels.flat, rows.items()):
        for y, row in enumerate(found):
            told, colour = row["accuracy"], OURS if row["method"].startswith("dqo") else OTHERS
            means = 100 * np.array(told["of_seeds"])
            panel.plot(means, np.full(len(means), y), "o", ms=3, alpha=0.5, color=colour)
            if "low" in told:
                panel.plot([max(0, 100 * told["low"]), min(100, 100 * told["high"])], [y, y], lw=1.5, color=colour)
            panel.plot(100 * told["mean"], y, "|", ms=10, color=colour)
        panel.set_title(f"{task}: {title_of(task)}", fontsize=10)
        panel.set_xlim(0, 100)
        _finish(panel, [row["method"] for row in found], "accuracy, %")
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def draw_ablations(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each task: the change of accuracy in points, a dot a seed."""
    plt = _pyplot()
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 5), squeeze=False)
    for panel, task in zip(panels[0], tasks):
        found = [row for row in rows if row["task"] == task]
        for y, row in enumerate(found):
            gaps = 100 * np.array(row["accuracy"])
            panel.plot(gaps, np.full(len(gaps), y), "o", ms=4, color=OURS)
            panel.plot(gaps.mean(), y, "|", ms=10, color=OURS)
        panel.axvline(0, color=GREY, lw=1)
        panel.set_title(f"{task}: {title_of(task)}", fontsize=10)
        _finish(panel, [row["change"] for row in found], "points of accuracy")
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)
