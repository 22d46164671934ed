"""The table of `benchmarks.evidence.critics`: what every run came to, and whether it differs from the default."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.methods import DECODINGS, per_problem
from benchmarks.evidence.study.markdown import difference_text
from benchmarks.evidence.study.statistics import paired_over_seeds
from benchmarks.harness.environment import commit
from dqo.errors import UserError
from dqo.stats import paired_test
from dqo.train.record import machine

COMMAND = "python -m benchmarks.evidence.critics OUT --demonstration DIR --record"
STAGES = ("screen", "policy", "lambda")


def summarise(results: Sequence[tuple[Any, dict]], tasks: list[dict], default: str, common: dict[str, Any]) -> dict:
    """What OUT tells to critics.json. `results`: each run as it was planned (stage, task, variant, seed, options), with its
    result.json; `tasks`: the task.json of each; `common`: options that all have. A row's "recorded" says when and where."""
    facts = {"date": datetime.date.today().isoformat(), "commit": commit(), **machine()}
    bases = bases_of(tasks)
    rows: dict[str, list[dict]] = {stage: [] for stage in STAGES}
    of: dict[tuple[str, str, str], dict[int, dict]] = {}
    for run, found in results:
        if run.stage == "screen":
            looks = [stage for stage in found["stages"] if stage["update"] > 0]
            rows["screen"] += [
                {"task": run.task, "variant": run.variant, "seeds": [run.seed], **look} for look in looks
            ]
        else:
            of.setdefault((run.stage, run.task, run.variant), {})[run.seed] = found
    for (stage, task, variant), seeds in of.items():
        against = of.get((stage, task, default if stage == "policy" else "lam-1.0-trajectory"), {})
        rows[stage].append(_row(task, variant, seeds, against))
    options = {(run.stage, run.variant): common | run.options for run, _ in results}
    for stage, of_stage in rows.items():
        for row in of_stage:
            row |= {"options": options[stage, row["variant"]], "base": bases.get(row["task"]), "recorded": facts}
    return {"command": COMMAND, **facts, "tasks": tasks, **rows}


def bases_of(tasks: Sequence[dict]) -> dict[str, Any]:
    """{name of a task: the accuracies of its base model}, by which base models are told apart."""
    return {task["name"]: task.get("base") for task in tasks}


def read(path: Path) -> dict | None:
    """critics.json, or None where there is none. An earlier version told the base of a task, and of no row."""
    if not path.exists():
        return None
    try:
        earlier = json.loads(path.read_bytes())
        bases = bases_of(earlier["tasks"])
        for row in (row for stage in STAGES for row in earlier[stage]):
            row.setdefault("base", bases.get(row["task"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: these are no recorded critics ({error!r}); take the file from git again") from None
    return earlier


def _on_the_same_base(stage: str, rows: Sequence[dict], earlier: Sequence[dict]) -> list[dict]:
    """The recorded rows of a stage, but for those of tasks that OUT has on another base model: they are not to be compared."""
    bases = {row["task"]: row["base"] for row in rows}
    kept = [row for row in earlier if row["base"] == bases.get(row["task"], row["base"])]
    for task in bases:
        if count := sum(row["task"] == task for row in earlier) - sum(row["task"] == task for row in kept):
            print(f"{stage} {task}: recorded rows left out, as their base model is another than OUT's: {count}")
    return kept


def with_earlier(summary: dict, earlier: dict | None, planned: Sequence[Any], common: dict[str, Any]) -> dict:
    """The summary of OUT with the rows of critics.json that OUT does not have, or has of fewer seeds with the same options.
    Rows of a stage and task stand on one base model, OUT's if it has any, and "tasks" are those that rows stand on.
    "other_options" of a row are those by which it is planned no more; "not_run" names the runs that no row has."""
    today = {(run.stage, run.variant): common | run.options for run in planned}
    order = {(run.stage, run.task, run.variant): i for i, run in reversed(list(enumerate(planned)))}
    have: set[tuple] = set()
    for stage in STAGES:
        rows = {(row["task"], row["variant"], row.get("update")): row for row in summary[stage]}
        for row in _on_the_same_base(stage, summary[stage], earlier[stage]) if earlier else ():
            new = rows.setdefault((row["task"], row["variant"], row.get("update")), row)
            if len(new["seeds"]) < len(row["seeds"]) and new["options"] == row["options"]:
                rows[row["task"], row["variant"], row.get("update")] = row
        for row in rows.values():
            own = today.get((stage, row["variant"]), {})
            row["other_options"] = {name: value for name, value in row["options"].items() if own.get(name) != value}
            if not row["other_options"]:
                have |= {(stage, row["task"], row["variant"], seed) for seed in row["seeds"]}
        summary[stage] = sorted(
            rows.values(), key=lambda row: order.get((stage, row["task"], row["variant"]), len(order))
        )
    summary["tasks"] = _tasks_of(summary, [*summary["tasks"], *(earlier["tasks"] if earlier else ())])
    missing = [run for run in planned if (run.stage, run.task, run.variant, run.seed) not in have]
    return summary | {"not_run": [f"{run.stage} {run.task} {run.variant} {run.seed}" for run in missing]}


def _tasks_of(summary: dict, known: Sequence[dict]) -> list[dict]:
    """The tasks that rows stand on, one for each base model, of equal ones the first."""
    used = [(row["task"], row["base"]) for stage in STAGES for row in summary[stage]]
    found: list[dict] = []
    for task in known:
        own = (task["name"], task.get("base"))
        if own in used and own not in [(one["name"], one.get("base")) for one in found]:
            found.append(task)
    return found


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
    """Markdown. Rows that were recorded earlier, or with options that are planned no more, are marked."""
    notes: dict[str, int] = {}
    for row in (row for stage in STAGES for row in summary[stage]):
        told, others = row["recorded"], ", ".join(f"{name} {value}" for name, value in row["other_options"].items())
        if others or any(told[name] != summary[name] for name in ("date", "commit", "device", "versions")):
            text = (
                f"recorded {told['date']}, commit {told['commit']}, {told['device']}, torch {told['versions']['torch']}"
            )
            number = notes.setdefault(text + (f"; with {others}" if others else ""), len(notes) + 1)
            row["named"] = f"{row['variant']} ({number})"
        else:
            row["named"] = row["variant"]
    bases = [(row["task"], row["base"]) for row in summary["screen"]]
    exact = [("exact chance", task["exact"]) for task in summary["tasks"] if (task["name"], task.get("base")) in bases]
    found = [_screen_table(summary["screen"], exact)] if summary["screen"] else []
    found += [_policy_table(summary[stage]) for stage in ("policy", "lambda") if summary[stage]]
    if notes:
        found.append("\n".join(f"({number}) {text}." for text, number in notes.items()))
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
    found += [((row["named"], str(row["update"]), f"{row['cpu_seconds']:.0f}"), row["value"]) for row in rows]
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
        cells = [row["task"], row["named"], str(len(row["seeds"]))]
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
