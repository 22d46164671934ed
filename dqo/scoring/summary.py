"""What a scored file holds: how the grading of its rows ended."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from dqo.grading.grade import OUTCOMES

# not graded: a response that did not end, a row that had its reward, and one that has none
CUT, KEPT, UNGRADED = "cut", "kept", "ungraded"
_SHOWN = 3  # responses without an answer
_TAIL = 70  # characters of each


class Seen(NamedTuple):
    """What is told of a written row."""

    outcome: str
    reward: float | None
    tail: str  # of its response, where no answer was found
    step_rewards: tuple[int, float]  # how many, and their sum
    prompt_value: float | None


def seen(row: dict) -> Seen:
    reward = row.get("reward")
    outcome = row["grading"]["outcome"] if "grading" in row else KEPT if reward is not None else UNGRADED
    steps = row.get("step_rewards") or ()
    completion = row["completion"]
    text = completion if isinstance(completion, str) else completion[-1].get("content", "")
    return Seen(
        outcome,
        None if reward is None else float(reward),
        text[-_TAIL:] if outcome == "unparsed" else "",
        (len(steps), float(sum(steps))),
        row.get("prompt_value"),
    )


@dataclass(frozen=True)
class Summary:
    rows: int
    mean_reward: float | None  # of the rows that have one; None: no row has
    outcomes: dict[str, int]  # right, wrong, unparsed, timeout, crash, and what was not graded: cut, kept, ungraded
    unparsed: list[tuple[int, str]]  # number of the row, and the end of its response, of the first three
    steps: int  # that have a reward
    mean_step_reward: float | None

    @classmethod
    def of(cls, found: list[Seen]) -> Summary:
        counts = Counter(row.outcome for row in found)
        unparsed = [(number, row.tail) for number, row in enumerate(found, start=1) if row.outcome == "unparsed"]
        outcomes = {name: counts[name] for name in (*OUTCOMES, CUT, KEPT, UNGRADED) if counts[name] or name in OUTCOMES}
        rewards = [row.reward for row in found if row.reward is not None]
        steps, total = (sum(column) for column in zip(*(row.step_rewards for row in found)))
        return cls(len(found), _mean(rewards), outcomes, unparsed[:_SHOWN], steps, total / steps if steps else None)

    def table(self, path: str, verifier: str | None) -> str:
        told = "no rewards" if self.mean_reward is None else f"mean reward {self.mean_reward:.4g}"
        if self.mean_step_reward is not None:
            told += f"; {self.steps:,} step rewards, mean {self.mean_step_reward:.4g}"
        lines = [f"{path}: {self.rows:,} rows, {told}"]
        if verifier is None:
            return lines[0]
        lines += [f"  {name:<9}{count:>9,}{count / self.rows:>9.1%}" for name, count in self.outcomes.items()]
        lines += [f"  no answer was found in row {number}: {tail!r}" for number, tail in self.unparsed]
        graded = self.rows - self.outcomes.get(CUT, 0) - self.outcomes.get(KEPT, 0)
        if self.outcomes["unparsed"] > graded / 2 and verifier == "gsm8k":
            lines.append("  gsm8k wants the answer after ####; --verifier number takes it however it is written")
        return "\n".join(lines)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
