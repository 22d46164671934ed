"""What a scored file holds: how the grading of its rows ended."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from dqo.grading.grade import OUTCOMES

CUT, KEPT = "cut", "kept"  # not graded: a response that did not end, and a row that had its reward
_SHOWN = 3  # responses without an answer
_TAIL = 70  # characters of each


class Seen(NamedTuple):
    """What is told of a written row."""

    outcome: str
    reward: float
    tail: str  # of its response, where no answer was found


def seen(row: dict) -> Seen:
    outcome = row["grading"]["outcome"] if "grading" in row else KEPT
    completion = row["completion"]
    text = completion if isinstance(completion, str) else completion[-1].get("content", "")
    return Seen(outcome, float(row["reward"]), text[-_TAIL:] if outcome == "unparsed" else "")


@dataclass(frozen=True)
class Summary:
    rows: int
    mean_reward: float
    outcomes: dict[str, int]  # right, wrong, unparsed, timeout, crash, and what was not graded: cut, kept
    unparsed: list[tuple[int, str]]  # number of the row, and the end of its response, of the first three

    @classmethod
    def of(cls, found: list[Seen]) -> Summary:
        counts = Counter(row.outcome for row in found)
        unparsed = [(number, row.tail) for number, row in enumerate(found, start=1) if row.outcome == "unparsed"]
        outcomes = {name: counts[name] for name in (*OUTCOMES, CUT, KEPT) if counts[name] or name in OUTCOMES}
        return cls(len(found), sum(row.reward for row in found) / len(found), outcomes, unparsed[:_SHOWN])

    def table(self, path: str, verifier: str) -> str:
        lines = [f"{path}: {self.rows:,} rows, mean reward {self.mean_reward:.4g}"]
        lines += [f"  {name:<9}{count:>9,}{count / self.rows:>9.1%}" for name, count in self.outcomes.items()]
        lines += [f"  no answer was found in row {number}: {tail!r}" for number, tail in self.unparsed]
        graded = self.rows - self.outcomes.get(CUT, 0) - self.outcomes.get(KEPT, 0)
        if self.outcomes["unparsed"] > graded / 2 and verifier == "gsm8k":
            lines.append("  gsm8k wants the answer after ####; --verifier number takes it however it is written")
        return "\n".join(lines)
