"""Rows -> episodes: a sequence that makes each one when it is read, from the rows and from their tokens on the disk.

What is asked of all episodes is answered by columns. What training adds (columns, companions, log-probabilities of the reference
and of other frozen models) is kept beside the table, and is on an episode whenever it is read. What is set on an episode that was
read is lost with it.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np

from dqo.data.ends import ends_of
from dqo.data.episode import Episode, Payment, content_of, cut, mismatched, paid
from dqo.data.fields import FLOAT32_MAX
from dqo.data.marks import Marks
from dqo.data.rows import Row
from dqo.data.segments import gathered
from dqo.data.sources import BadRow
from dqo.data.stored import StoredRows, column, hashes, process_rewards, stored
from dqo.data.table import TokenTable, piece, response_bytes, token_table
from dqo.data.tokens import Tokens, refuse_rows, too_long
from dqo.errors import UserError

logger = logging.getLogger(__name__)


class Episodes(Sequence[Episode]):
    """n responses on tokens.

    Args:
        rows: those that the responses are of, and others. entries, places: int (n,) where each response is in the table, and
            where its row is among `rows`.
        prompt: int (n,) the prompt_index of each.
    """

    def __init__(
        self,
        table: TokenTable,
        rows: StoredRows,
        entries: np.ndarray,
        places: np.ndarray,
        pay: Payment,
        max_length: int,
        prompt: np.ndarray | None = None,
    ):
        self.table, self.rows, self.entries, self.places = table, rows, entries, places
        self.pay, self.max_length = pay, max_length
        self.prompt = _by_first(table.column("prompt")[entries]) if prompt is None else prompt
        self._columns: dict[str, np.ndarray] = {}  # that were added
        self._companions: np.ndarray | None = None  # indices in _whole
        self._whole, self._longest = self, 0
        # What frozen models say of responses, by keys, under the column that it makes; None: it is the reference's.
        self._said: dict[str | None, Mapping[bytes, Any]] = {}
        self._key_of: Callable[[Episode], bytes] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, i: int) -> Episode: ...
    @overload
    def __getitem__(self, i: slice) -> list[Episode]: ...
    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = int(i) % len(self)
        episode = self._bare(i)
        for name, values in self._columns.items():
            by_row = len(values) == len(self)
            begin = i if by_row else int(self._ends[i]) - episode.action_count
            own = values[begin : begin + 1].repeat(episode.action_count) if by_row else values[begin : self._ends[i]]
            episode.columns[name] = own
        if self._companions is not None and (other := int(self._companions[i])) >= 0:
            episode.companion = mismatched(episode, self._whole._bare(other), self._longest)
        if self._key_of is not None:
            for e in filter(None, (episode, episode.companion)):
                key = self._key_of(e)
                for column_of, said in self._said.items():
                    if (found := said.get(key)) is not None and column_of is None:
                        e.ref_logprobs, e.ref_lse = found.logprobs, found.lse
                    elif found is not None and column_of is not None and e is episode:
                        e.columns[column_of] = found.logprobs
        return episode

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def _tokens(self, i: int) -> Tokens:
        return self.table.tokens(int(self.entries[i]), self.rows[int(self.places[i])])

    def _bare(self, i: int) -> Episode:
        tokens = self._tokens(i)
        tokens = tokens if tokens.length <= self.max_length else cut(tokens, self.max_length)
        return paid(tokens, int(self.prompt[i]), self.pay)

    def take(self, indices: np.ndarray) -> Episodes:
        """Some of the episodes, with all that was added to them. `indices`: integers, or bool (n,)."""
        indices = np.flatnonzero(indices) if indices.dtype == bool else indices
        made = Episodes(
            self.table,
            self.rows,
            self.entries[indices],
            self.places[indices],
            self.pay,
            self.max_length,
            self.prompt[indices],
        )
        for name, values in self._columns.items():
            by_row = len(values) == len(self)
            made._columns[name] = values[indices] if by_row else gathered(values, self.action_counts, indices)
        made._said, made._key_of = self._said, self._key_of
        if self._companions is not None:
            made._companions, made._whole, made._longest = self._companions[indices], self._whole, self._longest
        return made

    def source(self, i: int) -> str:
        return self.rows[int(self.places[i])].source

    @property
    def reward(self) -> np.ndarray:
        """float64 (n,)."""
        return self.pay.scale * column(self.rows, "reward")[self.places] + self.pay.shift

    @property
    def label(self) -> np.ndarray:
        """bool (n,)."""
        return column(self.rows, "label")[self.places]

    @cached_property
    def _over(self) -> np.ndarray:
        """Indices of those that are cut."""
        return np.flatnonzero(self.table.column("length")[self.entries] > self.max_length)

    def patched(self, found: np.ndarray, value: Callable[[Episode], int]) -> np.ndarray:
        """(n,) numbers of whole responses, with `value` of what is left of those that are cut."""
        for i in self._over.tolist():
            found[i] = value(self._bare(i))
        return found

    @property
    def truncated(self) -> np.ndarray:
        """bool (n,)."""
        found = self.table.column("truncated")[self.entries]
        found[self._over] = True
        return found

    @property
    def terminated(self) -> np.ndarray:
        """bool (n,)."""
        return ~self.truncated if self.pay.truncation == "bootstrap" else np.ones(len(self), np.bool_)

    @property
    def prompt_length(self) -> np.ndarray:
        """int32 (n,)."""
        return self.table.column("prompt_length")[self.entries]

    @property
    def action_counts(self) -> np.ndarray:
        """int32 (n,)."""
        return self.patched(self.table.column("actions")[self.entries], lambda e: e.action_count)

    @property
    def lengths(self) -> np.ndarray:
        """int32 (n,) prompt and completion."""
        return self.patched(self.table.column("length")[self.entries], lambda e: e.length)

    @property
    def responses(self) -> np.ndarray:
        """uint64 (n,) hashes of prompt and completion."""
        whole = self.table.column("response")[self.entries]
        found = self.patched(whole, lambda e: int(hashes([response_bytes(e.completion_ids, e.env_mask)])[0]))
        return found ^ (self.prompt.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))

    @property
    def has_logprobs(self) -> np.ndarray:
        """bool (n,): whether those of the policy that wrote it are stored."""
        return self.table.counts("logprobs")[self.entries] > 0

    @property
    def has_steps(self) -> np.ndarray:
        """bool (n,): whether steps or turns of it may have rewards."""
        return column(self.rows, "paid")[self.places] > 0

    @cached_property
    def _ends(self) -> np.ndarray:
        """int64 (n,): where the actions of each end, of all one behind the other."""
        return self.action_counts.cumsum(dtype=np.int64)

    @cached_property
    def _outcomes_alone(self) -> np.ndarray:
        """bool (n,): whether nothing but the outcome is paid."""
        if self.pay.process_reward == "none":
            return np.ones(len(self), np.bool_)
        found = ~self.has_steps
        if self.pay.process_reward == "potential":
            values = column(self.rows, "prompt_value")[self.places]
            found &= np.isnan(values) | (values == 0)
        return found

    @property
    def _outcomes(self) -> np.ndarray:
        return np.where(self.terminated, self.reward, 0.0)

    def totals(self) -> np.ndarray:
        """float32 (n,): the sum of each one's rewards."""
        found = self._outcomes.astype(np.float32)
        for i in np.flatnonzero(~self._outcomes_alone).tolist():
            found[i] = self._bare(i).rewards.sum()
        return found

    def check_pay(self) -> None:
        """Refuses rewards that float32 does not hold, naming the first row."""
        outcomes, steps = self._outcomes, 0.0
        if self.pay.process_reward != "none":  # no token is paid more than this, whatever lies between
            counts = np.maximum(column(self.rows, "paid"), 0)
            row_of = np.repeat(np.arange(len(counts)), counts)
            largest = np.zeros(len(counts))
            np.add.at(largest, row_of, np.abs(process_rewards(self.rows)))
            largest += np.abs(np.nan_to_num(column(self.rows, "prompt_value")))
            steps = 2 * abs(self.pay.process_coef) * largest[self.places]
        for i in np.flatnonzero(~(np.abs(outcomes) + steps <= FLOAT32_MAX)).tolist():
            self._bare(i)

    def add_columns(self, columns: dict[str, np.ndarray]) -> None:
        """Numbers for the objective: (n,), or one for each action, of all one behind the other."""
        self._columns |= {name: np.asarray(values, dtype=np.float32) for name, values in columns.items()}

    def add_companions(self, companions: np.ndarray) -> None:
        """int (n,): whose completion is put behind each one's prompt; -1: none."""
        self._companions, self._longest = companions, int(self.lengths.max(initial=0))

    def set_said(
        self, entries: Mapping[bytes, Any], key_of: Callable[[Episode], bytes], column: str | None = None
    ) -> None:
        """What a frozen model says of responses, by their keys: an entry has logprobs and lse, float32 (T,). Those that have none
        stay without. `column`: its log-probabilities are this one; None: it is the reference."""
        self._said, self._key_of = self._said | {column: entries}, key_of

    def take_said(self, other: Sequence[Episode]) -> None:
        """That of some of these episodes, or of all."""
        if isinstance(other, Episodes):
            self._said, self._key_of = other._said, other._key_of

    @property
    def bare(self) -> bool:
        """Whether an objective added nothing."""
        return not self._columns and self._companions is None

    def contents(self, indices: Iterable[int]) -> Iterator[bytes]:
        """What `fingerprint` reads of each."""
        label, terminated, outcomes = self.label, self.terminated, self._outcomes.astype(np.float32)
        plain = self._outcomes_alone & (self.table.column("length")[self.entries] <= self.max_length)
        zeros = np.zeros(2**16, np.float32).tobytes()
        for i in indices:
            arrays, place = self.table.place(int(self.entries[i]))
            ids, prompt = piece(arrays, "ids", place), int(arrays["prompt_length"][place])
            count = len(ids) - prompt
            other = len(piece(arrays, "logprobs", place)) or len(piece(arrays, "mask", place))
            if not plain[i] or other or count > 2**16:
                yield content_of(self._bare(i))
                continue
            told = np.array([prompt, count, terminated[i], label[i]], np.int64).tobytes()
            yield told + ids.astype(np.int64).tobytes() + zeros[: 4 * (count - 1)] + outcomes[i].tobytes()


def totals(episodes: Sequence[Episode]) -> list[float]:
    """The sum of each one's rewards."""
    if isinstance(episodes, Episodes):
        return episodes.totals().tolist()
    return [float(e.rewards.sum()) for e in episodes]


def ended(episodes: Sequence[Episode]) -> Sequence[Episode]:
    """Those whose last state is worth nothing; all of them where none is such."""
    if isinstance(episodes, Episodes):
        found = episodes.terminated
        return episodes.take(found) if found.any() and not found.all() else episodes
    return [e for e in episodes if e.terminated] or episodes


def put_columns(episodes: Sequence[Episode], columns: dict[str, np.ndarray]) -> None:
    """Numbers for the objective, float32: (n,), or one for each action, of all one behind the other."""
    if isinstance(episodes, Episodes):
        episodes.add_columns(columns)
        return
    counts = np.array([e.action_count for e in episodes], np.int64)
    for name, given in columns.items():
        values = np.asarray(given, dtype=np.float32)
        on_tokens = values if len(values) != len(episodes) else np.repeat(values, counts)
        for e, own in zip(episodes, np.split(on_tokens, counts.cumsum()[:-1])):
            e.columns[name] = own


def _by_first(key: np.ndarray) -> np.ndarray:
    """int32 (n,): equal keys share a number, which counts from 0 in the order of the first of each."""
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first), dtype=np.int32)
    return rank[inverse]


def open_episodes(
    rows: Sequence[Row],
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
    table: TokenTable | None = None,
) -> Episodes:
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
        table: the rows on tokens, where they are known already.

    Raises:
        UserError: naming the row, for prompts or completions that cannot be placed on tokens.
    """
    rows = stored(rows)
    ends = ends_of(tokenizer, stop_ids, messages=not isinstance(rows[0].prompt, str))
    if table is None:
        table = token_table(rows, tokenizer, ends, vocab_size, template_time)
    index = np.arange(rows.total) if rows.chosen is None else rows.chosen
    place_of = np.full(rows.total, -1, np.int32)
    place_of[index] = np.arange(len(rows), dtype=np.int32)
    places = place_of[table.column("row")]
    entries = np.flatnonzero(places >= 0).astype(np.int32)
    entries = entries[np.argsort(places[entries], kind="stable")]
    prompts, first = table.column("prompt_length")[entries], table.column("first_action")[entries]
    problems, fits = table.problems(place_of, rows), prompts + first.astype(np.int64) < max_length
    for entry in entries[~fits].tolist():
        row = rows[int(places[entry])]
        problems.append(BadRow(int(places[entry]), row.source, too_long(table.tokens(entry, row), max_length) or ""))
    entries = entries[fits]
    refuse_rows(problems, len(rows), len(entries), skip_bad_rows)
    table.say_remarks(place_of)
    lengths = table.column("length")[entries]
    over = lengths > max_length
    if over.any():
        share, p99 = over.mean(), int(np.percentile(lengths, 99))
        source = rows[int(places[entries[over][0]])].source
        said = f"{share:.1%} of rows exceed max_length={max_length} (p99 = {p99:,}; first: {source})"
        if not allow_truncation:
            raise UserError(f"{said}. Raise --max_length, or pass --allow_truncation")
        logger.warning("%s and are cut there", said)
    if truncation == "drop":
        whole = ~(over | table.column("truncated")[entries])
        if not whole.all():
            logger.warning("%d responses that did not end are dropped (truncation=drop)", int((~whole).sum()))
        entries = entries[whole]
    if not len(entries):
        raise UserError("no response is left to train on")
    marks = marks or Marks.of_rows(rows, process_reward)
    pay = Payment(process_reward, process_coef, gamma, discount, truncation, reward_scale, reward_shift, marks)
    made = Episodes(table, rows, entries, places[entries], pay, max_length)
    made.check_pay()
    return made


def make_episodes(rows: Sequence[Row], tokenizer, **options: Any) -> list[Episode]:
    """The episodes of few rows as a list; see `open_episodes`."""
    return list(open_episodes(rows, tokenizer, **options))
