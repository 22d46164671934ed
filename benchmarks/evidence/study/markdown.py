"""The study's tables as docs/evidence_results.md and docs/evidence_more.md have them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.evidence.pieces import head
from benchmarks.evidence.study.settings import METHODS
from benchmarks.evidence.study.sizes import PRIMARY, TASKS, title_of
from benchmarks.evidence.study.tables import ADDED, ADDED_BY_TASK

Row = dict[str, Any]
MEASURES = ("accuracy", "greedy", "sampling")
TOLD = 0.7  # a corrected p value above this says nothing
NO_PLACE = "no place"


def markdown(summary: dict[str, Any]) -> str:
    lines = ["# The study", "", *head(summary), "", "## All tasks", "", *overview(summary["rows"])]
    for task, rows in summary["rows"].items():
        lines += ["", f"## {task}: {title_of(task)}", "", *table_of(task, rows), *_control(rows)]
    lines += ["", "## Chosen in advance", "", *claims_table(summary["claims"])]
    for claim in summary["confirmed"]:
        lines += ["", f"## New seeds, {claim['title']}", "", *confirmed_table(claim)]
    if summary["confirmed"]:
        lines += ["", *claims_table(summary["confirmed"])]
    if summary["ablations"]:
        lines += ["", "## Ablations", "", *ablations_table(summary["ablations"])]
    return "\n".join(lines) + "\n"


def overview(rows: dict[str, list[Row]]) -> list[str]:
    """Accuracy of every method on every task, with half of its interval over seeds; and of those that were run on all tasks that
    are tuned, the mean over these tasks and the lowest seed. The best of a column is bold."""
    found = {(row["method"], task): row["accuracy"] for task, of_task in rows.items() for row in of_task}
    best = {task: max(of_task, key=lambda row: row["accuracy"]["mean"])["method"] for task, of_task in rows.items()}

    def cell(method: str, task: str) -> str:
        told = found.get((method, task))
        if told is None:
            return ""
        mean = f"{100 * told['mean']:.1f}"
        half = f" ± {100 * (told['high'] - told['mean']):.1f}" if "low" in told else ""
        return (f"**{mean}**" if best[task] == method else mean) + half

    names = [name for name in ("base", *METHODS) if any((name, task) in found for task in rows)]
    own = [task for task in rows if TASKS[task].tuned_on is None]
    all_tasks = {
        name: [found[name, task] for task in own] for name in names if all((name, task) in found for task in own)
    }
    means = {name: sum(told["mean"] for told in of_tasks) / len(own) for name, of_tasks in all_tasks.items()}
    lowest = {name: min(seed for told in of_tasks for seed in told["of_seeds"]) for name, of_tasks in all_tasks.items()}

    def summary(name: str) -> list[str]:
        if name not in means:
            return ["", ""]
        return [
            _bold(f"{100 * of[name]:.{digits}f}", of[name] == max(of.values()))
            for of, digits in ((means, 1), (lowest, 0))
        ]

    body = ([_named(name), *(cell(name, task) for task in rows), *summary(name)] for name in names)
    return _lines(["method", *(f"`{task}`" for task in rows), f"mean of {len(own)}", "lowest seed"], body)


def table_of(task: str, rows: Sequence[Row]) -> list[str]:
    """Differences are those of the task's contender, and of what was not chosen in advance."""
    contenders = dict.fromkeys((PRIMARY.get(task, "dqo"), ADDED_BY_TASK.get(task, ADDED), ADDED))
    return _table(rows, [name for name in contenders if any(f"{name} ahead" in row for row in rows)][:2])


def confirmed_table(claim: Row) -> list[str]:
    """Each p value is that of one rival, not corrected: all must hold."""
    return _table(claim["rows"], [claim["contender"]], p="p_value")


def _table(rows: Sequence[Row], contenders: Sequence[str], p: str = "holm") -> list[str]:
    judged = [f"verdict on `{contenders[0]}`"] if any("verdict" in row for row in rows) else []
    heads = ["method", *MEASURES, "by seed", *(f"`{name}` ahead" for name in contenders), *judged, "CPU s", "setting"]
    best = {name: max(row[name]["mean"] for row in rows) for name in MEASURES}
    body = []
    for row in rows:
        means = [_bold(f"{100 * row[name]['mean']:.1f}", row[name]["mean"] == best[name]) for name in MEASURES]
        means[0] += _between(row["accuracy"], "–")
        seeds = ", ".join(f"{100 * mean:.0f}" for mean in row["accuracy"]["of_seeds"])
        gaps = [difference_text(row.get(f"{name} ahead"), p) for name in contenders]
        verdict = [{"does not earn its place": NO_PLACE}.get(told := row.get("verdict", ""), told)] if judged else []
        cost = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else ""
        body.append([_named(row["method"]), *means, seeds, *gaps, *verdict, cost, _setting(row)])
    return _lines(heads, body)


def interval_text(told: dict[str, float], digits: int) -> str:
    return f"{100 * told['mean']:.{digits}f}" + _between(told, " to ", digits)


def difference_text(told: dict[str, float] | None, p: str = "holm") -> str:
    if told is None:
        return ""
    text = (f"{100 * told['mean']:+.1f}" + _between(told, " to ")).replace("-", "−")
    return text + (f", p {told[p]:.2g}" if told.get(p, 1.0) < TOLD else "")


def claims_table(rows: Sequence[Row]) -> list[str]:
    """A line for each claim. "decided by" is the rival whose p value the claim has, where that is told."""
    body, titles = [], ["task", "contender", "nearest rival", "contender ahead by"]
    titles += ["decided by"] if any("decided_by" in row for row in rows) else []
    for row in rows:
        known = ["" if row.get(key) is None else f"{row[key]:.2g}" for key in ("p_value", "holm")]
        verdict = "" if "holds" not in row else "holds" if row["holds"] else "does not hold"
        nearest = _named(row["nearest"]) if row["nearest"] else ""
        decided = [_named(row["decided_by"])] if "decided by" in titles else []
        line = [f"`{row['task']}`", _named(row["contender"]), nearest, difference_text(row["by"]), *decided]
        body.append([*line, *known, verdict])
    return _lines([*titles, "p", "p by Holm", "claim"], body)


def ablations_table(rows: Sequence[Row]) -> list[str]:
    """A line for each change: the points of accuracy that it adds, mean and by seed, task by task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    found = {(row["task"], row["change"]): row for row in rows}

    def cells(row: Row | None) -> list[str]:
        if row is None:
            return ["", "", ""]
        gaps = [100 * gap for gap in row["accuracy"]]
        told = [f"{sum(gaps) / len(gaps):+.1f}", ", ".join(f"{gap:+.1f}" for gap in gaps)]
        return [*(text.replace("-", "−") for text in told), f"{row['cpu_seconds']:.0f}"]

    heads = [f"`{task}`{what}" for task in tasks for what in (": mean", ", by seed", ", CPU s")]
    changes = dict.fromkeys(row["change"] for row in rows)
    body = ([change, *(cell for task in tasks for cell in cells(found.get((task, change))))] for change in changes)
    return _lines(["change", *heads], body)


def _control(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if control := row.get("control"):
            gaps = f"{difference_text(control)} over the base, {difference_text(control['over sft'])} over sft"
            lines += ["", f"Shuffled rewards: {gaps}."]
            lines += ["**The gains of this table are suspect.**"] * control["suspect"]
    return lines


def _lines(heads: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
        *("| " + " | ".join(row) + " |" for row in body),
    ]


def _named(method: str) -> str:
    return method if method == "base" else f"`{method}`"


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def _between(told: dict[str, float], word: str, digits: int = 1) -> str:
    if "low" not in told:
        return ""
    return f" ({100 * told['low']:.{digits}f}{word}{100 * told['high']:.{digits}f})".replace("-", "−")


def _setting(row: Row) -> str:
    """The values alone: the page's table of settings has their names."""
    told = ", ".join(map(_value, (row.get("setting") or {}).values()))
    ended = "1 ended itself" if row.get("failed") == 1 else f"{row.get('failed')} ended themselves"
    return f"{told}; {ended}" if row.get("failed") else told


def _value(value: Any) -> str:
    if not isinstance(value, float) or value >= 1e-2:
        return f"{value:g}" if isinstance(value, float) else str(value)
    exponent = math.floor(math.log10(value))
    return f"{round(value / 10.0**exponent, 3):g}e{exponent}"
