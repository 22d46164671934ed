"""Outcome rewards of mean 0 and variance 1, as arXiv 2405.19107 and 2307.04964 train on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dqo.config.options import Options
from dqo.data.rows import Row
from dqo.data.stored import column
from dqo.errors import UserError


def with_normalised_rewards(options: Options, rows: Sequence[Row]) -> tuple[Options, str]:
    """The options with the reward_scale and reward_shift that give the rows that are trained on mean 0 and variance 1, in place
    of normalize_rewards, and a line that says so; as they are, and "", without it.

    Raises:
        UserError: where all rewards are equal, or a scale or shift is given too.
    """
    if not options.train.normalize_rewards:
        return options, ""
    given = [name for name in ("reward_scale", "reward_shift") if name in options.sources]
    if given:
        raise UserError(f"normalize_rewards and {given[0]} are both given ({options.sources[given[0]]}); remove one")
    rewards = column(rows, "reward")
    mean, deviation = float(rewards.mean()), float(rewards.std())
    if not deviation > 0:
        raise UserError(f"normalize_rewards: every reward is {mean:g}, which no factor gives variance 1; remove it")
    scale, shift = 1.0 / deviation, -mean / deviation
    config = replace(options.train, normalize_rewards=False, reward_scale=scale, reward_shift=shift)
    said = f"normalize_rewards: reward_scale {scale:.6g}, reward_shift {shift:.6g}"
    return replace(options, train=config), said
