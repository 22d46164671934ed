"""Rows -> episodes: token ids, rewards on tokens, and whether the response ended.

A response that ended has exactly one end token, which carries the outcome reward; step rewards sit on the last token of their
step. Of several turns only the tokens that the model wrote are actions: arrays hold those alone, one behind the other, and
`env_mask` says where they lie among the completion's tokens. Nothing but the batches' input ids knows of the others.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dqo.credit.steps import first_wrong_step
from dqo.data.chat import clock_at
from dqo.data.ends import ends_of
from dqo.data.fields import FLOAT32_MAX
from dqo.data.marks import Marks
from dqo.data.rows import Row
from dqo.data.tokens import Tokens, tokenize_rows
from dqo.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Episode:
    """One response. T is the number of its actions, the completion's tokens that the model wrote; arrays are float32 (T,)."""

    prompt_ids: list[int]
    completion_ids: list[int]  # the last is an action
    rewards: np.ndarray  # outcome reward on the last token, and what `process_reward` makes of the step rewards
    reward: float  # outcome reward as trained on
    label: bool
    terminated: bool  # its last state is worth nothing; False: it is bootstrapped
    prompt_index: int  # episodes of one prompt share it
    source: str
    truncated: bool = False  # cut by a length limit, whatever its last state is taken for
    behavior_logprobs: np.ndarray | None = None
    step_ends: list[int] = field(default_factory=list)  # index of the last token of each step
    step_rewards: list[float] = field(default_factory=list)
    prompt_value: float | None = None  # as the file has it, beside step rewards that are potentials
    first_wrong_step: int | None = None  # that the step rewards mark, counted from 0; see dqo.data.marks
    ref_logprobs: np.ndarray | None = None
    ref_lse: np.ndarray | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # what the objective adds, (T,) each
    companion: Episode | None = None  # another response to the same prompt, read without gradient
    env_mask: np.ndarray | None = (
        None  # bool, one for each of completion_ids, False on the environment's; None: all are actions
    )
    turn_ends: list[int] = field(default_factory=list)  # the last action of each turn that came to its end

    @property
    def actions(self) -> np.ndarray:
        """(T,) positions of the actions among completion_ids."""
        return np.arange(len(self.completion_ids)) if self.env_mask is None else np.flatnonzero(self.env_mask)

    @property
    def action_count(self) -> int:
        """T."""
        return len(self.completion_ids) if self.env_mask is None else int(self.env_mask.sum())

    @property
    def turn_end(self) -> np.ndarray:
        """(T,) 1 on the last action of each turn that came to its end, else 0."""
        return _flags(self.turn_ends, self.action_count).astype(np.float32)

    def discounts(self, gamma: float, discount: str) -> np.ndarray:
        """(T,) the factor behind each action. `discount`: "tokens", it acts at each; "turns", at the last of each turn alone."""
        acts = self.turn_end > 0 if discount == "turns" else np.ones(self.action_count, bool)
        return np.where(acts, gamma, 1.0)

    @property
    def action_ids(self) -> list[int]:
        """(T,) token ids of the actions."""
        return self.completion_ids if self.env_mask is None else [self.completion_ids[i] for i in self.actions]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def first_tokens(ids: list[int], env_mask: Any, count: int) -> tuple[list[int], Any, int]:
    """The first `count` ids of a completion, without the environment's behind the last action; their mask; and the actions among
    them."""
    if env_mask is None:
        return ids[:count], None, min(count, len(ids))
    kept = np.flatnonzero(env_mask[:count])
    end = kept[-1] + 1 if len(kept) else 0
    return ids[:end], env_mask[:end], len(kept)


def _cut(tokens: Tokens, max_length: int) -> Tokens:
    """The first max_length tokens; steps and turns go with their tokens, and the response has not ended."""
    ids, mask, actions = first_tokens(tokens.completion, tokens.env_mask, max_length - len(tokens.prompt))
    logprobs = None if tokens.logprobs is None else tokens.logprobs[: len(ids)]
    step_ends, turn_ends = ([end for end in ends if end < actions] for ends in (tokens.step_ends, tokens.turn_ends))
    return Tokens(tokens.row, tokens.prompt, ids, step_ends, logprobs, True, turn_ends, False, mask)


@dataclass(frozen=True, slots=True)
class _Payment:
    """How tokens are paid; see `make_episodes`."""

    process_reward: str
    process_coef: float
    gamma: float
    discount: str
    truncation: str
    scale: float
    shift: float
    marks: Marks


def shaping(
    step_ends: list[int],
    potentials: list[float],
    length: int,
    gamma: float | np.ndarray,
    terminated: bool,
    initial: float = 0.0,
) -> np.ndarray:
    """(length,) gamma * Phi(s_{t+1}) - Phi(s_t) of every token (Ng, Harada and Russell 1999), which moves no optimum.

    Phi(s_{t+1}), of the prefix that ends with token t, is the potential of the last step that has ended by then: it stays
    between the ends of steps, so that with gamma < 1 every token is paid. `initial` is that of the prompt, which all its
    responses share. It is 0 for a terminal state, whatever its step has: another value there would reward the way of ending.
    `terminated` False: the last state goes on, and keeps its potential.
    `gamma` may be one number for each token.
    """
    after = np.full(length, initial)
    for end, potential in zip(step_ends, potentials):
        after[end:] = potential
    if terminated:
        after[-1] = 0.0
    before = np.concatenate([[initial], after[:-1]])
    return gamma * after - before


def _flags(indices: list[int], length: int) -> np.ndarray:
    """(length,) bool, True at these indices."""
    found = np.zeros(length, dtype=bool)
    found[indices] = True
    return found


def _episode(tokens: Tokens, prompt_index: int, pay: _Payment) -> Episode:
    row = tokens.row
    bootstrapped = tokens.truncated and pay.truncation == "bootstrap"
    outcome = 0.0 if bootstrapped else pay.scale * row.reward + pay.shift
    step_rewards = list(row.process_rewards or [])[: len(tokens.step_ends)]
    ends = tokens.step_ends[: len(step_rewards)]
    env_mask = None if tokens.env_mask is None else np.asarray(tokens.env_mask, dtype=bool)
    length = len(tokens.completion) if env_mask is None else int(env_mask.sum())
    turn_ends = tokens.turn_ends[:-1] if tokens.open_end else tokens.turn_ends
    rewards = np.zeros(length)
    rewards[-1] = outcome
    if pay.process_reward == "additive":
        np.add.at(rewards, ends, pay.process_coef * np.asarray(step_rewards))
    elif pay.process_reward == "potential":
        gamma = pay.gamma if pay.discount == "tokens" else np.where(_flags(turn_ends, length), pay.gamma, 1.0)
        rewards += pay.process_coef * shaping(
            ends, step_rewards, length, gamma, not bootstrapped, row.prompt_value or 0.0
        )
    beyond = np.flatnonzero(~(np.abs(rewards) <= FLOAT32_MAX))
    if len(beyond):
        raise UserError(
            f"{row.source}: the reward of token {beyond[0] + 1} is {rewards[beyond[0]]:.3g} with the factors of reward_scale, "
            f"reward_shift and process_coef; float32 holds at most {FLOAT32_MAX:.2g}: lower them, or drop the row"
        )
    logprobs = None if tokens.logprobs is None else np.asarray(tokens.logprobs, dtype=np.float32)
    return Episode(
        prompt_ids=tokens.prompt,
        completion_ids=tokens.completion,
        rewards=rewards.astype(np.float32),
        reward=pay.scale * row.reward + pay.shift,
        label=row.label,
        terminated=not bootstrapped,
        prompt_index=prompt_index,
        source=row.source,
        truncated=tokens.truncated,
        behavior_logprobs=logprobs if logprobs is None or env_mask is None else logprobs[env_mask],
        step_ends=tokens.step_ends,
        step_rewards=step_rewards,
        prompt_value=row.prompt_value,
        first_wrong_step=first_wrong_step(step_rewards, pay.marks.of(row)),
        env_mask=env_mask,
        turn_ends=turn_ends,
    )


def make_episodes(
    rows: list[Row],
    tokenizer,
    *,
    vocab_size: int,
    max_length: int,
    stop_ids: Iterable[int] = (),
    template_time: datetime.datetime | None = None,
    skip_bad_rows: bool = False,
    process_reward: str = "none",
    process_coef: float = 1.0,
    gamma: float = 1.0,
    discount: str = "tokens",
    truncation: str = "terminal",
    allow_truncation: bool = False,
    reward_scale: float = 1.0,
    reward_shift: float = 0.0,
    marks: Marks | None = None,
) -> list[Episode]:
    """Tokenises rows.

    Args:
        rows: validated rows. vocab_size: ids at or above it are refused.
        max_length: tokens of prompt and completion; longer completions are refused, or cut with `allow_truncation`.
        stop_ids: end tokens of the model's generation_config, beside the tokenizer's and the chat template's.
        template_time: what chat templates take for now; None: the clock.
        skip_bad_rows: leave out rows that cannot be placed on tokens, and log how many, instead of raising.
        process_reward: "none"; "additive", step rewards are added on the last token of their step; or "potential", a step's
            reward is Phi of the prefix that ends with it, such as the share of its completions that are right, and the
            tokens are paid gamma * Phi(s_{t+1}) - Phi(s_t) on top: see `shaping`. Phi of the prompt is the row's prompt_value,
            or 0.
        process_coef: factor of the step rewards, or of Phi. gamma, discount: the objective's discount, and where it acts:
            "tokens", each of the model's, or "turns", the last of each turn.
        truncation: of responses that did not end, "terminal" (paid as they are), "bootstrap" (no outcome reward, V of the
            last state instead) or "drop".
        reward_scale, reward_shift: the outcome reward becomes scale * reward + shift.
        marks: which step rewards say that a step is wrong; None: what these rows tell of it.

    Raises:
        UserError: naming the row, for prompts or completions that cannot be placed on tokens.
    """
    ends = ends_of(tokenizer, stop_ids, messages=not isinstance(rows[0].prompt, str))
    with clock_at(template_time):
        tokenized = tokenize_rows(rows, tokenizer, ends, vocab_size, max_length, skip_bad_rows)
    lengths = [tokens.length for tokens in tokenized]
    over = [tokens for tokens in tokenized if tokens.length > max_length]
    if over:
        share, p99 = len(over) / len(tokenized), int(np.percentile(lengths, 99))
        cut = f"{share:.1%} of rows exceed max_length={max_length} (p99 = {p99:,}; first: {over[0].row.source})"
        if not allow_truncation:
            raise UserError(f"{cut}. Raise --max_length, or pass --allow_truncation")
        logger.warning("%s and are cut there", cut)
        tokenized = [tokens if tokens.length <= max_length else _cut(tokens, max_length) for tokens in tokenized]
    kept = [tokens for tokens in tokenized if not tokens.truncated or truncation != "drop"]
    if len(kept) < len(tokenized):
        logger.warning("%d responses that did not end are dropped (truncation=drop)", len(tokenized) - len(kept))
    if not kept:
        raise UserError("no response is left to train on")
    marks = marks or Marks.of_rows(rows, process_reward)
    pay = _Payment(process_reward, process_coef, gamma, discount, truncation, reward_scale, reward_shift, marks)
    indices: dict[str, int] = {}
    episodes = []
    for tokens in kept:
        index = indices.setdefault(json.dumps(tokens.prompt), len(indices))
        episodes.append(_episode(tokens, index, pay))
    return episodes


def fingerprint(episodes: Iterable[Episode]) -> str:
    """sha256 of everything that training reads of the data; a resumed run must find the same."""
    digest = hashlib.sha256()
    for e in episodes:
        digest.update(np.asarray([len(e.prompt_ids), len(e.completion_ids), e.terminated, e.label], np.int64).tobytes())
        digest.update(np.asarray(e.prompt_ids + e.completion_ids, np.int64).tobytes())
        digest.update(e.rewards.tobytes())
        if e.behavior_logprobs is not None:
            digest.update(e.behavior_logprobs.tobytes())
        if e.env_mask is not None:
            digest.update(e.env_mask.tobytes() + np.asarray(e.turn_ends, np.int64).tobytes())
    return digest.hexdigest()
