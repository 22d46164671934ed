"""Episodes as the columns that an objective reads, and its answer as groups of episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from dqo.data import step_columns
from dqo.data.batches import COLUMNS, Group
from dqo.data.episode import Episode, digest_of, fingerprint, mismatched
from dqo.data.episodes import Episodes, put_columns
from dqo.errors import UserError
from dqo.objectives.base import Columns, Objective, Selection


class EpisodeColumns:
    """The columns (objectives.base.Columns) of n episodes; each is made when it is read.

    Args:
        reference_samples: the sources of samples of the reference; None: none is known.
    """

    def __init__(self, episodes: Sequence[Episode], reference_samples: Callable[[], Collection[str]] | None = None):
        self._episodes, self._reference_samples = episodes, reference_samples

    def _of(self, name: str, attribute: str, dtype: type) -> np.ndarray:
        """`name`: that of Episodes, `attribute`: that of an Episode."""
        if isinstance(self._episodes, Episodes):
            return getattr(self._episodes, name).astype(dtype, copy=False)
        return np.array([getattr(e, attribute) for e in self._episodes], dtype=dtype)

    @cached_property
    def prompt(self) -> np.ndarray:
        return self._of("prompt", "prompt_index", np.int64)

    @cached_property
    def reward(self) -> np.ndarray:
        return self._of("reward", "reward", np.float64)

    @cached_property
    def label(self) -> np.ndarray:
        return self._of("label", "label", bool)

    @cached_property
    def truncated(self) -> np.ndarray:
        return self._of("truncated", "truncated", bool)

    @cached_property
    def has_logprobs(self) -> np.ndarray:
        if isinstance(self._episodes, Episodes):
            return self._episodes.has_logprobs
        return np.array([e.behavior_logprobs is not None for e in self._episodes], dtype=bool)

    @cached_property
    def has_step_rewards(self) -> np.ndarray:
        return step_columns.has_step_rewards(self._episodes)

    @cached_property
    def potential(self) -> np.ndarray:
        return step_columns.potential(self._episodes)

    @cached_property
    def right_length(self) -> np.ndarray:
        return step_columns.right_lengths(self._episodes)

    @cached_property
    def prompt_length(self) -> np.ndarray:
        return self._of("prompt_length", "prompt_count", np.int64)

    @cached_property
    def length(self) -> np.ndarray:
        return self._of("action_counts", "action_count", np.int64)

    @property
    def tokens(self) -> np.ndarray:
        """int64: of prompt and response, the environment's too."""
        return self._of("lengths", "length", np.int64)

    @cached_property
    def of_reference(self) -> np.ndarray:
        known = self._reference_samples() if self._reference_samples is not None else ()
        return np.array([source in known for source in self.source], dtype=bool)

    @cached_property
    def same_as(self) -> np.ndarray:
        if isinstance(self._episodes, Episodes):
            _, first, same = np.unique(self._episodes.responses, return_index=True, return_inverse=True)
            return first[same].astype(np.int64)
        seen: dict[tuple, int] = {}
        keys = ((e.prompt_index, tuple(e.completion_ids), _holes(e)) for e in self._episodes)
        return np.array([seen.setdefault(key, i) for i, key in enumerate(keys)], dtype=np.int64)

    @property
    def source(self) -> Sequence[str]:
        return _Sources(self._episodes)


class _Sources(Sequence[str]):
    def __init__(self, episodes: Sequence[Episode]):
        self._episodes = episodes

    def __len__(self) -> int:
        return len(self._episodes)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self._episodes.source(i) if isinstance(self._episodes, Episodes) else self._episodes[i].source


class Groups(Sequence[Group]):
    """Groups of episodes that are made when they are read. `rows`: the indices of each group's."""

    def __init__(self, episodes: Episodes, rows: np.ndarray | Sequence[np.ndarray]):
        self.episodes, self.rows = episodes, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return [self.episodes[int(row)] for row in np.asarray(self.rows[i])]

    def take(self, indices: np.ndarray) -> Groups:
        chosen = self.rows[indices] if isinstance(self.rows, np.ndarray) else [self.rows[i] for i in indices.tolist()]
        return Groups(self.episodes, chosen)

    def flat(self) -> np.ndarray:
        """Indices of the episodes of all groups, one group behind the other."""
        if isinstance(self.rows, np.ndarray):
            return self.rows.reshape(-1)
        return np.concatenate([np.asarray(group) for group in self.rows]) if len(self.rows) else np.zeros(0, np.int64)

    def distinct(self) -> Episodes:
        """The episodes of all groups, each once, in the order of the groups; the groups' own where those are no others."""
        order = self._order()
        return self.episodes if np.array_equal(order, np.arange(len(self.episodes))) else self.episodes.take(order)

    def alone(self) -> Groups:
        """The same groups of their distinct episodes alone: what is added to `distinct` of them is on what is read of them."""
        own = self.distinct()
        if own is self.episodes:
            return self
        index = np.full(len(self.episodes), -1, np.int64)
        index[self._order()] = np.arange(len(own))
        if isinstance(self.rows, np.ndarray):
            return Groups(own, index[self.rows])
        return Groups(own, [index[np.asarray(group)] for group in self.rows])

    def _order(self) -> np.ndarray:
        flat = self.flat()
        if (flat[1:] > flat[:-1]).all():  # each alone: nothing is sorted, which takes 40 bytes a row
            return flat
        _, first = np.unique(flat, return_index=True)
        return flat[np.sort(first)]


def selected(
    objective: Objective,
    episodes: Sequence[Episode],
    reference_samples: Callable[[], Collection[str]] | None = None,
) -> Sequence[Group]:
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
    put_columns(episodes, selection.columns)
    if isinstance(episodes, Episodes):
        if selection.companions is not None:
            episodes.add_companions(np.asarray(selection.companions))
        groups = Groups(episodes, selection.groups)
        return groups.alone() if len(groups) else groups
    if selection.companions is not None:
        longest = max((e.length for e in episodes), default=0)
        for e, companion in zip(episodes, np.asarray(selection.companions).tolist()):
            e.companion = None if companion < 0 else mismatched(e, episodes[companion], longest)
    return [[episodes[row] for row in np.asarray(group).tolist()] for group in selection.groups]


def _set_steps(objective: Objective, episodes: Sequence[Episode]) -> None:
    """The column step."""
    without = np.flatnonzero(step_columns.step_counts(episodes) == 0)
    if len(without):
        raise UserError(
            f"{type(objective).__name__} takes steps for actions, and {len(episodes) - len(without):,} of {len(episodes):,} "
            f"responses have steps (the first without: {episodes[int(without[0])].source}); `dqo score FILE --steps lines "
            "--output_file NEW` cuts them into steps"
        )
    put_columns(episodes, {"step": step_columns.steps(episodes)})


def nothing_selected(objective: Objective, episodes: Sequence[Episode]) -> str:
    """What to say when an objective finds no group: what it misses, what is there, and what makes more of it."""
    columns = EpisodeColumns(episodes)
    _, sizes = np.unique(columns.prompt, return_counts=True)
    if objective.reads_steps and columns.has_step_rewards.any():
        return (
            f"{objective.nothing_left}, and none has a right step before its first wrong one: of {len(episodes):,} responses "
            f"{int(columns.has_step_rewards.sum()):,} have labels of steps; are these turned over?"
        )
    if objective.reads_rewards == "labels" and not columns.label.any() and len(np.unique(columns.reward)) > 1:
        return (
            f"{objective.nothing_left}. None of {len(episodes):,} responses counts as correct, and their rewards are from "
            f"{columns.reward.min():.3g} to {columns.reward.max():.3g}: a response is correct above --reward_threshold"
        )
    return (
        f"{objective.nothing_left}. There are {len(episodes):,} responses, {int(columns.label.sum()):,} of them correct, to "
        f"{len(sizes):,} prompts, {int((sizes > 1).sum()):,} of them with several; `dqo sample --num_generations 8` gives each "
        "prompt more, which `dqo score` grades"
    )


def called(objective: Objective) -> str:
    """The name of its groups."""
    return {1: "responses", 2: "pairs", None: "lists"}.get(objective.group_size, "groups")


def data_fingerprint(groups: Sequence[Group]) -> str:
    """`episodes.fingerprint` of all groups."""
    if isinstance(groups, Groups):
        flat = groups.flat()  # a list of all would take 40 bytes a row
        some = (flat[begin : begin + 2**16].tolist() for begin in range(0, len(flat), 2**16))
        return digest_of(groups.episodes.contents(chain.from_iterable(some)))
    return fingerprint(chain(*groups))


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


def selection_fingerprint(groups: Sequence[Group]) -> str:
    """sha256 of what the objective made of the data: the sizes of its groups, its columns and its companions. The responses
    themselves, in the order of the groups, are in `episodes.fingerprint`."""
    digest = hashlib.sha256()
    if isinstance(groups, Groups) and groups.episodes.bare:
        digest.update(np.array([len(group) for group in groups.rows], np.int64).tobytes())
        return digest.hexdigest()
    for group in groups:
        digest.update(np.int64(len(group)).tobytes())
        for e in group:
            for name, values in sorted(e.columns.items()):
                digest.update(name.encode() + values.tobytes())
            if e.companion is not None:
                digest.update(np.asarray(e.companion.completion_ids, np.int64).tobytes() + _holes(e.companion))
    return digest.hexdigest()
