"""What is asked of all rows together: whether they differ, what repeats, and which are held out. By columns, not by rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from dqo.data.rows import Row, prompt_key
from dqo.data.stored import column, process_rewards, several, take
from dqo.errors import UserError


def check_contrast(rows: Sequence[Row]) -> str:
    """A warning when no prompt has responses with different rewards, else "".

    Raises:
        UserError: when all rewards are equal and no step has a reward, so that there is nothing to learn.
    """
    rewards = column(rows, "reward")
    if len(rewards) and (rewards == rewards[0]).all() and not process_rewards(rows).any():
        raise UserError(
            f"every reward is {rewards[0].item()}: nothing to learn. Check the grader, or add responses that it "
            "rewards differently"
        )
    prompts, mixed = several(column(rows, "prompt"), rewards)
    if mixed:
        return ""
    return (
        f"no prompt has responses with different rewards ({len(rows)} responses, {prompts} prompts): "
        "responses can only be compared across prompts"
    )


def check_process_reward(rows: Sequence[Row], name: str, process_reward: str | None) -> None:
    """Refuses rewards of steps or turns without a choice of what they do, a choice without any, and potentials that differ where
    they belong to one state."""
    paid = np.flatnonzero(column(rows, "paid") >= 0)
    found = len(paid) > 0
    if process_reward == "potential":
        _check_prompt_values(rows, name)
        found = found or not np.isnan(column(rows, "prompt_value")).all()
    if found and process_reward is None:
        what = "turn" if column(rows, "turns_paid")[paid[0]] else "step"
        raise UserError(
            f"{name} has {what}_rewards; choose what they do: --process_reward additive (added on the last token of their "
            f"{what}), --process_reward potential (they are pass rates of the prefixes, whose differences are paid and move no "
            "optimum) or --process_reward none (they pay nothing, and still mark wrong steps)"
        )
    if not found and process_reward not in (None, "none"):
        raise UserError(
            f"{name} has no step_rewards, so --process_reward {process_reward} would do nothing; drop the option, or add "
            "steps and step_rewards, or turn_rewards (`dqo score FILE --prefix_values 8` measures pass rates of prefixes)"
        )


def _check_prompt_values(rows: Sequence[Row], name: str) -> None:
    """A potential of the prompt that all its rows share moves no optimum; different ones are rewards."""
    values = column(rows, "prompt_value")
    _, first, prompt = np.unique(column(rows, "prompt"), return_index=True, return_inverse=True)
    expected = values[first[prompt]]
    wrong = np.flatnonzero(~((values == expected) | (np.isnan(values) & np.isnan(expected))))
    if len(wrong):
        row, of_prompt = rows[int(wrong[0])], rows[int(first[prompt[wrong[0]]])]
        raise UserError(
            f"{row.source or name}: prompt_value is {row.prompt_value}, and {of_prompt.source or 'a row'} of the same prompt has "
            f"{of_prompt.prompt_value}; as potentials they must be equal: give every row of a prompt one value, or none"
        )


def duplicate_count(rows: Sequence[Row]) -> int:
    """Rows that repeat prompt and completion of an earlier row."""
    return len(rows) - len(np.unique(column(rows, "same")))


def split_by_prompt(rows: Sequence[Row], fraction: float, seed: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """Rows to train on and rows held out, in their order; all rows of a prompt fall on one side.

    A prompt is held out with probability `fraction` by a hash of its text and the seed, whatever the other
    rows are. So a small file may have none.
    """
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"the held-out fraction must be in [0, 1), got {fraction}")
    _, first, prompt = np.unique(column(rows, "prompt"), return_index=True, return_inverse=True)
    held = np.zeros(len(first), np.bool_)
    for i, row in enumerate(first.tolist()):
        digest = hashlib.sha256(f"{seed}/{prompt_key(rows[row])}".encode()).digest()
        held[i] = int.from_bytes(digest[:8], "big") < fraction * 2**64
    held_out = held[prompt]
    return take(rows, ~held_out), take(rows, held_out)
