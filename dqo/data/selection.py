"""Episodes as the columns that an objective reads, and its answer as groups of episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from dqo.data.batches import COLUMNS, Group
from dqo.data.episodes import Episode
from dqo.errors import UserError
from dqo.objectives.base import Objective, Selection


class EpisodeColumns:
    """The columns (objectives.base.Columns) of n episodes; each is made when it is read."""

    def __init__(self, episodes: Sequence[Episode]):
        self._episodes = episodes

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
    def prompt_length(self) -> np.ndarray:
        return np.array([len(e.prompt_ids) for e in self._episodes], dtype=np.int64)

    @cached_property
    def length(self) -> np.ndarray:
        return np.array([len(e.completion_ids) for e in self._episodes], dtype=np.int64)

    @cached_property
    def same_as(self) -> np.ndarray:
        first: dict[tuple, int] = {}
        keys = ((e.prompt_index, tuple(e.completion_ids)) for e in self._episodes)
        return np.array([first.setdefault(key, i) for i, key in enumerate(keys)], dtype=np.int64)

    @property
    def source(self) -> Sequence[str]:
        return [e.source for e in self._episodes]


def selected(objective: Objective, episodes: list[Episode]) -> list[Group]:
    """The groups that the objective trains on. Its further columns, and its companions, are set on the episodes.

    Raises:
        UserError: for data that the objective refuses, and for an answer that does not fit them.
    """
    columns = EpisodeColumns(episodes)
    selection = objective.prepare(columns)
    groups = [np.asarray(group, dtype=np.int64) for group in selection.groups]
    for problem in _problems(selection, groups, objective, columns.length):
        raise UserError(f"{type(objective).__name__}.prepare gives {problem}")
    _set_columns(selection, episodes, columns.length)
    if selection.companions is not None:
        longest = max((e.length for e in episodes), default=0)
        for e, companion in zip(episodes, selection.companions.tolist()):
            e.companion = None if companion < 0 else mismatched(e, episodes[companion], longest)
    return [[episodes[row] for row in group.tolist()] for group in groups]


def _problems(selection: Selection, groups: list[np.ndarray], objective: Objective, length: np.ndarray):
    n, size = len(length), objective.group_size
    wrong = next(
        (group for group in groups if group.ndim != 1 or not len(group) or size not in (None, len(group))), None
    )
    if wrong is not None:
        expected = "one response or more" if size is None else str(size)
        yield f"a group of shape {wrong.shape}; expected the indices of {expected}"
    if groups and not all(group.min() >= 0 and group.max() < n for group in groups if group.size):
        yield f"an index that is none of the {n} responses"
    for name, values in selection.columns.items():
        if name in COLUMNS:
            yield f"a column {name}, which is there already; name it otherwise"
        if np.shape(values) not in ((n,), (int(length.sum()),)):
            yield (
                f"a column {name} of shape {np.shape(values)}; expected one number for each of the {n} responses, or for each "
                f"of their {int(length.sum())} tokens"
            )
    if selection.companions is not None and (
        np.shape(selection.companions) != (n,)
        or (n and not -1 <= selection.companions.min() <= selection.companions.max() < n)
    ):
        yield f"companions of shape {np.shape(selection.companions)}; expected an index, or -1, for each of the {n} responses"


def _set_columns(selection: Selection, episodes: list[Episode], length: np.ndarray) -> None:
    for name, values in selection.columns.items():
        values = np.asarray(values, dtype=np.float32)
        on_tokens = values if len(values) != len(episodes) else np.repeat(values, length)
        for e, piece in zip(episodes, np.split(on_tokens, length.cumsum()[:-1])):
            e.columns[name] = piece


def mismatched(episode: Episode, other: Episode, longest: int) -> Episode:
    """The prompt of one with the completion of the other, cut where both would have more than `longest` tokens."""
    completion = other.completion_ids[: longest - len(episode.prompt_ids)]
    return replace(
        episode,
        completion_ids=completion,
        rewards=np.zeros(len(completion), dtype=np.float32),
        reward=0.0,
        label=False,
        terminated=True,
        source=f"{episode.source} with the completion of {other.source}",
        behavior_logprobs=None,
        step_ends=[],
        step_rewards=[],
        ref_logprobs=None,
        ref_lse=None,
        columns={},
        companion=None,
    )
