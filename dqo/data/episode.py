"""One response on its tokens, and what each of them is paid.

A response that ended has exactly one end token, which carries the outcome reward; step rewards sit on the last token of their
step. Of several turns only the tokens that the model wrote are actions: arrays hold those alone, one behind the other, and
`env_mask` says where they lie among the completion's tokens. Nothing but the batches' input ids knows of the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dqo.credit.steps import first_wrong_step
from dqo.data.fields import FLOAT32_MAX
from dqo.data.marks import Marks
from dqo.data.tokens import Tokens
from dqo.errors import UserError


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
    wrong_from: int | None = None  # the action with which that step begins; None: no step is marked, turns aside
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
    def right_length(self) -> int:
        """How many of its first actions are right as far as the file tells: those before the first step that is marked as wrong;
        without one all, if the response counts as correct, and else none."""
        if self.wrong_from is None:
            return self.action_count if self.label else 0
        return self.wrong_from

    @property
    def action_ids(self) -> list[int]:
        """(T,) token ids of the actions."""
        return self.completion_ids if self.env_mask is None else [self.completion_ids[i] for i in self.actions]

    @property
    def prompt_count(self) -> int:
        return len(self.prompt_ids)

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


def cut(tokens: Tokens, max_length: int) -> Tokens:
    """The first max_length tokens; steps and turns go with their tokens, and the response has not ended."""
    ids, mask, actions = first_tokens(tokens.completion, tokens.env_mask, max_length - len(tokens.prompt))
    logprobs = None if tokens.logprobs is None else tokens.logprobs[: len(ids)]
    step_ends, turn_ends = ([end for end in ends if end < actions] for ends in (tokens.step_ends, tokens.turn_ends))
    return Tokens(tokens.row, tokens.prompt, ids, step_ends, logprobs, True, turn_ends, False, mask)


@dataclass(frozen=True, slots=True)
class Payment:
    """How tokens are paid; see `dqo.data.episodes.make_episodes`."""

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


def begin_of(step: int, ends: Sequence[int], length: int) -> int:
    """The action with which a step begins; `length` where the response was cut before it. A token of two steps is of both."""
    if step == 0 or step > len(ends):
        return length if step else 0
    shared = step < len(ends) and ends[step] == ends[step - 1]
    return ends[step - 1] + (not shared)


def paid(tokens: Tokens, prompt_index: int, pay: Payment) -> Episode:
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
    wrong = None if row.step_rewards is None else pay.marks.first_wrong(row)
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
        wrong_from=None if wrong is None else begin_of(wrong, tokens.step_ends, length),
        env_mask=env_mask,
        turn_ends=turn_ends,
    )


def mismatched(episode: Episode, other: Episode, longest: int) -> Episode:
    """The prompt of one with the completion of the other, cut where both would have more than `longest` tokens, and after its
    first action at the earliest."""
    room = max(longest - len(episode.prompt_ids), int(other.actions[0]) + 1)
    completion, env_mask, actions = first_tokens(other.completion_ids, other.env_mask, room)
    return replace(
        episode,
        completion_ids=completion,
        rewards=np.zeros(actions, dtype=np.float32),
        reward=0.0,
        label=False,
        terminated=True,
        source=f"{episode.source} with the completion of {other.source}",
        behavior_logprobs=None,
        step_ends=[],
        step_rewards=[],
        first_wrong_step=None,
        wrong_from=None,
        ref_logprobs=None,
        ref_lse=None,
        columns={},
        companion=None,
        env_mask=env_mask,
        turn_ends=[end for end in other.turn_ends if end < actions],
    )


def content_of(e: Episode) -> bytes:
    """Everything that training reads of the data of a response."""
    parts = [
        np.asarray([len(e.prompt_ids), len(e.completion_ids), e.terminated, e.label], np.int64).tobytes(),
        np.asarray(e.prompt_ids + e.completion_ids, np.int64).tobytes(),
        e.rewards.tobytes(),
    ]
    if e.behavior_logprobs is not None:
        parts.append(e.behavior_logprobs.tobytes())
    if e.env_mask is not None:
        parts.append(e.env_mask.tobytes() + np.asarray(e.turn_ends, np.int64).tobytes())
    return b"".join(parts)


def fingerprint(episodes: Iterable[Episode]) -> str:
    """sha256 of everything that training reads of the data; a resumed run must find the same."""
    return digest_of(map(content_of, episodes))


def digest_of(contents: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()
