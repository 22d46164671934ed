"""Stored runs as a report: runs of one method and several seeds are pooled, and what they cannot be compared by is said."""

from __future__ import annotations

from typing import Any

import numpy as np

from dqo.data.named import shown
from dqo.errors import UserError
from dqo.objectives.registry import DEFAULT_METHOD
from dqo.report.groups import BASE, Groups, grouped
from dqo.report.predictors import held_out_of
from dqo.report.runs import StoredRun
from dqo.report.schema import Method, Report
from dqo.report.sections import accuracy_of, changes_of, curves_of, flips_of, unread_of


def report_of(runs: list[StoredRun], *, names: list[str] | None = None, **given: Any) -> Report:
    """The page's data.

    Args:
        runs: of one or of several methods. names: of each run on the page; None: those of the methods.
        given: sections in the place of those made here, such as title or notes.

    Raises:
        UserError: for one directory that is given twice.
    """
    places = [run.directory.resolve() for run in runs]
    if twice := next((run.directory for run, at in zip(runs, places) if places.count(at) > 1), None):
        raise UserError(f"{twice} is given twice")
    groups = grouped(runs) if names is None else {name: [run] for name, run in zip(names, runs, strict=True)}
    first = runs[0]
    shared, own = _options(groups)
    ran = (command for run in runs for command in run.record.get("commands", []))
    compared = [run for run in runs if _same_problems(run, runs)]
    report: Report = {
        "title": _title(groups),
        "command": "\n".join(dict.fromkeys(ran)),
        "created": max(run.record.get("created", "") for run in runs),
        "wall_seconds": sum(run.record.get("seconds", 0.0) for run in runs),
        "options": shared,
        "options_of": own,
        "warnings": _warnings(runs),
        "notes": _notes(runs),
        "changes": changes_of(groups),
        "curves": curves_of(groups),
        "data": {name: run.record["data"]["counts"] for name, (run, *_) in groups.items() if "data" in run.record},
        "data_sets": _data_sets(runs),
        "parameters": {name: run.record["parameters"] for name, (run, *_) in groups.items() if "parameters" in run.record},
        "runs": [_view(name, run) for name, members in groups.items() for run in members],
        **{key: first.record[key] for key in ("device", "versions") if key in first.record},  # type: ignore[typeddict-item]
    }  # fmt: skip
    if len(runs) == 1:
        report["seed"] = first.seed
    headline = next(
        (name for name, members in groups.items() if members[0].method == DEFAULT_METHOD), next(iter(groups))
    )
    answered = {name: [run for run in members if run in compared] for name, members in groups.items()}
    report["methods"] = _methods(groups, answered)
    if report["methods"]:
        report |= {"baseline": BASE, "headline": headline}
    report["unread"] = unread_of(answered)
    if answered[headline]:
        report["flips"] = flips_of(answered[headline][0].answers)
    report |= held_out_of(groups, headline)  # type: ignore[typeddict-item]
    if penalised := next((p for run in groups[headline] + runs if (p := run.record.get("penalised_steps"))), None):
        report["penalised"] = penalised
    return report | given  # type: ignore[return-value]


def _title(groups: Groups) -> str:
    first = next(iter(groups.values()))[0]
    methods = list(dict.fromkeys(run.method.upper() for members in groups.values() for run in members))
    named = f"{', '.join(methods[:-1])} and {methods[-1]}" if len(methods) > 1 else methods[0]
    controls = [run.options.get("shuffle_rewards") for members in groups.values() for run in members]
    control = " with shuffled rewards, a control" if all(controls) else ""
    return f"{named} on {shown(str(first.options.get('dataset_name') or 'given rows'))}{control}"


def _options(groups: Groups) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The options that are not defaults: those of every run, and the others of each method."""
    changed = {name: members[0].changed() for name, members in groups.items()}
    if sum(map(len, groups.values())) > 1:  # what tells the runs apart stands in their table
        apart = {"output_dir", "seed", "method"}
        changed = {n: {k: v for k, v in found.items() if k not in apart} for n, found in changed.items()}
    sets = list(changed.values())
    shared = {k: v for k, v in sets[0].items() if all(k in other and other[k] == v for other in sets)}
    own = {n: {k: v for k, v in found.items() if k not in shared} for n, found in changed.items()}
    return shared, {name: found for name, found in own.items() if found}


def _warnings(runs: list[StoredRun]) -> list[str]:
    found = [f"{run.directory} is {run.state}; what is there is shown." for run in runs if not run.finished]
    by_hash: dict[str, list[StoredRun]] = {}
    for run in runs:
        if "data" in run.record:
            by_hash.setdefault(run.record["data"]["sha256"], []).append(run)
    if len(by_hash) > 1:
        of = [
            f"{', '.join(run.directory.name for run in members)}: {members[0].record['data']['name']} ({digest[:12]} ...)"
            for digest, members in by_hash.items()
        ]
        found.append(f"These runs were trained on different data: {'; '.join(of)}.")
    controls = [run.directory.name for run in runs if run.options.get("shuffle_rewards")]
    if controls and len(controls) < len(runs):
        found.append(f"These runs are controls, trained on shuffled rewards: {', '.join(controls)}.")
    models = {str(run.record["model"]["sha256"]): run for run in runs if "model" in run.record}
    if len(models) > 1:
        named = "; ".join(f"{run.directory.name}: {run.record['model']['name']}" for run in models.values())
        found.append(f"These runs start from different models; {BASE} is that of the first: {named}.")
    others = [run.directory.name for run in runs if run.answers and not _same_problems(run, runs)]
    if others:
        what = "answered other problems than the first, and their accuracies are left out"
        found.append(f"These runs {what}: {', '.join(others)}.")
    bare = [run.directory.name for run in runs if not run.record]
    if bare:
        found.append(f"These runs kept no run.json, so that data, sizes and commands are not known: {', '.join(bare)}.")
    return found


def _notes(runs: list[StoredRun]) -> list[str]:
    weighed = [record["said"] for run in runs if (record := run.record.get("importance_weights"))]
    notes = [f"I{said[1:]}." for said in dict.fromkeys(weighed)]  # importance weights: ...
    held_out = {run.record["data"]["held_out_sha256"] for run in runs if "data" in run.record}
    if len(held_out) < 2:
        return notes
    return [
        *notes,
        "The held-out rows are not the same in all runs: each seed holds out prompts of its own. With eval_dataset_name they "
        "would be.",
    ]


def _same_problems(run: StoredRun, runs: list[StoredRun]) -> bool:
    """Whether a run answered the problems that the first run with answers did, as often."""
    first = next((other for other in runs if other.answers), None)
    return bool(run.answers) and first is not None and _problems(run) == _problems(first)


def _problems(run: StoredRun) -> list[tuple]:
    return [(row["prompt"], len(row["before"]["sampling"]), len(row["after"]["sampling"])) for row in run.answers]


def _methods(groups: Groups, answered: Groups) -> list[Method]:
    """The base and each method; runs of several seeds are pooled."""
    everyone = [run for members in answered.values() for run in members]
    if not everyone:
        return []
    model = everyone[0].record.get("model", {}).get("sha256")
    of_base = {run.seed: run for run in reversed(everyone) if run.record.get("model", {}).get("sha256") == model}
    methods = [_scored(BASE, "before", [of_base[seed] for seed in sorted(of_base)])]
    for name, members in groups.items():
        method = _scored(name, "after", answered[name])
        finished = [run for run in members if "seconds" in run.record]
        if finished:
            method |= {
                "seconds": float(np.mean([run.record["seconds"] for run in finished])),
                "tokens_per_second": float(np.mean([run.record["tokens_per_second"] for run in finished])),
                "updates": finished[0].record["made"],
            }
        methods.append(method)
    return methods


def _scored(name: str, when: str, runs: list[StoredRun]) -> Method:
    if not runs:
        return {"name": name}
    greedy = np.mean([[row[when]["greedy"] for row in run.answers] for run in runs], axis=0)
    method: Method = {"name": name, "greedy": greedy.tolist()}
    samples = [np.array([row[when]["sampling"] for row in run.answers], float) for run in runs]
    if samples[0].size:
        method["sampling"] = np.concatenate(samples, axis=1).tolist()
    lost = [run.record["unread"][when] for run in runs if "unread" in run.record]
    if len(lost) == len(runs):
        method["unread"] = {kind: float(np.mean([found[kind]["share"] for found in lost])) for kind in lost[0]}
    if len(runs) > 1:
        method["seeds"] = [{"seed": run.seed, "accuracy": accuracy_of(run, when)} for run in runs]
    return method


def _data_sets(runs: list[StoredRun]) -> list[dict]:
    data = [run.record["data"] for run in runs if "data" in run.record]
    sets = {d["sha256"]: {key: d[key] for key in ("name", "sha256", "of")} for d in data}
    return list(sets.values())


def _view(name: str, run: StoredRun) -> dict:
    view = {"directory": str(run.directory), "method": name, "seed": run.seed, "state": run.state}
    return view | {key: run.record[key] for key in ("seconds", "tokens_per_second") if key in run.record}
