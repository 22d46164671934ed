"""Sections of the page from stored runs: before and after, curves, problems that changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dqo.evaluation.unread import SMALL, cure
from dqo.report.groups import BASE, Groups
from dqo.report.runs import StoredRun
from dqo.report.schema import Change, Curve, Decoding, Flip, Flips, Unread

CURVES = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "kl",
    "entropy",
    "loss/value",
    "value/explained_variance",
    "sampling/importance_sampling_ratio/mean",
    "importance_weight/effective_sample_share",
    "importance_weight/clipped_frac",
    "grad_norm",
    "critic/grad_norm",
    "rewards/chosen",
    "rewards/rejected",
)
# name in metrics.jsonl -> (title, which is better, how to read it)
CHANGES: dict[str, tuple[str, Any, str]] = {
    "eval_loss": (
        "Held-out loss",
        "lower",
        "What the method minimises, without importance weights; the levels of different methods do not compare.",
    ),
    "eval_weighted_loss": (
        "Held-out loss with importance weights",
        "",
        "As in training. It falls by itself where the policy leaves the data.",
    ),
    "eval_rewards/margins": (
        "Held-out margin",
        "higher",
        "Implicit reward of right minus wrong responses, β·log(π/ref); it grows with β.",
    ),
    "eval_kl": ("Held-out KL", "", "Distance from the reference on stored responses, in nats a token."),
    "eval_entropy": ("Held-out entropy", "", "How undecided the policy is at a token, in nats."),
    "eval_credit/auc": (
        "AUC of the implicit reward",
        "higher",
        "The chance that log(π/ref) of a right held-out response is above that of a wrong one; 0.5 is guessing.",
    ),
    "eval_credit/first_wrong_step": (
        "First wrong step found",
        "higher",
        "Share of held-out responses with a wrong step whose lowest step, by log(π/ref), is the first wrong one.",
    ),
    "eval_value/auc_end": ("AUC of the value model", "higher", "0.5 is guessing, 1 is certainty."),
}


def changes_of(groups: Groups) -> list[Change]:
    """Before and after training, of every run that has both."""

    def measured(of: Callable[[StoredRun], list[float | None]]) -> dict[str, list[list[float | None]]]:
        pairs = {name: [of(run) for run in members] for name, members in groups.items()}
        kept = {name: [pair for pair in found if any(x is not None for x in pair)] for name, found in pairs.items()}
        return {name: found for name, found in kept.items() if found}

    def accuracy(kind: Decoding) -> Callable[[StoredRun], list[float | None]]:
        return lambda run: [accuracy_of(run, when).get(kind) if run.answers else None for when in ("before", "after")]

    found: list[Change] = []
    titles: dict[Decoding, str] = {"greedy": "Greedy accuracy", "sampling": "Sampling accuracy"}
    for kind, title in titles.items():
        how = "Share of the problems of eval_tasks that are solved."
        found.append({"name": title, "better": "higher", "how_to_read": how, "methods": measured(accuracy(kind))})
    for key, (title, better, how) in CHANGES.items():
        pairs = measured(lambda run, key=key: _ends(run, key))  # type: ignore[misc]
        found.append({"name": title, "better": better, "how_to_read": how, "methods": pairs})
    return [change for change in found if change["methods"]]


def accuracy_of(run: StoredRun, when: str) -> dict[Decoding, float]:
    samples = [row[when]["sampling"] for row in run.answers]
    found: dict[Decoding, float] = {"greedy": float(np.mean([row[when]["greedy"] for row in run.answers]))}
    return found | ({"sampling": float(np.mean(samples))} if samples[0] else {})


def _ends(run: StoredRun, key: str) -> list[float | None]:
    """A held-out metric before training, and that of the models that were written at the end, or so far."""
    rows = [row for row in run.metrics if _number(row.get(key)) is not None]
    before = next((row[key] for row in rows if row["step"] == 0), None)
    after = _number(run.record.get("held_out", {}).get(key)) if run.finished else None
    last = rows[-1][key] if rows and rows[-1]["step"] > 0 else None
    return [before, last if after is None else after]


def _number(value: Any) -> float | None:
    """None for a string, which a callback may have logged under any name."""
    return value if isinstance(value, (int, float)) else None


def curves_of(groups: Groups) -> list[Curve]:
    """One curve for each of CURVES and each run that logged it."""
    found: list[Curve] = []
    for metric in CURVES:
        for name, members in groups.items():
            for run in members:
                points = [(row["step"], _number(row[metric])) for row in run.metrics if metric in row and "loss" in row]
                if len(points) > 1:
                    x, y = map(list, zip(*points))
                    curve: Curve = {"name": metric, "method": name, "x": x, "y": y, "x_label": "step"}
                    curve |= {"seed": run.seed, "warmup": run.warmup}
                    found.append(curve)
    return found


def flips_of(answers: list[dict]) -> Flips:
    """The problems whose greedy answer was mended or spoilt."""
    fixed: list[Flip] = []
    broken: list[Flip] = []
    for row in answers:
        was, now = row["before"], row["after"]
        if was["greedy"] != now["greedy"]:
            flip: Flip = {"prompt": row["prompt"], "before": was["text"], "after": now["text"]}
            (fixed if now["greedy"] > was["greedy"] else broken).append(flip)
    return {"fixed": fixed, "broken": broken}


def unread_of(answered: Groups) -> list[Unread]:
    """Where many answers could not be read: of the base, and of each method's first run."""
    firsts = {name: members[0] for name, members in answered.items() if members}
    of_base = [(BASE, "before", run) for run in list(firsts.values())[:1]]
    found: list[Unread] = []
    for name, when, run in [*of_base, *((name, "after", run) for name, run in firsts.items())]:
        for decoding, lost in run.record.get("unread", {}).get(when, {}).items():
            if lost["share"] > SMALL:
                told = {"share": lost["share"], "cure": cure(str(run.options.get("verifier")), lost)}
                found.append({"method": name, "decoding": decoding, "examples": lost["examples"], **told})  # type: ignore[typeddict-item]
    return found
