"""What is made of the rows of a file, in training as in the check before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RowOptions:
    max_length: int = 1024
    """A prompt and its completion have at most this many tokens together."""
    allow_truncation: bool = False
    """Longer rows are cut at max_length instead of being refused."""
    truncation: Literal["terminal", "bootstrap", "drop"] = "terminal"
    """What becomes of responses that did not end: terminal pays them as they are, bootstrap adds the value of their last
    state, drop leaves them out."""
    process_reward: Literal["none", "additive", "potential"] | None = None
    """What step_rewards in the file do, which must be chosen when there are any. none ignores them. additive pays each on the
    last token of its step. potential takes them for pass rates of the prefixes and pays their differences, which moves no
    optimum."""
    process_coef: float = 1.0
    """Step rewards or potentials are multiplied by this."""
    reward_scale: float = 1.0
    """The outcome reward is reward_scale * reward + reward_shift."""
    reward_shift: float = 0.0
    """The outcome reward is reward_scale * reward + reward_shift."""
    reward_threshold: float = 0.5
    """A response without a label counts as correct when its reward is above this."""
    row_cache_dir: str | None = None
    """The checked rows of a file of more than 8 MB, and their tokens, are kept here, so that no other process and no later
    command makes them again. None keeps those of a training in output_dir/row_cache, and those of a check nowhere."""
    skip_bad_rows: bool = False
    """Rows that fail the checks are left out and counted, instead of ending the run."""
