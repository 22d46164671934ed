"""What the finished pieces say: accuracy with intervals over seeds, paired tests, the claims chosen in advance, the ablations."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.pieces import makings, scores
from benchmarks.evidence.study import settings
from benchmarks.evidence.study.confirmation import CLAIMS, NEW_SEEDS
from benchmarks.evidence.study.pieces import Piece, every_piece, result_of, setting_of
from benchmarks.evidence.study.settings import BASE, methods_of
from benchmarks.evidence.study.sizes import FEW_SEEDS, PRIMARY, SEEDS, TASKS
from benchmarks.evidence.study.statistics import Difference, ahead_of_each, holm, paired_over_seeds
from benchmarks.harness.environment import commit
from dqo.stats import mean_interval, paired_test

LEVEL = 0.01  # of the claims chosen in advance
SUSPECT = 0.05  # of the control
ADDED = "dqo-nll"  # a contender that was not chosen in advance
ADDED_BY_TASK = {"d": "dqo-steps-nll", "f": "dqo-steps-nll"}
LOST = 0.05  # by Holm: a rival that is ahead by so much wins
WORTH = 0.01  # of the measure: what a method must be ahead by of one that takes less processor time
Results = dict[str, dict[int, dict]]  # {method: {seed: result}}


def summarise(root: Path, command: str) -> dict[str, Any]:
    from dqo.train.record import machine

    found = {task: results_of(task, root) for task in TASKS}
    rows = {task: rows_of(task, results, root) for task, results in found.items() if results}
    runs = [piece for piece in every_piece() if piece.is_run]
    results = [result for run in runs if (result := result_of(run, root))]
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        **machine(),
        "runs": {"made": len(results), "planned": len(runs)},
        "makings": makings(results),
        "cpu_hours": sum(result["all_cpu_seconds"] for result in results) / 3600,
        "rows": rows,
        "claims": claims(found),
        "confirmed": confirmed(root),
        "tuning": tuning(root),
        "ablations": ablations(found, root),
    }


def results_of(task: str, root: Path, seeds: Sequence[int] = SEEDS, methods: Sequence[str] | None = None) -> Results:
    """Of the methods with at least one finished seed, the base model first. `methods`: all of the task, where none are given."""
    found: Results = {}
    for name in (BASE, *(methods_of(task) if methods is None else methods)):
        for seed in seeds:
            if result := result_of(Piece("run", task, seed, name), root):
                found.setdefault(name, {})[seed] = result
    return found


def difference(a: dict[int, dict], b: dict[int, dict], decoding: str | None = None) -> tuple[Difference | None, int]:
    """Over the seeds that both have, and how many these are; of the measure, or of one decoding alone."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None, 0
    return paired_over_seeds(*([scores(of[seed], decoding) for seed in seeds] for of in (a, b))), len(seeds)


def rows_of(task: str, results: Results, root: Path) -> list[dict[str, Any]]:
    """A row for each method; differences are the contender's minus the method's, corrected together where all have five seeds.
    What was not chosen in advance gets no p values."""
    rows = []
    tested = [name for name in dict.fromkeys(("dqo", PRIMARY.get(task, "dqo"))) if name in results]
    added = {name for name in results if name != BASE and settings.METHODS[name].added}
    contenders = [
        *tested,
        *(name for name in dict.fromkeys((ADDED, ADDED_BY_TASK.get(task, ADDED))) if name in results),
    ]
    compared: list[tuple[dict, str]] = []
    planned = (BASE, *(name for name in methods_of(task) if not settings.METHODS[name].added))
    complete = all(len(results.get(name, {})) == len(SEEDS) for name in planned)
    for name, by_seed in results.items():
        row = measured(name, task, by_seed, root)
        for contender in contenders:
            if name == contender:
                continue
            gap, count = difference(results[contender], by_seed)
            if gap is not None:
                row[f"{contender} ahead"] = gap._asdict()
                if complete and contender in tested and name not in added:
                    compared.append((row, contender))
                else:  # nothing is tested before all that is corrected together is there
                    del row[f"{contender} ahead"]["p_value"]
        rows.append(row)
    found = [row[f"{contender} ahead"] for row, contender in compared]
    for told, corrected in zip(found, holm([told["p_value"] for told in found])):
        told["holm"] = corrected
    contender = PRIMARY.get(task, "dqo")
    for row in rows:
        if row["method"] in settings.RIVALS and "holm" in row.get(f"{contender} ahead", {}):
            row["verdict"] = verdict(row, next(other for other in rows if other["method"] == contender), contender)
    control, count = difference(results.get("shuffled", {}), results.get(BASE, {}))
    if control is not None and count == len(SEEDS):
        told = control._asdict() | {"suspect": control.mean > 0 and control.p_value < SUSPECT}
        over_sft, _ = difference(results["shuffled"], results.get("sft", {}))
        told["over sft"] = over_sft._asdict() if over_sft else None  # more updates alone may sharpen a model
        next(row for row in rows if row["method"] == "shuffled")["control"] = told
    return rows


def measured(name: str, task: str, by_seed: dict[int, dict], root: Path) -> dict[str, Any]:
    """A method's setting, costs, and accuracy with its interval over seeds."""
    row: dict[str, Any] = {"method": name, "seeds": sorted(by_seed)}
    if name != BASE:
        row["setting"] = setting_of(Piece("run", task, row["seeds"][0], name), root)
        row["failed"] = sum(result["failed"] is not None for result in by_seed.values())
        row["cpu_seconds"] = float(np.mean([result["cpu_seconds"] for result in by_seed.values()]))
    for decoding in (None, "greedy", "sampling"):
        means = [float(np.mean(scores(by_seed[seed], decoding))) for seed in row["seeds"]]
        interval = mean_interval(means)
        told = {"mean": float(np.mean(means)), "of_seeds": means}
        row[decoding or "accuracy"] = told | ({"low": interval.low, "high": interval.high} if interval else {})
    return row


def verdict(rival: dict[str, Any], contender: dict[str, Any], name: str) -> str:
    """What the rules that were fixed in advance say of a rival, whose row is tested."""
    gap = rival[f"{name} ahead"]
    if gap["mean"] < 0 and gap["holm"] < LOST:
        return "loses"
    ahead = gap["mean"] > 0 and gap["holm"] < LOST
    if rival["cpu_seconds"] < contender["cpu_seconds"] and not (ahead and gap["mean"] >= WORTH and gap["low"] > 0):
        return "does not earn its place"
    return "ahead" if ahead else "level"


def claims(found: dict[str, Results]) -> list[dict[str, Any]]:
    """Ahead of every rival on each primary task; p values only where all rivals have all seeds."""
    told: list[dict[str, Any]] = []
    for task, contender in PRIMARY.items():
        results = found[task]
        rivals = [name for name in methods_of(task) if name in settings.RIVALS]
        gaps = {name: difference(results.get(contender, {}), results.get(name, {})) for name in rivals}
        complete = all(count == len(SEEDS) for _, count in gaps.values())
        known = {name: gap for name, (gap, _) in gaps.items() if gap is not None}
        nearest = min(known, key=lambda name: known[name].mean) if known else None
        row: dict[str, Any] = {"task": task, "contender": contender, "nearest": nearest}
        row["by"] = known[nearest]._asdict() if nearest else None
        row["p_value"] = ahead_of_each(list(known.values())) if complete else None
        told.append(row)
    return decided(told)


def decided(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Claims with their p values corrected together, if all are known."""
    if all(row["p_value"] is not None for row in told):
        for row, corrected in zip(told, holm([row["p_value"] for row in told])):
            row |= {"holm": corrected, "holds": corrected < LEVEL}
    return told


def confirmed(root: Path) -> list[dict[str, Any]]:
    """Each claim on the new seeds, with the rows of its methods. p values are those of sign flips over seeds: one seed on which a
    rival breaks does not spoil them. They are told where all runs of the claim are there."""
    told: list[dict[str, Any]] = []
    for claim in CLAIMS:
        results = results_of(claim.task, root, NEW_SEEDS, claim.methods)
        complete = all(len(results.get(name, {})) == len(NEW_SEEDS) for name in (BASE, *claim.methods))
        rows, gaps = [], {}
        for name, by_seed in results.items():
            rows.append(measured(name, claim.task, by_seed, root))
            gap, _ = difference(results.get(claim.contender, {}), by_seed)
            if name == claim.contender or gap is None:
                continue
            gap = gap._replace(p_value=flipped(results, claim.contender, name))
            rows[-1][f"{claim.contender} ahead"] = {
                k: v for k, v in gap._asdict().items() if complete or k != "p_value"
            }
            if name in claim.rivals:
                gaps[name] = gap
        if gaps:
            nearest = min(gaps, key=lambda name: gaps[name].mean)
            row = {"task": claim.task, "contender": claim.contender, "title": claim.title, "nearest": nearest}
            row |= {"by": gaps[nearest]._asdict(), "rows": rows}
            row["decided_by"] = max(gaps, key=lambda name: (ahead_of_each([gaps[name]]), -gaps[name].mean))
            told.append(row | {"p_value": ahead_of_each(list(gaps.values())) if complete else None})
    return decided(told) if len(told) == len(CLAIMS) else told


def flipped(results: Results, a: str, b: str) -> float:
    """The p value of the mean difference if each seed might as well have the other sign; exact for up to 13 seeds."""
    seeds = sorted(results[a].keys() & results[b].keys())
    means = ([float(np.mean(scores(results[name][seed]))) for seed in seeds] for name in (a, b))
    return paired_test(*means).p_value


def tuning(root: Path) -> list[dict[str, Any]]:
    """Validation accuracy of every setting that was tried."""
    rows = []
    for piece in every_piece():
        if piece.stage == "tune" and piece.method != BASE and (result := result_of(piece, root)):
            told = {"task": piece.name, "method": piece.method, "setting": setting_of(piece, root)}
            rows.append(told | {"accuracy": float(np.mean(scores(result))), "failed": result["failed"]})
    return rows


def ablations(found: dict[str, Results], root: Path) -> list[dict[str, Any]]:
    rows = []
    for task in settings.ABLATED:
        whole = found[task].get("dqo", {})
        for change in settings.ABLATIONS:
            runs = [Piece("run", task, seed, "dqo", change=change) for seed in FEW_SEEDS]
            of_change = {run.seed: result for run in runs if (result := result_of(run, root))}
            seeds = sorted(of_change.keys() & whole.keys())
            if not seeds:
                continue
            row: dict[str, Any] = {"task": task, "change": change, "seeds": seeds}
            for decoding in (None, "greedy", "sampling"):
                changed, before = ([np.mean(scores(of[s], decoding)) for s in seeds] for of in (of_change, whole))
                row[decoding or "accuracy"] = [float(a - b) for a, b in zip(changed, before)]
            row["cpu_seconds"] = float(np.mean([of_change[seed]["cpu_seconds"] for seed in seeds]))
            rows.append(row)
    return rows
