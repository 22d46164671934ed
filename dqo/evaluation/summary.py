"""What an evaluation comes to: every measure a problem, its mean with its error, and how many answers could not be read."""

from __future__ import annotations

from typing import Any

from dqo.evaluation.measures import best_at_k, majority_at_k, powers_of_two, standard_error
from dqo.evaluation.results import PROBLEMS_HASH, Answer, Evaluation
from dqo.evaluation.unread import Read, unread, unread_lines
from dqo.stats import accuracy_interval, pass_at_k


def per_problem(evaluation: Evaluation, samples: int | None = None) -> dict[str, list]:
    """{measure: a number or, for pass@1, n of them, a problem}, all in [0, 1]; unfinished decodings are left out.

    greedy and the searches: whether the answer is right. pass@k: the chance that one of k samples is, over all choices of k of
    the n (Chen et al.'s 1 - C(n-c, k) / C(n, k)). maj@k, best@k SCORER: see `dqo.evaluation.measures`. `samples`: n; None: all
    that are there.
    """
    found: dict[str, list] = {}
    for decoding in evaluation.decodings:
        answers = evaluation.of(decoding)
        if decoding != "sampling":
            if all(answers):
                found[decoding] = [given[0].right for given in answers]
            continue
        n = min(len(given) for given in answers) if samples is None else samples
        if n == 0 or any(len(given) < n for given in answers):
            continue
        found |= _of_samples(evaluation, [given[:n] for given in answers], n)
    return found


def _of_samples(evaluation: Evaluation, answers: list[list[Answer]], n: int) -> dict[str, list]:
    scores = [[answer.right for answer in given] for given in answers]
    found: dict[str, list] = {"pass@1": scores}
    powers = powers_of_two(n)
    found |= {f"pass@{k}": [pass_at_k(n, int(sum(row)), k) for row in scores] for k in powers if k > 1}
    votes = [[answer.answer for answer in given] for given in answers]
    # a verifier that says right or wrong alone gives no answers to count
    countable = all(answer.answer is not None for given in answers for answer in given if answer.parsed)
    for k in powers if countable else ():
        if k > 2:  # of two votes the majority is either's: pass@1
            found[f"maj@{k}"] = [majority_at_k(row, values, k) for row, values in zip(votes, scores)]
    for scorer, values in sorted(evaluation.scores.items()):
        ranks = [[values.get(answer.key) for answer in given] for given in answers]
        if all(None not in row for row in ranks):
            for k in powers:
                if k > 1:
                    found[f"best@{k} {scorer}"] = [best_at_k(r, s, k) for r, s in zip(ranks, scores)]  # type: ignore[arg-type]
    return found


def summary_of(evaluation: Evaluation, samples: int | None = None) -> dict[str, Any]:
    """What summary.json holds: {"measures": {name: {mean, standard_error, low, high}}, "unread": {decoding: ...}, ...}."""
    measures = {}
    for name, values in per_problem(evaluation, samples).items():
        interval = accuracy_interval(values)
        measures[name] = {
            "mean": interval.mean,
            "standard_error": standard_error(values),
            "low": interval.low,
            "high": interval.high,
        }
    return {
        "name": evaluation.name,
        "model": evaluation.header["model"],
        "verifier": evaluation.verifier,
        "problems": len(evaluation.problems),
        "problems_hash": evaluation.header["options"][PROBLEMS_HASH],
        "measures": measures,
        "unread": {decoding: unread_of(evaluation, decoding) for decoding in evaluation.decodings},
    }


def unread_of(evaluation: Evaluation, decoding: str) -> dict[str, Any]:
    """What could not be read of a decoding's answers, see `unread`."""
    problems = evaluation.problems
    return unread([
        Read(problems[a.problem], a.response, a.finish_reason == "stop", a.parsed, a.error)
        for given in evaluation.of(decoding)
        for a in given
    ])  # fmt: skip


def table(evaluation: Evaluation, summary: dict[str, Any]) -> str:
    """The measures in plain text, in %, with the share of unread answers beside every one."""
    rows = [["measure", "%", "standard error", "95% interval", "unread %"]]
    for name, found in summary["measures"].items():
        decoding = name if name in summary["unread"] else "sampling"
        error = found["standard_error"]
        rows.append([
            name,
            f"{100 * found['mean']:.1f}",
            "-" if error is None else f"{100 * error:.1f}",
            f"{100 * found['low']:.1f} to {100 * found['high']:.1f}",
            f"{100 * summary['unread'][decoding]['share']:.1f}",
        ])  # fmt: skip
    title = f"{summary['name']}: {summary['problems']:,} problems, verifier {summary['verifier']}"
    lines = [title, *aligned(rows)]
    for decoding, lost in summary["unread"].items():
        lines += unread_lines(summary["name"], str(summary["verifier"]), decoding, lost)
    return "\n".join(lines)


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines, the first column on the left, the others on the right; a rule under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip() for first, *rest in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
