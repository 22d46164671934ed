"""The table of `benchmarks.evidence.critics`: what every run came to, and whether it differs from the default."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.evidence.critic_runs import DEMONSTRATION
from benchmarks.evidence.methods import DECODINGS, per_problem
from benchmarks.evidence.study.statistics import paired_over_seeds
from benchmarks.evidence.study.tables import difference_text
from benchmarks.harness.environment import commit
from dqo.stats import paired_test
from dqo.train.record import machine

COMMAND = "python -m benchmarks.evidence.critics OUT --demonstration DIR"


def summarise(results: Sequence[tuple[Any, dict]], tasks: list[dict], default: str, missing: list[str]) -> dict:
    """What goes to critics.json. `results`: each run as it was planned (stage, task, variant, seed), with its result.json;
    `tasks`: the task.json of each."""
    screen = [
        {"critic": run.variant, "seed": run.seed, **stage}
        for run, found in results
        if run.stage == "screen"
        for stage in found["stages"]
        if stage["update"] > 0
    ]
    facts = {"command": COMMAND, "date": datetime.date.today().isoformat(), "commit": commit(), **machine()}
    facts |= {"tasks": tasks, "options": {run.variant: run.options for run, _ in results}}
    found = {"screen": screen, "policy": _compared(results, "policy", default)}
    found["lambda"] = _compared(results, "lambda", "lam-1.0-trajectory")
    return {**facts, **found, "not_run": missing}


def _compared(results: Sequence[tuple[Any, dict]], stage: str, default: str) -> list[dict]:
    """A row for each task and variant: means and ranges over its seeds, and against `default` on the seeds that both have."""
    of: dict[tuple[str, str], dict[int, dict]] = {}
    for run, found in results:
        if run.stage == stage:
            of.setdefault((run.task, run.variant), {})[run.seed] = found
    return [_row(task, variant, seeds, of.get((task, default), {})) for (task, variant), seeds in of.items()]


def _row(task: str, variant: str, seeds: dict[int, dict], default: dict[int, dict]) -> dict:
    runs = list(seeds.values())
    row: dict[str, Any] = {"task": task, "variant": variant, "seeds": sorted(seeds), "updates": runs[0]["updates"]}
    for name in ("cpu_seconds", "wall_seconds"):
        row[name] = float(np.mean([run[name] for run in runs]))
    last = [run["stages"][-1] for run in runs]
    for part in ("value", "log_ratio"):
        row[part] = {name: _mean([stage[part][name] for stage in last]) for name in last[0][part]}
    shared = sorted(seeds.keys() & default.keys())
    for decoding in DECODINGS:
        means = [float(per_problem(run[decoding]).mean()) for run in runs]
        row[decoding] = {"mean": float(np.mean(means)), "low": min(means), "high": max(means)}
        if shared and default is not seeds:
            pair = [np.array([per_problem(of[seed][decoding]) for seed in shared]) for of in (seeds, default)]
            test, over_seeds = paired_test(*(scores.mean(axis=0) for scores in pair)), paired_over_seeds(*pair)
            row[decoding] |= {"minus_default": test.difference, "low_95": test.low, "high_95": test.high}
            row[decoding] |= {"p_value": test.p_value}
            if over_seeds is not None:
                row[decoding]["over_seeds"] = over_seeds._asdict()
    return row


def _mean(values: list[float | None]) -> float | None:
    """None where a run has none."""
    return None if None in values else float(np.mean(values))  # type: ignore[arg-type]


def tables(summary: dict) -> str:
    """Markdown."""
    exact = [("exact chance", task["exact"]) for task in summary["tasks"] if task["name"] == DEMONSTRATION]
    found = [_screen_table(summary["screen"], exact)] if summary["screen"] else []
    found += [_policy_table(summary[stage]) for stage in ("policy", "lambda") if summary[stage]]
    if summary["not_run"]:
        found.append(f"Not run: {len(summary['not_run'])} runs, which are named in critics.json.")
    return "\n\n".join(found)


def _difference_text(told: dict[str, Any]) -> str:
    """With the 95 % interval over seeds, where there are several."""
    if "minus_default" not in told:
        return ""
    if "over_seeds" in told:
        return difference_text(told["over_seeds"])
    return f"{100 * told['minus_default']:+.1f}"


def _screen_table(rows: list[dict], exact: list[tuple[str, dict]]) -> str:
    head = (
        "| critic | updates | CPU s | explains, start | half | end | AUC, half | end | wrong step lowest | by chance |"
    )
    lines = [head, "|---" * 10 + "|"]
    found = [((name, "", ""), quality) for name, quality in exact]
    found += [((row["critic"], str(row["update"]), f"{row['cpu_seconds']:.0f}"), row["value"]) for row in rows]
    for names, of in found:
        cells = list(names)
        cells += [f"{of[f'explained_variance/{place}']:.3f}" for place in ("start", "half", "end")]
        cells += [f"{of[f'auc/{place}']:.2f}" for place in ("half", "end")]
        cells += [f"{of[f'changes/first_wrong_step{which}']:.0%}" for which in ("", "_chance")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _policy_table(rows: list[dict]) -> str:
    head = "| task | critic | seeds | greedy | sampling | greedy, minus default | sampling, minus default "
    lines = [head + "| updates | CPU s | critic explains, end | wrong step lowest: V | log-ratio |", "|---" * 12 + "|"]
    for row in rows:
        cells = [row["task"], row["variant"], str(len(row["seeds"]))]
        for decoding in DECODINGS:
            mean, low, high = (100 * row[decoding][key] for key in ("mean", "low", "high"))
            cells.append(f"{mean:.1f} ({low:.1f}–{high:.1f})")
        for decoding in DECODINGS:
            cells.append(_difference_text(row[decoding]))
        cells += [str(row["updates"]), f"{row['cpu_seconds']:.0f}", f"{row['value']['explained_variance/end']:.3f}"]
        cells.append(f"{row['value']['changes/first_wrong_step']:.0%}")
        cells.append(f"{row['log_ratio']['first_wrong_step']:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
