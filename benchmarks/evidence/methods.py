"""The demonstration over several seeds: the table and the plot of the README.

    python -m benchmarks.evidence.methods                 (about five minutes a seed on one core)

Runs `dqo-train --seed S` for every seed whose report.json is not there yet, then writes methods.json and methods.svg
to benchmarks/results and prints the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.harness.environment import commit
from dqo.demo.recipe import SHOWN
from dqo.stats import accuracy_interval, paired_test

RESULTS = Path(__file__).parents[1] / "results"
DECODINGS = ("greedy", "sampling")
# {what a row has: (its name, factor, limits)}
PANELS = {name: (f"{name} accuracy, %", 100, (0, 100)) for name in DECODINGS}


def run_seeds(directory: Path, seeds: list[int]) -> dict[int, dict]:
    """{seed: report.json}."""
    reports = {}
    for seed in seeds:
        output = directory / f"seed-{seed}"
        if not (output / "report.json").exists():
            command = [sys.executable, "-m", "dqo", "demo", "--output_dir", str(output), "--seed", str(seed)]
            subprocess.run(command, check=True)
        reports[seed] = json.loads((output / "report.json").read_text())
    return reports


def summarise(reports: dict[int, dict]) -> dict:
    """Accuracy with interval by method, decoding and seed, and the paired test of DQO against the methods that read the same."""
    rows = []
    for seed, report in reports.items():
        methods = {method["name"]: method for method in report["methods"]}
        for name, method in methods.items():
            row = {"seed": seed, "method": name, "seconds": method.get("seconds")}
            for decoding in DECODINGS:
                interval = accuracy_interval(method[decoding])
                row[decoding] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
                if name not in SHOWN:
                    paired = paired_test(*(per_problem(m[decoding]) for m in (methods[contender_of(name)], method)))
                    row[decoding] |= {"ahead_of_this": paired.difference, "p_value": paired.p_value}
            rows.append(row)
    first = next(iter(reports.values()))
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": first["device"],
        "versions": first["versions"],
        "command": "python -m benchmarks.evidence.methods",
        "wall_seconds": {seed: report["wall_seconds"] for seed, report in reports.items()},
        "rows": rows,
    }


def contender_of(name: str) -> str:
    """The row of DQO that reads what a method reads."""
    return next((shown for shown in SHOWN if shown.split("-")[1:] == name.split("-")[1:]), "dqo")


def per_problem(scores: list) -> np.ndarray:
    """(P,): the score, or the mean over samples, of each problem."""
    scores = np.asarray(scores, float)
    return scores if scores.ndim == 1 else scores.mean(axis=1)


def table(summary: dict) -> str:
    """Markdown: greedy / sampling accuracy by seed and their means, and how far DQO is ahead on the same data (worst p value)."""
    seeds = list(dict.fromkeys(row["seed"] for row in summary["rows"]))
    heads = ["method", *(f"seed {seed}" for seed in seeds), "mean"]
    heads += [f"DQO ahead, {decoding} (largest p)" for decoding in DECODINGS]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(row["method"] for row in summary["rows"]):
        rows = [row for row in summary["rows"] if row["method"] == name]
        means = np.array([[100 * row[decoding]["mean"] for decoding in DECODINGS] for row in rows])
        cells = [name, *(f"{greedy:.1f} / {sampling:.1f}" for greedy, sampling in (*means, means.mean(axis=0)))]
        for decoding in DECODINGS:
            gaps = [100 * row[decoding]["ahead_of_this"] for row in rows if "ahead_of_this" in row[decoding]]
            worst = max((row[decoding].get("p_value", 0.0) for row in rows), default=0.0)
            cells.append(f"{np.mean(gaps):+.1f} ({worst:.1g})" if gaps else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path, panels: dict[str, tuple] = PANELS) -> None:
    """Means and intervals by method, one panel a measure; a method without the measure has none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["method"] for row in rows))
    grey = "#808080"  # readable on white and on black
    plt.rcParams.update({"svg.fonttype": "none", "text.color": grey, "axes.labelcolor": grey, "axes.edgecolor": grey})
    plt.rcParams.update({"xtick.color": grey, "ytick.color": grey, "font.family": "sans-serif", "svg.hashsalt": "dqo"})
    figure, axes = plt.subplots(1, len(panels), figsize=(8.5, 1.35 + 0.25 * len(names)), sharey=True)
    for panel, (measure, (title, factor, limits)) in zip(axes, panels.items()):
        for y, name in enumerate(names):
            runs = [row for row in rows if row["method"] == name and row.get(measure)]
            for offset, row in zip(np.linspace(-0.2, 0.2, len(runs)) if len(runs) > 1 else [0.0], runs):
                low, mean, high = (factor * row[measure][key] for key in ("low", "mean", "high"))
                colour = "#d55e00" if name.startswith("dqo") else "#0072b2"
                panel.errorbar(mean, y + offset, xerr=[[mean - low], [high - mean]], fmt="o", ms=4, color=colour, lw=1)
        panel.set_yticks(range(len(names)), names)
        panel.set_xlabel(title)
        panel.set_xlim(*limits)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--directory", type=Path, default=Path("out/methods"))
    arguments = parser.parse_args()
    summary = summarise(run_seeds(arguments.directory, arguments.seeds))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "methods.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(summary["rows"], RESULTS / "methods.svg")
    print(table(summary))


if __name__ == "__main__":
    main()
