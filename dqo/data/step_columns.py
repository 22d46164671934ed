"""What the steps of all episodes say, as columns: of episodes in tables from the tables, without making one of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dqo.credit.steps import step_index
from dqo.data.episode import Episode, begin_of
from dqo.data.episodes import Episodes
from dqo.data.segments import gathered
from dqo.data.stored import column, process_rewards


def step_counts(episodes: Sequence[Episode]) -> np.ndarray:
    """int64 (n,): steps of each that came to their end."""
    if isinstance(episodes, Episodes):
        return episodes.patched(episodes.table.counts("step_ends")[episodes.entries], lambda e: len(e.step_ends))
    return np.array([len(e.step_ends) for e in episodes], np.int64)


def has_step_rewards(episodes: Sequence[Episode]) -> np.ndarray:
    """bool (n,): whether it has steps, and each of them a reward."""
    counts = step_counts(episodes)
    if isinstance(episodes, Episodes):
        return (counts > 0) & (column(episodes.rows, "paid")[episodes.places] >= counts)
    return (counts > 0) & (counts == np.array([len(e.step_rewards) for e in episodes], np.int64))


def steps(episodes: Sequence[Episode]) -> np.ndarray:
    """int64: `step_index` of every action, of all one behind the other. Each has steps."""
    if isinstance(episodes, Episodes):
        last = np.repeat(step_counts(episodes) - 1, episodes.action_counts)
        return np.minimum(_ended(episodes), last)
    return np.concatenate([step_index(e.step_ends, e.action_count) for e in episodes] or [np.zeros(0, np.int64)])


def potential(episodes: Sequence[Episode]) -> np.ndarray:
    """float64: that of the state before every action, of all one behind the other; NaN where the file tells none."""
    if not isinstance(episodes, Episodes):
        return np.concatenate([_potential(e) for e in episodes] or [np.zeros(0)])
    place = np.repeat(episodes.places, episodes.action_counts)
    counts = np.maximum(column(episodes.rows, "paid"), 0).astype(np.int64)
    begins, ended = counts.cumsum() - counts, np.minimum(_ended(episodes), counts[place])
    found, known = column(episodes.rows, "prompt_value")[place], ended > 0
    found[known] = process_rewards(episodes.rows)[(begins[place] + ended - 1)[known]]
    return found


def right_lengths(episodes: Sequence[Episode]) -> np.ndarray:
    """int64 (n,): `Episode.right_length` of each."""
    if not isinstance(episodes, Episodes):
        return np.array([e.right_length for e in episodes], np.int64)
    lengths = episodes.action_counts.astype(np.int64)
    found = np.where(episodes.label, lengths, 0)
    paid = np.maximum(column(episodes.rows, "paid"), 0).astype(np.int64)
    wrong = np.flatnonzero(episodes.pay.marks.wrong_steps(episodes.rows))
    of = np.repeat(np.arange(len(paid)), paid)[wrong]
    first = np.full(len(paid), -1)
    first[of[::-1]] = (wrong - (paid.cumsum() - paid)[of])[::-1]  # of a row's wrong steps the first is written last
    chosen = np.flatnonzero(first[episodes.places] >= 0)
    counts, entries = episodes.table.counts("step_ends"), episodes.entries[chosen]
    ends = gathered(episodes.table.segments.column("step_ends"), counts, entries)
    stops = counts[entries].cumsum()
    for i, step, begin, stop in zip(chosen, first[episodes.places[chosen]], stops - counts[entries], stops):
        found[i] = min(begin_of(int(step), ends[begin:stop].tolist(), int(lengths[i])), lengths[i])
    return found


def _ended(episodes: Episodes) -> np.ndarray:
    """int64: how many steps have ended before every action, of all one behind the other."""
    counts = episodes.table.counts("step_ends")
    of = np.repeat(np.arange(len(episodes)), counts[episodes.entries])
    after = gathered(episodes.table.segments.column("step_ends"), counts, episodes.entries) + 1
    lengths = episodes.action_counts.astype(np.int64)
    begins, inside = lengths.cumsum() - lengths, after < lengths[of]
    found = np.bincount((begins[of] + after)[inside], minlength=int(lengths.sum())).cumsum()
    return found - np.repeat(found[begins], lengths)


def _potential(e: Episode) -> np.ndarray:
    found = np.full(e.action_count, np.nan if e.prompt_value is None else e.prompt_value)
    for end, value in zip(e.step_ends, e.step_rewards):
        found[end + 1 :] = value
    return found
