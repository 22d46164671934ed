"""Rows on the tokens of a finished run, paid as it was paid."""

from __future__ import annotations

import sys

import numpy as np

from dqo.data.episode import Episode
from dqo.data.episodes import make_episodes
from dqo.data.marks import Marks
from dqo.data.rows import Row
from dqo.errors import UserError
from dqo.models.adapters import adapter_base
from dqo.models.limits import check_tokenizer, position_limit
from dqo.models.named import stop_ids
from dqo.train.token_scores import RunModels

_PAY = ("process_coef", "reward_scale", "reward_shift", "gamma", "discount")


def episodes_of(models: RunModels, rows: list[Row], marks: Marks | None = None) -> list[Episode]:
    """One episode a row, whole, with the rewards that the options of the run's config.yaml make of its rewards; where that tells
    none, those of the defaults. `marks`: of wrong steps; None: what these rows tell.

    Raises:
        UserError: for rows that cannot be placed on tokens, and for one that is longer than a model.
    """
    config, options = models.policy.config, models.options
    check_tokenizer(models.tokenizer, rows, config)
    path = str(models.directory)
    made = make_episodes(
        rows,
        models.tokenizer,
        vocab_size=config.get_text_config().vocab_size,
        max_length=sys.maxsize,
        stop_ids=stop_ids(adapter_base(path) or path),
        process_reward=options.get("process_reward") or "none",
        truncation="bootstrap" if options.get("truncation") == "bootstrap" else "terminal",  # none is left out
        marks=marks,
        **{name: options[name] for name in _PAY if options.get(name) is not None},
    )
    for model in filter(None, (models.policy, models.reference)):
        limit, hard = position_limit(model.config)
        longer = [e for e in made if limit is not None and e.length > limit]
        if longer and hard:
            raise UserError(
                f"{longer[0].source}: {longer[0].length:,} tokens of prompt and completion, and the model has {limit:,} "
                f"positions ({len(longer):,} of {len(made):,} responses are longer); choose other rows"
            )
    return made


def discounts_of(models: RunModels, episode: Episode) -> np.ndarray:
    """(T,) the run's discount behind each token: everywhere, or behind the last of each turn alone."""
    return episode.discounts(float(models.options.get("gamma", 1.0)), str(models.options.get("discount", "tokens")))
