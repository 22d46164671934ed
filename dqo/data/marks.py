"""Which numbers of a file's steps or turns say that one is wrong. They say it whatever training pays for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dqo.credit.steps import Mark, first_wrong_step, marked, wrong_mark
from dqo.data.rows import Row
from dqo.data.stored import column, paid_by_turns, process_rewards


@dataclass(frozen=True)
class Marks:
    steps: Mark
    turns: Mark  # 0 is what most turns are paid, so it marks none of them, unless it is a pass rate

    @classmethod
    def of_rows(cls, rows: Sequence[Row], process_reward: str | None) -> Marks:
        """Told by all rows of a file, because one row alone may have no wrong step. `process_reward`: the option."""
        pass_rates = process_reward == "potential"
        prompt_values = not np.isnan(column(rows, "prompt_value")).all()
        numbers = np.unique(process_rewards(rows)[~paid_by_turns(rows)]).tolist()
        return cls(wrong_mark(numbers, pass_rates or prompt_values), "zero" if pass_rates else "negative")

    def of(self, row: Row) -> Mark:
        return self.turns if row.step_rewards is None else self.steps

    def wrong_steps(self, rows: Sequence[Row]) -> np.ndarray:
        """bool: which of `process_rewards` mark a step, not a turn, as wrong."""
        return marked(process_rewards(rows), self.steps) & ~paid_by_turns(rows)

    def first_wrong(self, row: Row) -> int | None:
        """The first wrong step, or turn, of a row, counted from 0."""
        return first_wrong_step(row.process_rewards or (), self.of(row))
