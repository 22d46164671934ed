"""Which numbers of a file's steps or turns say that one is wrong. They say it whatever training pays for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dqo.credit.steps import Mark, first_wrong_step, wrong_mark
from dqo.data.rows import Row


@dataclass(frozen=True)
class Marks:
    steps: Mark
    turns: Mark  # 0 is what most turns are paid, so it marks none of them, unless it is a pass rate

    @classmethod
    def of_rows(cls, rows: Iterable[Row], process_reward: str | None) -> Marks:
        """Told by all rows of a file, because one row alone may have no wrong step. `process_reward`: the option."""
        pass_rates = process_reward == "potential"
        numbers: set[float] = set()
        prompt_values = False
        for row in rows:
            numbers.update(row.step_rewards or ())
            prompt_values |= row.prompt_value is not None
        return cls(wrong_mark(numbers, pass_rates or prompt_values), "zero" if pass_rates else "negative")

    def of(self, row: Row) -> Mark:
        return self.turns if row.step_rewards is None else self.steps

    def first_wrong(self, row: Row) -> int | None:
        """The first wrong step, or turn, of a row, counted from 0."""
        return first_wrong_step(row.process_rewards or (), self.of(row))
