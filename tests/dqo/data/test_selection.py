"""Episodes as columns, and groups, columns and companions of an objective's answer back on the episodes."""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from dqo.data.batches import collate
from dqo.data.selection import EpisodeColumns, nothing_selected, selected
from dqo.errors import UserError
from dqo.objectives.base import Columns, Objective, Selection
from dqo.objectives.groups import by_prompt, pairs
from dqo.objectives.rebel import REBEL
from dqo.objectives.rft import RFT
from tests.dqo.helpers import episodes


@dataclass(frozen=True)
class Answering(Objective):
    """Gives the selection that it holds."""

    group_size: ClassVar[int | None] = None
    selection: Selection | None = None

    def prepare(self, columns):
        return self.selection

    def companion_sums(self, stats, rows, cu_seqlens):
        return torch.zeros(2)


def answer(members, groups, **others):
    return selected(Answering(Selection(groups, **others)), members)


def test_the_columns_are_what_the_episodes_say():
    members = episodes(6)
    members[4].completion_ids, members[4].prompt_index = members[1].completion_ids, members[1].prompt_index
    members[5].truncated = True
    columns = EpisodeColumns(members)
    assert columns.prompt.tolist() == [e.prompt_index for e in members]
    assert columns.reward.dtype == np.float64 and columns.reward.tolist() == [e.reward for e in members]
    assert columns.label.tolist() == [e.label for e in members]
    assert columns.truncated.tolist() == [False] * 5 + [True]
    assert (columns.prompt_length + columns.length).tolist() == [e.length for e in members]
    assert columns.same_as.tolist() == [0, 1, 2, 3, 1, 5]
    assert list(columns.source) == [e.source for e in members]
    assert not columns.of_reference.any()
    known = EpisodeColumns(members, lambda: {members[2].source})
    assert known.of_reference.tolist() == [i == 2 for i in range(6)]
    names = [name for name, value in vars(Columns).items() if isinstance(value, property)]
    assert len(columns.potential) == columns.length.sum() and np.isnan(columns.potential).all()
    assert all(len(getattr(columns, name)) == 6 for name in names if name != "potential") and len(names) == 13
    assert not columns.has_logprobs.any() and not columns.has_step_rewards.any()


def test_an_array_of_indices_and_lists_of_any_lengths_are_groups():
    members = episodes(5)
    assert answer(members, np.array([[3, 1], [1, 0]])) == [[members[3], members[1]], [members[1], members[0]]]
    ragged = [np.array([4, 0, 2]), np.array([1])]
    assert answer(members, ragged) == [[members[4], members[0], members[2]], [members[1]]]
    assert answer(members, np.zeros((0, 2), np.int64)) == []


def test_columns_of_responses_and_of_tokens_reach_the_batch():
    members = episodes(5)
    lengths = [len(e.completion_ids) for e in members]
    per_response, per_token = np.arange(5) + 0.5, np.arange(sum(lengths))
    groups = answer(members, [np.array([4, 1]), np.array([2])], columns={"rank": per_response, "advantage": per_token})
    chosen = [e for group in groups for e in group]
    batch = collate(chosen, 0, sizes=[2, 1])
    expected = np.repeat(per_response[[4, 1, 2]], [lengths[i] for i in (4, 1, 2)])
    assert batch.columns["rank"].dtype == torch.float32 and batch.columns["rank"].tolist() == expected.tolist()
    pieces = np.split(per_token, np.cumsum(lengths)[:-1])
    assert batch.columns["advantage"].tolist() == np.concatenate([pieces[i] for i in (4, 1, 2)]).tolist()


def test_a_companion_is_the_prompt_with_the_completion_of_another_and_has_no_columns():
    members = episodes(3)
    answer(members, [np.array([0])], columns={"rank": np.ones(3)}, companions=np.array([2, -1, 0]))
    assert members[1].companion is None
    assert members[0].companion.prompt_ids == members[0].prompt_ids and not members[0].companion.columns
    whole = members[2].completion_ids
    assert members[0].companion.completion_ids == whole[: len(members[0].companion.completion_ids)]


@pytest.mark.parametrize(
    "groups, others, message",
    [
        ([np.array([0, 5])], {}, "an index that is none of the 5 responses"),
        ([np.array([0, -1])], {}, "an index that is none of the 5 responses"),
        ([np.array([], np.int64)], {}, r"a group of shape \(0,\); expected the indices of one response or more"),
        (np.zeros((2, 1, 1), np.int64), {}, r"a group of shape \(1, 1\)"),
        ([np.array([0])], {"columns": {"rewards": np.zeros(5)}}, "a column rewards, which is there already"),
        ([np.array([0])], {"columns": {"rank": np.zeros(4)}}, r"a column rank of shape \(4,\); expected one number"),
        ([np.array([0])], {"companions": np.zeros(4, np.int64)}, r"companions of shape \(4,\); expected an index"),
        ([np.array([0])], {"companions": np.full(5, 5)}, r"companions of shape \(5,\); expected an index"),
        ([np.array([0.7, 1.0])], {}, "a group of dtype float64; expected whole numbers, the indices of one response"),
        (np.ones((1, 5), bool), {}, "a group of dtype bool; expected whole numbers"),
        ([["a"]], {}, "a group of dtype <U1; expected whole numbers"),
        ([[0, [1, 2]]], {}, "a group of lists of unlike lengths; expected whole numbers"),
        (None, {}, "groups of type NoneType; expected a sequence"),
        ((g for g in [[0]]), {}, "groups of type generator; expected a sequence"),
        ([[0]], {"columns": [np.ones(5)]}, "columns of type list; expected a dict"),
        ([[0]], {"columns": {3: np.ones(5)}}, "a column 3; expected a string for its name"),
        ([[0]], {"columns": {"rank": ["x"] * 5}}, "a column rank of dtype <U1; expected one number for each of the 5"),
        ([[0]], {"columns": {"rank": None}}, "a column rank of dtype object; expected one number"),
        ([[0]], {"columns": {"rank": np.full(5, 1j)}}, "a column rank of dtype complex128; expected one number"),
        ([[0]], {"columns": {"rank": [[1], [1, 2]]}}, "a column rank of lists of unlike lengths; expected one number"),
        ([[0]], {"companions": np.ones(5)}, "companions of dtype float64; expected an index"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(groups, others, message):
    with pytest.raises(UserError, match=f"^Answering.prepare gives {message}"):
        answer(episodes(5), groups, **others)


@pytest.mark.parametrize("found", [None, np.arange(5)[:, None], [[0]]])
def test_what_is_no_selection_is_refused(found):
    with pytest.raises(UserError, match=f"^Answering.prepare gives {type(found).__name__}; expected a Selection"):
        selected(Answering(found), episodes(5))


def test_lists_are_taken_as_arrays_are():
    members = episodes(3)
    answer(members, ([0, 2], (1,)), columns={"rank": [1, 2, 3]}, companions=[1, -1, 0])
    assert members[1].columns["rank"][0] == 2.0 and members[1].companion is None and members[0].companion is not None


def test_companions_that_nothing_reads_are_refused():
    class Unread(Answering):
        companion_sums = Objective.companion_sums

    with pytest.raises(UserError, match="gives companions, and has no companion_sums, which reads them"):
        selected(Unread(Selection([[0]], companions=np.zeros(3, np.int64))), episodes(3))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, -1e300, 2**24 + 1, -(2**40)])
def test_a_column_that_float32_does_not_hold_is_refused_with_its_row(value, per_token):
    members = episodes(4)
    lengths = [len(e.completion_ids) for e in members]
    values = np.zeros(sum(lengths) if per_token else 4, dtype=type(value))
    values[sum(lengths[:2]) if per_token else 2] = value
    expected = (
        rf"a column rank with {re.escape(str(values.dtype.type(value)))} for {re.escape(members[2].source)}; expected"
    )
    with pytest.raises(UserError, match=expected):
        answer(members, [[0]], columns={"rank": values})


def test_groups_of_another_size_than_declared_are_refused():
    class Pairs(Answering):
        group_size = 2

    with pytest.raises(UserError, match=r"gives a group of shape \(3,\); expected the indices of 2"):
        selected(Pairs(Selection([np.array([0, 1, 2])])), episodes(5))


def test_prompts_keep_the_order_of_the_data():
    assert [rows.tolist() for rows in by_prompt(np.array([7, 3, 7, 5, 3]))] == [[0, 2], [1, 4], [3]]
    assert by_prompt(np.array([], np.int64)) == []


def test_pairs_take_the_best_with_the_worst():
    members = episodes(5)
    for e, reward in zip(members, (0.5, 1.0, 0.0, 1.0, 0.0)):
        e.prompt_index, e.reward = 0, reward
    assert pairs(EpisodeColumns(members), 9).tolist() == [[1, 4], [3, 2]]
    assert pairs(EpisodeColumns(members), 1).tolist() == [[1, 4]]


def test_what_is_missing_is_said_by_what_is_there():
    members = episodes(6)
    assert "There are 6 responses, 3 of them correct" in nothing_selected(RFT(), members)
    for e in members:
        e.label = False
    assert "rewards are from 0 to 1: a response is correct above --reward_threshold" in nothing_selected(RFT(), members)
    assert "There are 6 responses" in nothing_selected(REBEL(), members)  # it goes by rewards
    for e in members:
        e.reward, e.wrong_from = 0.0, 0
        e.step_ends, e.step_rewards = [e.action_count - 1], [-1.0]
    assert "There are 6 responses, 0 of them correct" in nothing_selected(RFT(), members)
    assert "of 6 responses 6 have labels of steps; are these turned over?" in nothing_selected(
        RFT(imitate="steps"), members
    )
