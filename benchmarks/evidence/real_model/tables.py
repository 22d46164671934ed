"""What the finished runs say: accuracy by seed, with intervals over problems, and paired tests against the contenders."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.pieces import head, makings, scores
from benchmarks.evidence.real_model import plan
from benchmarks.evidence.real_model.plan import (
    BASE,
    CONTENDERS,
    METHODS,
    UNPLANNED,
    Piece,
    every_piece,
    facts_of,
    options_for,
    result_of,
)
from benchmarks.evidence.study.markdown import difference_text, interval_text
from benchmarks.evidence.study.statistics import holm, paired_over_seeds
from benchmarks.harness.environment import commit
from dqo.stats import accuracy_interval, paired_test

AHEAD, BEHIND = 0.01, 0.05  # levels of the corrected p, of a contender that wins and of one that loses
BySeed = dict[int, dict[str, Any]]


def summarise(root: Path, command: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """What results.json holds."""
    from dqo.train.record import machine

    planned = [piece for piece in every_piece(seeds) if piece.is_run]
    results = {run: result for run in planned if (result := result_of(run, root))}
    runs: dict[str, BySeed] = {}
    for run, result in results.items():
        runs.setdefault(run.method, {})[run.seed] = result
    model = result_of(Piece("model"), root)
    facts: dict[str, Any] = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        **machine(),
        "seeds": list(seeds),
        "runs": {"made": len(results), "planned": len(planned)},
        "makings": makings(results.values()),
        "cpu_hours": sum(result["all_cpu_seconds"] for result in results.values()) / 3600,
        "model": {name: model[name] for name in ("hash", "dtype")} if model else {},
        "sizes": vars(plan.SIZES),
        "data": {seed: facts for seed in seeds if (facts := facts_of(seed, root))},
        "options": {name: options_for(method) for name, method in METHODS.items()},
    }
    return facts | {"rows": rows_of({name: runs[name] for name in (BASE, *METHODS) if name in runs}, seeds)}


def rows_of(runs: dict[str, BySeed], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each method. Planned comparisons are tested where both have all seeds, and corrected together by Holm."""
    rows, tested, untested = [], [], []
    for name, by_seed in runs.items():
        row: dict[str, Any] = {"method": name, "seeds": sorted(by_seed)}
        for decoding in (None, "greedy", "sampling"):
            found = [scores(by_seed[seed], decoding) for seed in sorted(by_seed)]
            told = accuracy_interval(np.concatenate(found))._asdict()
            row[decoding or "accuracy"] = told | {"of_seeds": [float(np.mean(one)) for one in found]}
        results = list(by_seed.values())
        row["unread"] = float(np.mean([result["unread"]["sampling"]["share"] for result in results]))
        row["failed"] = [result["failed"] for result in results if result["failed"]]
        row["cpu_seconds"] = float(np.mean([result["cpu_seconds"] for result in results]))
        for i, contender in enumerate(CONTENDERS):
            if contender in runs and name not in CONTENDERS[: i + 1]:
                row[f"{contender} ahead"] = compared(runs[contender], by_seed)
                (tested if name != UNPLANNED else untested).append(row[f"{contender} ahead"])
        if UNPLANNED in runs and name != UNPLANNED:
            row[f"{UNPLANNED} ahead"] = compared(runs[UNPLANNED], by_seed)
            untested.append(row[f"{UNPLANNED} ahead"])
        if name == "shuffled" and BASE in runs:
            row["control"] = compared(by_seed, runs[BASE])
            tested.append(row["control"])
        rows.append(row)
    whole = [told for told in tested if told and told["seeds"] == list(seeds)]
    for told, corrected in zip(whole, holm([told["p_value"] for told in whole])):
        told |= {"holm": corrected, "verdict": verdict(told["of_seeds"], corrected)}
    for told in (*tested, *untested):
        if told and told not in whole:
            del told["p_value"]
    return rows


def compared(a: BySeed, b: BySeed) -> dict[str, Any] | None:
    """a - b of the measure on the seeds that both have: over all their problems, with the sign-flip test, and over seeds."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    ours, theirs = ([scores(of[seed]) for seed in seeds] for of in (a, b))
    found = paired_test(np.concatenate(ours), np.concatenate(theirs))
    told: dict[str, Any] = {"mean": found.difference, "low": found.low, "high": found.high, "p_value": found.p_value}
    told |= {"seeds": seeds, "of_seeds": [float(np.mean(x) - np.mean(y)) for x, y in zip(ours, theirs)]}
    over_seeds = paired_over_seeds(ours, theirs)
    return told | {"over_seeds": None if over_seeds is None else over_seeds._asdict()}


def verdict(of_seeds: Sequence[float], corrected: float) -> str:
    """ "ahead", "behind" or "level", by the rule of docs/evidence.md."""
    if min(of_seeds) > 0 and corrected < AHEAD:
        return "ahead"
    return "behind" if max(of_seeds) < 0 and corrected < BEHIND else "level"


def markdown(summary: dict[str, Any]) -> str:
    seeds = summary["seeds"]
    heads = ["method", "accuracy", "by seed", "greedy", "sampling", "unread, %"]
    heads += [*(f"{name} ahead (p by Holm)" for name in CONTENDERS), f"{UNPLANNED} ahead", "CPU s"]
    lines = [
        "# The real model",
        "",
        *head(summary),
        "",
        *(f"Seed {seed}: {of['rows']:,} responses, {of['tokens']:,} tokens, {100 * of['right']:.1f} % right."
          for seed, of in summary["data"].items()),
        "",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
    ]  # fmt: skip
    for row in summary["rows"]:
        cells = [row["method"], interval_text(row["accuracy"], 1)]
        cells += [_which(row, seeds) + ", ".join(f"{100 * mean:.1f}" for mean in row["accuracy"]["of_seeds"])]
        cells += [interval_text(row[name], 1) for name in ("greedy", "sampling")] + [f"{100 * row['unread']:.1f}"]
        for name in (*CONTENDERS, UNPLANNED):
            told = row.get(f"{name} ahead")
            cells.append(_ahead(told, seeds) + (f": {told['verdict']}" if told and "verdict" in told else ""))
        lines.append("| " + " | ".join([*cells, f"{row['cpu_seconds']:.0f}"]) + " |")
    for row in summary["rows"]:
        for why in dict.fromkeys(row["failed"]):
            lines += ["", f"{row['method']} ended itself and counts as the base model: {why}"]
        control = row.get("control")
        if control:
            gap = difference_text(control)
            lines += ["", f"Control: {_which(control, seeds)}shuffled rewards are ahead of the base by {gap}."]
            if control["mean"] > 0 and control.get("holm", 1.0) < BEHIND:
                lines += ["", "**Shuffled rewards gain over the base: the gains of this table are suspect.**"]
    return "\n".join(lines) + "\n"


def _which(told: dict[str, Any], seeds: list[int]) -> str:
    """The seeds that something is told of, where some are missing."""
    found = told["seeds"]
    return "" if found == seeds else f"seed{'s' * (len(found) > 1)} {', '.join(map(str, found))}: "


def _ahead(told: dict[str, Any] | None, seeds: list[int]) -> str:
    return _which(told, seeds) + difference_text(told) if told else ""
