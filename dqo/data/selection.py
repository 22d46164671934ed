"""Episodes as the columns that an objective reads, and its answer as groups of episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from dqo.credit.steps import step_index
from dqo.data.batches import COLUMNS, Group
from dqo.data.episodes import Episode, first_tokens
from dqo.errors import UserError
from dqo.objectives.base import Columns, Objective, Selection


class EpisodeColumns:
    """The columns (objectives.base.Columns) of n episodes; each is made when it is read.

    Args:
        reference_samples: the sources of samples of the reference; None: none is known.
    """

    def __init__(self, episodes: Sequence[Episode], reference_samples: Callable[[], Collection[str]] | None = None):
        self._episodes, self._reference_samples = episodes, reference_samples

    def _of(self, name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(e, name) for e in self._episodes], dtype=dtype)

    @cached_property
    def prompt(self) -> np.ndarray:
        return self._of("prompt_index", np.int64)

    @cached_property
    def reward(self) -> np.ndarray:
        return self._of("reward", np.float64)

    @cached_property
    def label(self) -> np.ndarray:
        return self._of("label", bool)

    @cached_property
    def truncated(self) -> np.ndarray:
        return self._of("truncated", bool)

    @cached_property
    def has_logprobs(self) -> np.ndarray:
        return np.array([e.behavior_logprobs is not None for e in self._episodes], dtype=bool)

    @cached_property
    def has_step_rewards(self) -> np.ndarray:
        return np.array([0 < len(e.step_ends) == len(e.step_rewards) for e in self._episodes], dtype=bool)

    @cached_property
    def potential(self) -> np.ndarray:
        return np.concatenate([_potential(e) for e in self._episodes] or [np.zeros(0)])

    @cached_property
    def prompt_length(self) -> np.ndarray:
        return np.array([len(e.prompt_ids) for e in self._episodes], dtype=np.int64)

    @cached_property
    def length(self) -> np.ndarray:
        return np.array([e.action_count for e in self._episodes], dtype=np.int64)

    @cached_property
    def of_reference(self) -> np.ndarray:
        known = self._reference_samples() if self._reference_samples is not None else ()
        return np.array([e.source in known for e in self._episodes], dtype=bool)

    @cached_property
    def same_as(self) -> np.ndarray:
        first: dict[tuple, int] = {}
        keys = ((e.prompt_index, tuple(e.completion_ids), _holes(e)) for e in self._episodes)
        return np.array([first.setdefault(key, i) for i, key in enumerate(keys)], dtype=np.int64)

    @property
    def source(self) -> Sequence[str]:
        return [e.source for e in self._episodes]


def selected(
    objective: Objective, episodes: list[Episode], reference_samples: Callable[[], Collection[str]] | None = None
) -> list[Group]:
    """The groups that the objective trains on. Its further columns, and its companions, are set on the episodes.

    Args:
        reference_samples: asked only where the objective reads the column of_reference, for the sources that have it; None:
            none is known.

    Raises:
        UserError: for data that the objective refuses, and for an answer that does not fit them.
    """
    columns = EpisodeColumns(episodes, reference_samples)
    if objective.needs_steps:
        _set_steps(objective, episodes)
    selection = objective.prepare(columns)
    for problem in _problems(selection, objective, columns):
        raise UserError(f"{type(objective).__name__}.prepare gives {problem}")
    _set_columns(selection, episodes, columns.length)
    if selection.companions is not None:
        longest = max((e.length for e in episodes), default=0)
        for e, companion in zip(episodes, np.asarray(selection.companions).tolist()):
            e.companion = None if companion < 0 else mismatched(e, episodes[companion], longest)
    return [[episodes[row] for row in np.asarray(group).tolist()] for group in selection.groups]


def _potential(e: Episode) -> np.ndarray:
    """(T,) of the state before each token; NaN where the file tells none."""
    found = np.full(e.action_count, np.nan if e.prompt_value is None else e.prompt_value)
    for end, value in zip(e.step_ends, e.step_rewards):
        found[end + 1 :] = value
    return found


def _set_steps(objective: Objective, episodes: list[Episode]) -> None:
    """The column step."""
    without = [e for e in episodes if not e.step_ends]
    if without:
        raise UserError(
            f"{type(objective).__name__} takes steps for actions, and {len(episodes) - len(without):,} of {len(episodes):,} "
            f"responses have steps (the first without: {without[0].source}); `dqo score FILE --steps lines --output_file NEW` "
            "cuts them into steps"
        )
    for e in episodes:
        e.columns["step"] = step_index(e.step_ends, e.action_count)


def nothing_selected(objective: Objective, episodes: Sequence[Episode]) -> str:
    """What to say when an objective finds no group: what it misses, what is there, and what makes more of it."""
    columns = EpisodeColumns(episodes)
    _, sizes = np.unique(columns.prompt, return_counts=True)
    return (
        f"{objective.nothing_left}. There are {len(episodes):,} responses, {int(columns.label.sum()):,} of them correct, to "
        f"{len(sizes):,} prompts, {int((sizes > 1).sum()):,} of them with several; `dqo sample --num_generations 8` gives each "
        "prompt more, which `dqo score` grades"
    )


def _holes(episode: Episode) -> bytes:
    """Which tokens of the completion are the environment's; equal ids may differ in it."""
    return b"" if episode.env_mask is None else episode.env_mask.tobytes()


def _array(values: Any, kinds: str) -> np.ndarray | str:
    """As an array, where its dtype is of numpy's `kinds` or it is empty; of all else what it is: numpy would make indices 0 and 1
    of a mask, and cut fractions."""
    try:
        found = np.asarray(values)
    except ValueError:
        return "lists of unlike lengths"
    return found if found.dtype.kind in kinds or not found.size else f"dtype {found.dtype}"


def _problems(selection: Any, objective: Objective, columns: Columns) -> Iterator[str]:
    """What is wrong with an objective's answer; whoever goes on after the first may meet an exception."""
    if not isinstance(selection, Selection):
        yield f"{type(selection).__name__}; expected a Selection (dqo.objectives.base)"
    for name, of_type, its_type in (("groups", Sequence | np.ndarray, "a sequence"), ("columns", dict, "a dict")):
        if not isinstance(getattr(selection, name), of_type):
            yield f"{name} of type {type(getattr(selection, name)).__name__}; expected {its_type}"
    n, size = len(columns.length), objective.group_size
    expected = "one response or more" if size is None else str(size)
    for group in selection.groups:
        found = _array(group, "iu")
        if isinstance(found, str):
            yield f"a group of {found}; expected whole numbers, the indices of {expected}"
            continue
        if found.ndim != 1 or not len(found) or size not in (None, len(found)):
            yield f"a group of shape {found.shape}; expected the indices of {expected}"
        if found.min() < 0 or found.max() >= n:
            yield f"an index that is none of the {n} responses"
    for name, values in selection.columns.items():
        if not isinstance(name, str) or name in COLUMNS:
            yield (
                f"a column {name}, which is there already; name it otherwise"
                if name in COLUMNS
                else (f"a column {name!r}; expected a string for its name")
            )
        yield from _column_problems(name, values, columns)
    if selection.companions is None:
        return
    found = _array(selection.companions, "iu")
    what = found if isinstance(found, str) else f"shape {found.shape}"
    if isinstance(found, str) or found.shape != (n,) or (n and not -1 <= found.min() <= found.max() < n):
        yield f"companions of {what}; expected an index, or -1, for each of the {n} responses"
    if type(objective).companion_sums is Objective.companion_sums:
        yield "companions, and has no companion_sums, which reads them"


def _column_problems(name: str, values: Any, columns: Columns) -> Iterator[str]:
    n, tokens = len(columns.length), int(columns.length.sum())
    found = _array(values, "biuf")
    if isinstance(found, str) or found.shape not in ((n,), (tokens,)):
        what = found if isinstance(found, str) else f"shape {found.shape}"
        yield (
            f"a column {name} of {what}; expected one number for each of the {n} responses, or for each of their {tokens} tokens"
        )
        return
    bounds = np.float64(2**24 if found.dtype.kind in "iu" else np.finfo(np.float32).max)
    wrong = np.flatnonzero(~(np.abs(found.astype(np.float64)) <= bounds))
    if len(wrong):
        of = np.arange(n) if len(found) == n else np.repeat(np.arange(n), columns.length)
        yield (
            f"a column {name} with {found[wrong[0]]} for {columns.source[of[wrong[0]]]}; expected numbers that float32 holds, "
            f"of size {bounds:g} at most"
        )


def _set_columns(selection: Selection, episodes: list[Episode], length: np.ndarray) -> None:
    for name, values in selection.columns.items():
        values = np.asarray(values, dtype=np.float32)
        on_tokens = values if len(values) != len(episodes) else np.repeat(values, length)
        for e, piece in zip(episodes, np.split(on_tokens, length.cumsum()[:-1])):
            e.columns[name] = piece


def selection_fingerprint(groups: list[Group]) -> str:
    """sha256 of what the objective made of the data: the sizes of its groups, its columns and its companions. The responses
    themselves, in the order of the groups, are in `episodes.fingerprint`."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(np.int64(len(group)).tobytes())
        for e in group:
            for name, values in sorted(e.columns.items()):
                digest.update(name.encode() + values.tobytes())
            if e.companion is not None:
                digest.update(np.asarray(e.companion.completion_ids, np.int64).tobytes() + _holes(e.companion))
    return digest.hexdigest()


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
        ref_logprobs=None,
        ref_lse=None,
        columns={},
        companion=None,
        env_mask=env_mask,
        turn_ends=[end for end in other.turn_ends if end < actions],
    )
