"""Runs of one method: those that differ in their seed and their place alone."""

from __future__ import annotations

from dqo.report.runs import StoredRun

BASE = "base"  # what the page calls the model before training
Groups = dict[str, list[StoredRun]]  # {method as the page names it: its runs}


def grouped(runs: list[StoredRun]) -> Groups:
    """Runs that differ in their seed and their place alone, under one name: the method, with the options that tell it from
    another of the same method."""
    by_options: dict[str, list[StoredRun]] = {}
    for run in runs:
        by_options.setdefault(run.what, []).append(run)
    members = list(by_options.values())
    names = []
    for group in members:
        method = group[0].method
        others = [other[0] for other in members if other[0].method == method]
        if len(others) == 1:
            names.append(method)
            continue
        differing = [
            name
            for name in sorted(set().union(*(other.compared for other in others)))
            if len({other.compared.get(name) for other in others}) > 1
        ]
        told = ", ".join(f"{name} {group[0].options.get(name)}" for name in differing)
        names.append(f"{method}, {told}" if len(told) <= 40 else f"{method}, {group[0].directory.name}")
    taken: Groups = {}
    for name, group in zip(names, members):
        name = name if name not in taken and name != BASE else f"{name}, {group[0].directory}"
        taken[name] = sorted(group, key=lambda run: run.seed)
    return taken
