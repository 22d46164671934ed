"""Answers that the verifier could not read: how many, what they look like, and what may help."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dqo.errors import printable
from dqo.grading.verifiers import VERIFIERS

SMALL = 0.05  # a share that needs no examples
_SHOWN = 3
_TAIL = 200  # characters of an example, the last of the response: answers stand at the end


@dataclass(frozen=True)
class Read:
    """A graded response, as far as it concerns whether an answer was found in it."""

    problem: dict[str, Any]  # source, answer
    response: str
    ended: bool
    parsed: bool
    error: str | None  # of the verifier: "timeout" ...


def unread(reads: Sequence[Read]) -> dict[str, Any]:
    """{share, of, cut, errors, examples}: the share of responses without a readable answer, the number of all, the share of those
    that were cut off, {what went wrong in the verifier: how often}, and three responses, of distinct problems."""
    lost = [read for read in reads if not read.parsed]
    shown: dict[str, Read] = {}
    for read in sorted(lost, key=lambda read: not read.ended):  # those that ended first
        shown.setdefault(str(read.problem.get("source")), read)
    return {
        "share": len(lost) / len(reads),
        "of": len(reads),
        "cut": sum(not read.ended for read in reads) / len(reads),
        "errors": dict(Counter(read.error for read in lost if read.error is not None)),
        "examples": [
            {"source": source, "answer": read.problem.get("answer"), "response": read.response[-_TAIL:]}
            for source, read in list(shown.items())[:_SHOWN]
        ],
    }


def unread_lines(name: str, verifier: str, decoding: str, lost: dict[str, Any]) -> list[str]:
    """What the terminal says of a model's unreadable answers; nothing where they are few."""
    if lost["share"] <= SMALL:
        return []
    what = "no answer could" if lost["share"] == 1 else f"{lost['share']:.1%} of the answers could not"
    lines = [f"{name}, {decoding}: {what} be read by the verifier {verifier}, such as these:"]
    for example in lost["examples"]:
        lines.append(f"    {example['source']} (answer {example['answer']}): {printable(repr(example['response']))}")
    return [*lines, f"    {cure(verifier, lost)}"]


def cure(verifier: str, lost: dict[str, Any]) -> str:
    """What may help against unreadable answers."""
    if lost["cut"] > lost["share"] / 2:
        return f"{lost['cut']:.1%} of the answers were cut off before their end: raise --max_completion_length"
    if lost["errors"]:
        told = ", ".join(f"{what} ({count:,})" for what, count in sorted(lost["errors"].items()))
        return f"the verifier itself failed: {told}"
    others = " or ".join(f"--verifier {name}" for name in VERIFIERS if name not in (verifier, "arith"))
    return f"they may have another form than {verifier} reads: try {others}, or --verifier python:module:function of your own"
