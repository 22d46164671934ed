"""In words: what scores of held-out responses know."""

from __future__ import annotations

from dqo.report.predictors import CERTAINTY, IMPLICIT, IMPLICIT_BEFORE, INITIAL, LIKELIHOOD, VALUE
from dqo.report.schema import Predictor, Report

# What the sentences compare: score -> how they call it.
TOLD = {
    IMPLICIT: "log(π/ref) of {}",
    IMPLICIT_BEFORE: "the same before the last token",
    VALUE: "the value model of {} before the last token",
}
UNTRAINED = {LIKELIHOOD: "the initial model’s likelihood", CERTAINTY: "its entropy"}


def credit_sentences(report: Report, method: str | None) -> list[str]:
    """What is known of a method's scores, a sentence a question: right against wrong, and where it went wrong. [] without any."""
    predictors = report.get("predictors", [])
    method = method or next((p["method"] for p in predictors if p["method"] not in ("", INITIAL)), None)
    told = [(TOLD[p["name"]].format(method), p) for p in predictors if p["method"] == method and p["name"] in TOLD]
    if not told:
        return []
    told += [(UNTRAINED[p["name"]], p) for p in predictors if p["method"] == INITIAL and p["name"] in UNTRAINED]
    found = [f"AUC for right against wrong held-out responses: {'; '.join(f'{who} {_auc(p)}' for who, p in told)}."]
    chance = report.get("chance")
    of_steps = [(who, p["found"]) for who, p in told if p.get("found") is not None]
    if chance is not None and of_steps:
        shares = "; ".join(f"{who} {_share(share)}" for who, share in of_steps if share is not None)
        found.append(
            f"The lowest step is the first wrong one: {shares}; by chance {100 * chance['found'][0]:.0f}%, "
            f"over {chance['n']:,} responses with a wrong step."
        )
    return found


def _auc(p: Predictor) -> str:
    between = f" ({p['interval'][0]:.2f} to {p['interval'][1]:.2f})" if p["interval"] else ""
    within = p.get("within")
    return f"{p['auc']:.2f}{between}" + (f", within a prompt {within[0]:.2f}" if within else "")


def _share(found: list[float]) -> str:
    return f"{100 * found[0]:.0f}% ({100 * found[1]:.0f} to {100 * found[2]:.0f})"
