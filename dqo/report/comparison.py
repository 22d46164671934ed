"""Methods on the same problems: accuracies with their intervals, paired tests, and what they say in words."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dqo.report.formats import p_relation, percent, points, rate_text
from dqo.report.knowledge import credit_sentences
from dqo.report.schema import Decoding, Method, Report, ValueAUC
from dqo.stats import Interval, Paired, accuracy_interval, mean_interval, paired_test

DECODINGS: dict[Decoding, str] = {"greedy": "with greedy decoding", "sampling": "with sampling"}


class MethodResult(NamedTuple):
    """A method's accuracies and its paired tests, by decoding; a decoding that was not measured is absent."""

    name: str
    problems: int
    accuracy: dict[Decoding, Interval]
    against: dict[Decoding, Paired]
    unread: dict[str, float] = {}  # by decoding, the share of answers that the verifier could not read
    unreadable: list[Decoding] = []  # where neither a method nor the baseline had any readable answer: nothing is known
    seeds: dict[Decoding, Seeds] = {}


class Seeds(NamedTuple):
    """A mean over training seeds, with its interval, and the runs'."""

    mean: float
    low: float
    high: float
    runs: list[float]


class Verdict(NamedTuple):
    sentence: str
    details: list[str]


def compare(methods: list[Method], baseline: str | None = None) -> list[MethodResult]:
    """Every method's accuracy with its interval, and its paired tests against the baseline."""
    names = [method["name"] for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"method names must differ, got {names}")
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline {baseline!r} is not among the methods {names}")
    by_name = {method["name"]: method for method in methods}
    scores = {name: scores_of(method) for name, method in by_name.items()}
    unread = {method["name"]: method.get("unread", {}) for method in methods}
    results = []
    for name, ours in scores.items():
        against = {} if baseline in (None, name) else paired_tests(name, ours, baseline, scores[baseline])
        unreadable = [kind for kind in against if unread[name].get(kind) == unread[str(baseline)].get(kind) == 1]
        against = {kind: test for kind, test in against.items() if kind not in unreadable}
        accuracy = {kind: accuracy_interval(values) for kind, values in ours.items()}
        seeds = {kind: spread for kind in accuracy if (spread := over_seeds(by_name[name], kind))}
        problems = len(next(iter(ours.values()), ()))
        results.append(MethodResult(name, problems, accuracy, against, unread[name], unreadable, seeds))
    return results


def over_seeds(method: Method, kind: Decoding, other: Method | None = None) -> Seeds | None:
    """The accuracy over training seeds, less that of another method with the same seeds; None for fewer than two."""
    ours = {run["seed"]: run["accuracy"][kind] for run in method.get("seeds", []) if kind in run["accuracy"]}
    if other is not None:
        theirs = {run["seed"]: run["accuracy"][kind] for run in other.get("seeds", []) if kind in run["accuracy"]}
        ours = {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}
    runs = list(ours.values())
    interval = mean_interval(runs)
    if interval is None:
        return None
    least = 0.0 if other is None else -1.0
    return Seeds(interval.mean, max(interval.low, least), min(interval.high, 1.0), runs)


def scores_of(method: Method) -> dict[Decoding, np.ndarray]:
    """decoding -> (problems, samples)"""
    scores: dict[Decoding, np.ndarray] = {}
    for kind in DECODINGS:
        if method.get(kind) is not None and len(method[kind]):
            try:
                values = np.array(method[kind], float)
            except ValueError as error:
                raise ValueError(f"{method['name']}: {kind} needs one number of samples a problem") from error
            scores[kind] = values[:, None] if values.ndim == 1 else values
    if len({len(values) for values in scores.values()}) > 1:
        raise ValueError(f"{method['name']}: greedy and sampling differ in their number of problems")
    return scores


def paired_tests(name: str, ours: dict, other: str, theirs: dict) -> dict[Decoding, Paired]:
    tests = {}
    for kind in ours.keys() & theirs.keys():
        if len(ours[kind]) != len(theirs[kind]):
            raise ValueError(
                f"{kind}: {name} has {len(ours[kind])} problems and {other} has {len(theirs[kind])}; "
                "a paired test needs the same problems in the same order"
            )
        tests[kind] = paired_test(ours[kind].mean(axis=1), theirs[kind].mean(axis=1))
    return {kind: tests[kind] for kind in DECODINGS if kind in tests}


def headline_of(report: Report) -> str | None:
    names = [method["name"] for method in report.get("methods", [])]
    headline = report.get("headline")
    if headline is None:
        return next((name for name in names if name != report.get("baseline")), None)
    if headline not in names:
        raise ValueError(f"headline {headline!r} is not among the methods {names}")
    return headline


def verdict_of(
    methods: list[Method], results: list[MethodResult], headline: str | None, baseline: str | None, report: Report
) -> Verdict | None:
    """What the headline method gained over the baseline, and over every other, else what the models know, else None."""
    by_name = {result.name: result for result in results}
    known = credit_sentences(report, headline)
    if headline is None or not by_name[headline].accuracy:
        return _knowledge_verdict(report, known)
    ours, given = by_name[headline], {method["name"]: method for method in methods}
    details = []
    for kind, rate in ours.accuracy.items():
        how = DECODINGS[kind].capitalize()
        text = f"{how} {headline} solves {rate_text(rate)} of {ours.problems:,} problems"
        if kind in ours.unread:
            text += f" ({percent(ours.unread[kind])}% of the answers could not be read)"
        if baseline is not None and kind in ours.against:
            text += f" and {baseline} {rate_text(by_name[baseline].accuracy[kind])}: {_gain(ours.against[kind])}"
            text += _seeds_text(over_seeds(given[headline], kind, given[baseline]))
        details.append(text + ".")
    for name in by_name:
        if name not in (headline, baseline):
            tests = paired_tests(headline, scores_of(given[headline]), name, scores_of(given[name]))
            gains = [
                f"{DECODINGS[kind]} {_gain(test)}{_seeds_text(over_seeds(given[headline], kind, given[name]))}"
                for kind, test in tests.items()
            ]
            details += [f"{headline} over {name}: {'; '.join(gains)}."] if gains else []
    details += known
    if ours.unreadable and not ours.against:
        return Verdict(
            f"No answer of {headline} or of {baseline} could be read by the verifier, so nothing is known of their difference: "
            "look at the answers, and choose a verifier that reads their form.",
            details,
        )
    if baseline is None or not ours.against:
        return Verdict(f"{headline} was measured, and there is no baseline to compare it with.", details)
    return Verdict(_verdict_sentence(headline, baseline, ours.against), details)


def _gain(test: Paired) -> str:
    return (
        f"{points(test.difference)} points (95% interval {points(test.low)} to {points(test.high)}), p {p_relation(test)} by "
        f"the {test.test} test, {test.wins:,} problems better and {test.losses:,} worse"
    )


def _seeds_text(seeds: Seeds | None) -> str:
    """Of a difference."""
    if seeds is None:
        return ""
    better = sum(run > 0 for run in seeds.runs)
    between = f"95% interval over seeds {points(seeds.low)} to {points(seeds.high)}"
    return f", better with {better} of {len(seeds.runs)} training seeds ({between})"


def _verdict_sentence(headline: str, baseline: str, against: dict[Decoding, Paired]) -> str:
    outcomes: dict[str, list[str]] = {}
    for kind, test in against.items():
        outcome = "shows no significant difference"
        if test.significant:
            outcome = f"is {'better' if test.difference > 0 else 'worse'} than {baseline}"
        outcomes.setdefault(outcome, []).append(DECODINGS[kind])
    if list(outcomes) == ["shows no significant difference"]:
        return f"There is no significant difference between {headline} and {baseline}."
    return f"{headline} {', but '.join(f'{what} ' + ' and '.join(how) for what, how in outcomes.items())}."


def _knowledge_verdict(report: Report, known: list[str]) -> Verdict | None:
    """Without problems that were answered: whether the policy, or the value model, tells right responses from wrong ones.
    `known`: what the details say in its place."""
    found = next((p for p in report.get("predictors", []) if p["name"].startswith("Implicit reward")), None)
    if found is not None:
        auc: ValueAUC = {"at_end": found["auc"], "interval": found["interval"]}
        verdict = _auc_verdict("The policy's implicit reward", "AUC of log(π/ref)", auc)
        return verdict._replace(details=known or verdict.details)
    if (value_auc := report.get("value_auc")) is not None and value_auc.get("at_end") is not None:
        return _auc_verdict("The value model", "AUC at the end of a response", value_auc)
    return None


def _auc_verdict(who: str, what: str, value_auc: ValueAUC) -> Verdict:
    at_end, interval = value_auc["at_end"], value_auc.get("interval")
    assert at_end is not None
    between = f" (95% interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    details = [f"{what}: {at_end:.3f}{between}."]
    if value_auc.get("at_half") is not None:
        details.append(f"AUC half-way through it: {value_auc['at_half']:.3f}.")
    if (interval[0] if interval else at_end) > 0.5:
        return Verdict(f"{who} tells right held-out responses from wrong ones.", details)
    return Verdict(f"{who} tells right held-out responses from wrong ones no better than chance.", details)
