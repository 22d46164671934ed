"""Rewards of steps that a model tells by itself, without a verifier and without a labelled step.

    implicit:RUN      beta * (log pi(y_t|s_t) - log ref(y_t|s_t)), summed over the step's tokens: the policy that a run trained
                      as a process reward model (arXiv 2404.12358, 2412.01981); the sum is Q - V of all that the step wrote
    value:RUN         V of the state after the step, by the run's value model, minus V of the state before it
    likelihood:MODEL  log pi(y_t|s_t), summed over the step's tokens

As sums they pay each step; as potentials they are added up from the prompt's, which is 0, and for value V of the prompt. A token
belongs to the step in which it begins, as in training, and the end token to the last step. No value model knows the value of a
response that has ended: V after the last step is that of the state before its last token.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dqo.credit.steps import step_sums
from dqo.data.episode import Episode
from dqo.data.episodes import Episodes, open_episodes
from dqo.data.rows import prompt_key
from dqo.data.step_columns import step_counts
from dqo.errors import UserError
from dqo.models.identity import check_holds_model
from dqo.models.limits import check_positions, check_tokenizer
from dqo.models.named import load_tokenizer, stop_ids
from dqo.models.policy import load_policy, weights_hash
from dqo.sampling.backends import dtype_of
from dqo.scoring.options import ScoreConfig
from dqo.scoring.rows import AT_ONCE, Measured, Scored
from dqo.scoring.summary import Seen
from dqo.train.token_scores import RunModels, load_run, token_scores

NAMES = {"implicit": ("logprobs", "ref_logprobs"), "value": ("values",), "likelihood": ("logprobs",)}


class ByModel:
    """The models of `config.by`, and the rows on their tokens.

    Raises:
        UserError: for what is no run, has no reference or no value model, and for rows that do not fit the model.
    """

    def __init__(self, config: ScoreConfig, rows: list[Scored]):
        self.kind, path = config.told_by
        self.config, self.rows = config, rows
        self.models = models_of(self.kind, path, config.ref_model_name_or_path, config.dtype)
        self.episodes = episodes_of(rows, self.models)

    @property
    def identity(self) -> str:
        """A hash of all that the rewards depend on, beside the rows and the options."""
        models = [self.models.policy, self.models.reference, self.models.value_model]
        told = [str(self.models.beta), *(weights_hash(model) for model in models if model is not None)]
        return hashlib.sha256(" ".join(told).encode()).hexdigest()[:32]

    def measured(self, written: Sequence[Seen], say: Callable[[str], object]) -> Iterator[Measured]:
        """Those of the rows behind the `written` ones, as they are asked for. `say` gets what it costs, before it begins."""
        left = self.episodes.take(np.arange(len(written), len(self.episodes)))
        names = ["policy"] if self.models.reference is None else ["policy", "reference"]
        if self.models.value_model is not None:
            names.append("value model")
        say(
            f"steps rewarded by {self.config.by}: {len(left):,} of {len(self.rows):,} rows with "
            f"{step_counts(left).sum():,} steps; {' and '.join(names)} read{'s' * (len(names) == 1)} "
            f"{left.lengths.sum():,} tokens"
        )
        prompts = [prompt_key(scored.row) for scored in self.rows]
        # rounding depends on the batch, and all rows of a prompt must have one prompt_value
        values = {prompt: seen.prompt_value for prompt, seen in zip(prompts, written) if seen.prompt_value is not None}
        begin = len(written) - len(written) % AT_ONCE  # a run that goes on computes the batches of an unbroken one
        for first in range(begin, len(self.rows), AT_ONCE):
            if first + AT_ONCE <= len(written):
                continue
            episodes = self.episodes[first : first + AT_ONCE]
            scores = token_scores(self.models, episodes, NAMES[self.kind], description=f"rows from {first + 1:,}")
            for i, (episode, found) in enumerate(zip(episodes, scores), start=first):
                made = self._row(episode, found)
                if made.prompt is not None:
                    made = replace(made, prompt=values.setdefault(prompts[i], made.prompt))
                if i >= len(written):
                    yield made

    def _row(self, episode: Episode, scores: dict[str, np.ndarray]) -> Measured:
        prompt, sums = step_rewards(self.kind, episode, scores, self.models.beta)
        if self.config.by_as == "sums":
            return Measured(None, sums.tolist())
        return Measured(prompt, (prompt + sums.cumsum()).tolist())


def models_of(
    kind: str,
    path: str,
    reference: str | None = None,
    dtype: str = "auto",
    device: torch.device | str | None = None,
) -> RunModels:
    """The models that a kind of `by` reads: those of a run for implicit and value, any policy for likelihood. `device`: None
    takes the accelerator where there is one."""
    if kind == "likelihood":
        check_holds_model(path)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        policy = load_policy(path, device, dtype_of(dtype, path))
        return RunModels(policy, None, None, 1.0, load_tokenizer(path), Path(path))
    models = load_run(path, reference=reference, with_reference=kind == "implicit", dtype=dtype, device=device)
    if kind == "implicit":
        return replace(models, value_model=None)
    if models.value_model is None:
        raise UserError(
            f"value:{path}: the run has no value model (critic/); name a run of a method that has one, or take implicit:{path}"
        )
    return models


def episodes_of(rows: list[Scored], models: RunModels) -> Episodes:
    """The rows on the model's tokens, each made when it is read; their rewards are not read.

    Raises:
        UserError: naming the row, for steps that cannot be placed on tokens, tokens that the model does not have, and rows that
            are longer than it.
    """
    config, tokenizer = models.policy.config, models.tokenizer
    plain = [replace(scored.row, reward=0.0, label=False, step_rewards=None, prompt_value=None) for scored in rows]
    check_tokenizer(tokenizer, plain, config)
    episodes = open_episodes(
        plain,
        tokenizer,
        vocab_size=config.get_text_config().vocab_size,
        max_length=sys.maxsize,
        stop_ids=stop_ids(models.policy),
    )
    check_positions(config, episodes, cure="drop the rows")
    return episodes


def step_rewards(kind: str, episode: Episode, scores: dict[str, np.ndarray], beta: float) -> tuple[float, np.ndarray]:
    """(value of the prompt, (S,) float64 reward of each step) by the `scores` (T,) of an episode's tokens, see `NAMES`.

    Raises:
        UserError: for scores that are not finite, naming row and token.
    """
    tokens = scores[NAMES[kind][0]].astype(float)
    if kind == "implicit":
        tokens = beta * (tokens - scores["ref_logprobs"])
    wrong = np.flatnonzero(~np.isfinite(tokens))
    if len(wrong):
        raise UserError(
            f"{episode.source}: {kind} of token {wrong[0] + 1} of the response is {tokens[wrong[0]]}, which rewards no step; "
            "drop the row, or check model and dtype"
        )
    if kind != "value":
        return 0.0, step_sums(tokens, episode.step_ends)
    last = len(tokens) - 1
    after = [tokens[min(end + 1, last)] for end in episode.step_ends[:-1]] + [tokens[last]] * bool(episode.step_ends)
    return float(tokens[0]), np.diff(after, prepend=tokens[0])
