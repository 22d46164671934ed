"""Runs that end worse than they began: by their answers, or by the held-out loss, which has no importance weights."""

from __future__ import annotations

from dqo.report.comparison import DECODINGS, MethodResult, Verdict
from dqo.report.formats import measured
from dqo.report.schema import Report

LOSS = "Held-out loss"  # its title among the report's changes
RISE = 0.01  # of the loss before training: less is no rise


def risen(report: Report) -> dict[str, str]:
    """{method: "a before training, b after it"} where the held-out loss has risen, by the mean over the method's runs."""
    found = {}
    for change in report.get("changes", []):
        for name, runs in change["methods"].items() if change["name"] == LOSS else ():
            pairs = [(before, after) for before, after in runs if before is not None and after is not None]
            if not pairs:
                continue
            before, after = (sum(side) / len(pairs) for side in zip(*pairs))
            if after > before + RISE * abs(before):
                found[name] = f"{measured(before)} before training, {measured(after)} after it"
    return found


def worse_lines(report: Report, results: list[MethodResult]) -> list[str]:
    """A line for each method that answers significantly fewer problems than the model it began with, or whose loss has risen."""
    lines = [
        f"{result.name} ends worse than it began: {DECODINGS[kind]} it solves fewer problems than {report.get('baseline')}"
        for result in results
        for kind, test in result.against.items()
        if test.significant and test.difference < 0
    ]
    return lines + [
        f"{name} ends worse than it began: the held-out loss is {told}" for name, told in risen(report).items()
    ]


def with_loss(verdict: Verdict | None, report: Report, headline: str | None, answered: bool) -> Verdict | None:
    """The verdict, and what the held-out loss adds to it; where no problems were `answered`, the loss has the first word."""
    told = risen(report)
    name = headline or next(iter(told), None)
    if name not in told:
        return verdict
    sentence = f"{name} ends worse than it began: the held-out loss is {told[name]}."
    if verdict is None:
        return Verdict(sentence, [])
    if answered:
        return Verdict(verdict.sentence, [*verdict.details, sentence])
    return Verdict(sentence, [verdict.sentence, *verdict.details])
