"""Rows -> episodes: token ids, rewards on tokens, and whether the response ended.

Prompt and completion are tokenised apart and joined as ids, so that no token straddles the boundary; stored ids are used as
they are. A response that ended has exactly one EOS, which carries the outcome reward; step rewards sit on the last token of
their step.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field

import numpy as np

from dqo.errors import UserError
from dqo.option_values import FLOAT32_MAX
from dqo.rows import Row

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Episode:
    """One response. T is the number of completion tokens; per-token arrays are float32 (T,)."""

    prompt_ids: list[int]
    completion_ids: list[int]
    rewards: np.ndarray  # outcome reward on the last token, and what `process_reward` makes of the step rewards
    reward: float  # outcome reward as trained on
    label: bool
    terminated: bool  # False: cut by the length limit, and its last state is bootstrapped
    prompt_index: int  # episodes of one prompt share it
    source: str
    ended: bool = True  # False: cut by a length limit, whatever its last state is taken for
    behavior_logprobs: np.ndarray | None = None
    step_ends: list[int] = field(default_factory=list)  # index of the last token of each step
    step_rewards: list[float] = field(default_factory=list)
    ref_logprobs: np.ndarray | None = None
    ref_lse: np.ndarray | None = None
    companion: Episode | None = None  # another response to the same prompt, read without gradient

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def prompt_ids(tokenizer, rows: list[Row]) -> list[list[int]]:
    """Ids of every row's prompt: stored ids as they are, strings in one call, messages through the chat template."""
    strings = list({row.prompt: None for row in rows if row.prompt_ids is None and isinstance(row.prompt, str)})
    encoded = dict(zip(strings, tokenizer(strings)["input_ids"])) if strings else {}

    def of(row: Row) -> list[int]:
        if row.prompt_ids is not None:
            return list(row.prompt_ids)
        if isinstance(row.prompt, str):
            return list(encoded[row.prompt])
        if tokenizer.chat_template is None:
            raise UserError(
                f"{row.source}: prompt is a list of messages but the tokenizer has no chat_template; "
                "use string prompts or a tokenizer with a template"
            )
        return list(tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, return_dict=False))

    return [of(row) for row in rows]


def completion_text(row: Row) -> str:
    return row.completion if isinstance(row.completion, str) else row.completion[-1]["content"]


def _step_ends(row: Row, offsets: list[tuple[int, int]]) -> list[int]:
    """The last token that begins inside each step."""
    ends, token = [], 0
    for _, end in row.steps:
        while token < len(offsets) and offsets[token][0] < end:
            token += 1
        ends.append(token - 1)
    return ends


def _completions(tokenizer, rows: list[Row]) -> list[tuple[list[int], list[int]]]:
    """Token ids without EOS handling, and the last token of each step, of every row."""
    texts = [completion_text(row) for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=any(row.steps for row in rows))
    found = []
    for i, row in enumerate(rows):
        ids = list(encoded["input_ids"][i])
        ends = [] if row.steps is None else _step_ends(row, encoded["offset_mapping"][i])
        if row.completion_ids is not None:
            stored = list(row.completion_ids)
            if row.steps is not None and (stored[: len(ids)] != ids or len(stored) > len(ids) + 1):
                raise UserError(
                    f"{row.source}: steps are character spans, but completion_ids are not the tokenizer's own ids of the text, "
                    "so steps cannot be placed on tokens; drop steps and step_rewards, or drop completion_ids"
                )
            ids = stored
        found.append((ids, ends))
    return found


def _check_vocabulary(row: Row, ids: list[int], vocab_size: int) -> None:
    if max(ids) >= vocab_size:
        raise UserError(
            f"{row.source}: token id {max(ids)} >= vocabulary {vocab_size}: sampled with a different tokenizer?"
        )


def _warn_without_eos(rows: list[Row], eos_id: int) -> None:
    stored = [row.completion_ids for row in rows if row.completion_ids is not None and row.finish_reason == "stop"]
    if stored and not any(ids[-1] == eos_id for ids in stored):
        logger.warning(
            '0 of %d completions end in EOS (%d) although finish_reason is "stop"; it is added to each. Keep it in '
            "completion_ids, or sample with this tokenizer's EOS",
            len(stored),
            eos_id,
        )


@dataclass(slots=True)
class _Tokens:
    """A row on tokens, before rewards and cuts."""

    row: Row
    prompt: list[int]
    completion: list[int]
    step_ends: list[int]
    logprobs: list[float] | None
    ended: bool

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)


def _tokens(
    row: Row, prompt: list[int], ids: list[int], ends: list[int], eos_id: int, vocab_size: int, max_length: int
) -> _Tokens:
    ended = row.finish_reason != "length"
    if ended and (not ids or ids[-1] != eos_id):
        if row.logprobs is not None:
            raise UserError(
                f"{row.source}: completion_ids do not end in EOS ({eos_id}) although finish_reason is not 'length', and "
                "logprobs has no value for it; store the EOS and its log-probability, or set finish_reason"
            )
        ids = [*ids, eos_id]
    if not prompt:
        raise UserError(f"{row.source}: prompt has no tokens; the first action needs a state before it")
    if not ids:
        raise UserError(f"{row.source}: completion has no tokens")
    _check_vocabulary(row, prompt + ids, vocab_size)
    if len(prompt) >= max_length:
        raise UserError(
            f"{row.source}: prompt has {len(prompt)} tokens, max_length is {max_length}; raise --max_length or drop the row"
        )
    return _Tokens(row, prompt, ids, ends, row.logprobs, ended)


def _cut(tokens: _Tokens, max_length: int) -> _Tokens:
    """The first max_length tokens; steps go with their tokens, and the response has not ended."""
    room = max_length - len(tokens.prompt)
    logprobs = None if tokens.logprobs is None else tokens.logprobs[:room]
    ends = [end for end in tokens.step_ends if end < room]
    return _Tokens(tokens.row, tokens.prompt, tokens.completion[:room], ends, logprobs, ended=False)


@dataclass(frozen=True, slots=True)
class _Payment:
    """How tokens are paid; see `make_episodes`."""

    process_reward: str
    process_coef: float
    gamma: float
    truncation: str
    scale: float
    shift: float


def shaping(step_ends: list[int], potentials: list[float], length: int, gamma: float, terminated: bool) -> np.ndarray:
    """(length,) gamma * Phi(s_{t+1}) - Phi(s_t) of every token (Ng, Harada and Russell 1999), which moves no optimum.

    Phi(s_{t+1}), of the prefix that ends with token t, is the potential of the last step that has ended by then: it stays
    between the ends of steps, so that with gamma < 1 every token is paid. It is 0 for the prompt, and for a terminal state:
    another value there would reward the way of ending. `terminated` False: the last state goes on, and keeps its potential.
    """
    after = np.zeros(length)
    for end, potential in zip(step_ends, potentials):
        after[end:] = potential
    if terminated:
        after[-1] = 0.0
    before = np.concatenate([[0.0], after[:-1]])
    return gamma * after - before


def _episode(tokens: _Tokens, prompt_index: int, pay: _Payment) -> Episode:
    row = tokens.row
    bootstrapped = not tokens.ended and pay.truncation == "bootstrap"
    outcome = 0.0 if bootstrapped else pay.scale * row.reward + pay.shift
    step_rewards = list(row.step_rewards or [])[: len(tokens.step_ends)]
    ends = tokens.step_ends[: len(step_rewards)]
    length = len(tokens.completion)
    rewards = np.zeros(length)
    rewards[-1] = outcome
    if pay.process_reward == "additive":
        np.add.at(rewards, ends, pay.process_coef * np.asarray(step_rewards))
    elif pay.process_reward == "potential":
        rewards += pay.process_coef * shaping(ends, step_rewards, length, pay.gamma, not bootstrapped)
    beyond = np.flatnonzero(~(np.abs(rewards) <= FLOAT32_MAX))
    if len(beyond):
        raise UserError(
            f"{row.source}: the reward of token {beyond[0] + 1} is {rewards[beyond[0]]:.3g} with the factors of reward_scale, "
            f"reward_shift and process_coef; float32 holds at most {FLOAT32_MAX:.2g}: lower them, or drop the row"
        )
    return Episode(
        prompt_ids=tokens.prompt,
        completion_ids=tokens.completion,
        rewards=rewards.astype(np.float32),
        reward=pay.scale * row.reward + pay.shift,
        label=row.label,
        terminated=not bootstrapped,
        prompt_index=prompt_index,
        source=row.source,
        ended=tokens.ended,
        behavior_logprobs=None if tokens.logprobs is None else np.asarray(tokens.logprobs, dtype=np.float32),
        step_ends=tokens.step_ends,
        step_rewards=step_rewards,
    )


def make_episodes(
    rows: list[Row],
    tokenizer,
    *,
    vocab_size: int,
    max_length: int,
    process_reward: str = "none",
    process_coef: float = 1.0,
    gamma: float = 1.0,
    truncation: str = "terminal",
    allow_truncation: bool = False,
    reward_scale: float = 1.0,
    reward_shift: float = 0.0,
) -> list[Episode]:
    """Tokenises rows.

    Args:
        rows: validated rows. vocab_size: ids at or above it are refused.
        max_length: tokens of prompt and completion; longer completions are refused, or cut with `allow_truncation`.
        process_reward: "none"; "additive", step rewards are added on the last token of their step; or "potential", a step's
            reward is Phi of the prefix that ends with it, such as the share of its completions that are right, and the
            tokens are paid gamma * Phi(s_{t+1}) - Phi(s_t) on top: see `shaping`.
        process_coef: factor of the step rewards, or of Phi. gamma: the objective's discount.
        truncation: of responses that did not end, "terminal" (paid as they are), "bootstrap" (no outcome reward, V of the
            last state instead) or "drop".
        reward_scale, reward_shift: the outcome reward becomes scale * reward + shift.

    Raises:
        UserError: naming the row, for prompts or completions that cannot be placed on tokens.
    """
    tokenized = [
        _tokens(row, prompt, ids, ends, tokenizer.eos_token_id, vocab_size, max_length)
        for row, prompt, (ids, ends) in zip(rows, prompt_ids(tokenizer, rows), _completions(tokenizer, rows))
    ]
    _warn_without_eos(rows, tokenizer.eos_token_id)
    lengths = [tokens.length for tokens in tokenized]
    over = [tokens for tokens in tokenized if tokens.length > max_length]
    if over:
        share, p99 = len(over) / len(rows), int(np.percentile(lengths, 99))
        cut = f"{share:.1%} of rows exceed max_length={max_length} (p99 = {p99:,}; first: {over[0].row.source})"
        if not allow_truncation:
            raise UserError(f"{cut}. Raise --max_length, or pass --allow_truncation")
        logger.warning("%s and are cut there", cut)
        tokenized = [tokens if tokens.length <= max_length else _cut(tokens, max_length) for tokens in tokenized]
    kept = [tokens for tokens in tokenized if tokens.ended or truncation != "drop"]
    if len(kept) < len(tokenized):
        logger.warning("%d responses that did not end are dropped (truncation=drop)", len(tokenized) - len(kept))
    if not kept:
        raise UserError("no response is left to train on")
    pay = _Payment(process_reward, process_coef, gamma, truncation, reward_scale, reward_shift)
    indices: dict[str, int] = {}
    episodes = []
    for tokens in kept:
        index = indices.setdefault(json.dumps(tokens.prompt), len(indices))
        episodes.append(_episode(tokens, index, pay))
    return episodes


def fingerprint(episodes: list[Episode]) -> str:
    """sha256 of everything that training reads of the data; a resumed run must find the same."""
    digest = hashlib.sha256()
    for e in episodes:
        digest.update(np.asarray([len(e.prompt_ids), len(e.completion_ids), e.terminated, e.label], np.int64).tobytes())
        digest.update(np.asarray(e.prompt_ids + e.completion_ids, np.int64).tobytes())
        digest.update(e.rewards.tobytes())
        if e.behavior_logprobs is not None:
            digest.update(e.behavior_logprobs.tobytes())
    return digest.hexdigest()
