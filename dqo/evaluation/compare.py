"""Any number of evaluations of the same problems, tested against each other in pairs."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dqo.errors import UserError
from dqo.evaluation.measures import holm
from dqo.evaluation.options import EvalConfig
from dqo.evaluation.results import PROBLEMS_HASH, Evaluation, read_evaluation
from dqo.evaluation.summary import aligned, per_problem, unread_of
from dqo.evaluation.unread import cure, unread_lines
from dqo.files import write_whole, writing
from dqo.stats import CONFIDENCE, accuracy_interval, paired_test

_KINDS = ("greedy", "maj@", "beam-", "step-", "best@")  # how names of tested measures begin


def compare(evaluations: list[Evaluation]) -> dict[str, Any]:
    """Paired tests of every two evaluations by every measure that all have.

    Returns:
        {"names", "problems", "verifier", "measures": {measure: {"means": {name: ...}, "pairs": [...]}},
        "unread": {name: {decoding: ...}}}. A pair has a, b, difference (a - b), low, high, p_value, wins, losses, test, and
        p_holm, which is adjusted for all pairs of its measure. Where neither of two has a readable answer there is no test: the
        pair has `unreadable` True instead.

    Raises:
        UserError: for evaluations of other problems, by other verifiers, of one name, or without a common finished measure.
    """
    _check_alike(evaluations)
    values = {e.name: per_problem(e) for e in evaluations}
    first, *rest = values.values()
    # of best@k, maj@k the largest k
    common = [name for name in first if all(name in other for other in rest) and _tested(name)]
    common = [name for name in common if name == _largest(name, common)]
    if not common:
        have = "; ".join(f"{name}: {', '.join(found) or 'nothing finished'}" for name, found in values.items())
        raise UserError(f"the evaluations have no measure in common ({have}); finish them with the same options")
    lost = {e.name: {decoding: unread_of(e, decoding) for decoding in e.decodings} for e in evaluations}
    return {
        "names": list(values),
        "problems": len(evaluations[0].problems),
        "verifier": evaluations[0].verifier,
        "measures": {measure: _tests(measure, values, lost) for measure in common},
        "unread": lost,
    }


def compared(config: EvalConfig) -> dict[str, Any]:
    """The tests of the evaluations in the directories of `config`, which its output_dir, if it has one, keeps in compare.json."""
    found = compare([read_evaluation(directory) for directory in config.compare])
    if config.output_dir is not None:
        path = Path(config.output_dir)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        write_whole(path / "compare.json", json.dumps(found, indent=1, ensure_ascii=False).encode())
    return found


def _tested(name: str) -> bool:
    """Of pass@k, pass@1 alone is."""
    return name == "pass@1" or name.startswith(_KINDS)


def _largest(name: str, names: list[str]) -> str:
    """Of measures that differ in k alone, the last, which has the largest."""
    kind, at, rest = name.partition("@")
    if not at:
        return name
    scorer = rest.partition(" ")[2]
    return [other for other in names if other.startswith(f"{kind}@") and other.partition(" ")[2] == scorer][-1]


def _check_alike(evaluations: list[Evaluation]) -> None:
    first = evaluations[0]
    names = [e.name for e in evaluations]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"several evaluations have the name {doubled[0]!r}; give each a --name of its own, or rename its directory"
        )
    for other in evaluations[1:]:
        hashes = [e.header["options"].get(PROBLEMS_HASH) for e in (first, other)]
        if hashes[0] != hashes[1]:
            raise UserError(
                f"{other.directory} has other problems than {first.directory} ({len(other.problems):,} and "
                f"{len(first.problems):,}, or in another order); a paired test needs the same: evaluate both on one file"
            )
        if other.verifier != first.verifier:
            raise UserError(
                f"{other.directory} was graded by {other.verifier}, and {first.directory} by {first.verifier}; grade one "
                "again: the same command with the other --verifier samples nothing anew"
            )
        if other.verifier_source != first.verifier_source:
            raise UserError(
                f"{other.directory} and {first.directory} were graded by {first.verifier} before and after its file was changed; "
                "give the commands that made them once more: they grade again, and sample nothing anew"
            )


def decoding_of(measure: str) -> str:
    return "sampling" if "@" in measure else measure


def _tests(measure: str, values: dict[str, dict[str, list]], lost: dict[str, dict]) -> dict[str, Any]:
    means = {name: list(accuracy_interval(found[measure])) for name, found in values.items()}
    pairs: list[dict[str, Any]] = []
    for a, b in combinations(values, 2):
        pair: dict[str, Any] = {"a": a, "b": b}
        if all(lost[name][decoding_of(measure)]["share"] == 1 for name in (a, b)):
            pairs.append(pair | {"unreadable": True})
            continue
        ours, theirs = (
            np.asarray(values[name][measure], float).reshape(len(values[name][measure]), -1) for name in (a, b)
        )
        pairs.append(pair | paired_test(ours.mean(axis=1), theirs.mean(axis=1))._asdict())
    tested = [pair for pair in pairs if "p_value" in pair]
    for pair, adjusted in zip(tested, holm([pair["p_value"] for pair in tested])):
        pair["p_holm"] = adjusted
    return {"means": means, "pairs": pairs}


def comparison_text(found: dict[str, Any]) -> str:
    """The tests in plain text: differences in points, p values, a sentence a pair."""
    lines = [f"{found['problems']:,} problems, verifier {found['verifier']}"]
    for measure, tests in found["measures"].items():
        rows = [[measure, "%", "95% interval", "unread %"]]
        for name, (mean, low, high) in tests["means"].items():
            share = found["unread"][name][decoding_of(measure)]["share"]
            rows.append([name, f"{100 * mean:.1f}", f"{100 * low:.1f} to {100 * high:.1f}", f"{100 * share:.1f}"])
        lines += ["", *aligned(rows)]
        lines += [_sentence(pair, found, measure) for pair in tests["pairs"]]
    for name, decodings in found["unread"].items():
        for decoding, lost in decodings.items():
            lines += unread_lines(name, str(found["verifier"]), decoding, lost)
    return "\n".join(lines)


def _sentence(pair: dict[str, Any], found: dict[str, Any], measure: str) -> str:
    a, b = pair["a"], pair["b"]
    if pair.get("unreadable"):
        help_ = cure(str(found["verifier"]), found["unread"][a][decoding_of(measure)])
        return f"  {a} and {b}: no answer of either could be read, so nothing is known of their difference; {help_}."
    verdict = "no significant difference"
    if pair["p_holm"] < 1 - CONFIDENCE:
        better = pair["difference"] > 0
        verdict = f"{a if better else b} is better"
    corrected = f", {pair['p_holm']:.3g} corrected for all pairs (Holm)" if len(found["names"]) > 2 else ""
    return (
        f"  {a} - {b}: {100 * pair['difference']:+.1f} points ({100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}), "
        f"p = {pair['p_value']:.3g} by the {pair['test']} test{corrected}; {pair['wins']} problems better, "
        f"{pair['losses']} worse: {verdict}"
    )
