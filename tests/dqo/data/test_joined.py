"""Sequences that are read as one, and the columns of rows that were joined."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqo.data.joined import Joined, parts_of
from dqo.data.marks import Marks
from dqo.data.rows import read_rows
from dqo.data.stored import column, paid_by_turns, process_rewards, stored


@given(st.lists(st.lists(st.integers())), st.integers(-30, 30), st.integers(-30, 30))
def test_it_reads_as_the_list_of_all(parts, first, last):
    joined, whole = Joined(*parts), [x for part in parts for x in part]
    assert (len(joined), list(joined), joined[first:last]) == (len(whole), whole, whole[first:last])
    assert [x for part in parts_of(joined) for x in part] == whole == [x for part in parts_of(whole) for x in part]
    if -len(whole) <= first < len(whole):
        assert joined[first] == whole[first]
    else:
        with pytest.raises(IndexError):
            joined[first]


def test_columns_of_joined_rows_are_those_of_all_rows():
    """In a list, in a table, and in both, one of them empty."""
    stepped = {"steps": [[0, 1], [1, 2]], "step_rewards": [1.0, 0.0]}
    turns = {"turn_spans": [[0, 1], [1, 2]], "turn_rewards": [-1.0, 0.5]}
    kinds = [stepped, {}, turns, stepped | {"prompt_value": 0.5}]
    rows = read_rows([{"prompt": f"{i}", "completion": "22", "reward": float(i)} | kinds[i % 4] for i in range(9)])
    joined = Joined(stored(rows).take(np.arange(4)), [], rows[4:])
    for name in ("reward", "prompt", "paid", "turns_paid", "prompt_value", "present"):
        np.testing.assert_array_equal(column(joined, name), column(rows, name), name)
    np.testing.assert_array_equal(process_rewards(joined), process_rewards(rows))
    expected = [row.turn_rewards is not None for row in rows for _ in row.process_rewards or ()]
    assert paid_by_turns(joined).tolist() == expected
    for option in (None, "potential"):
        assert Marks.of_rows(joined, option) == Marks.of_rows(rows, option)
    assert Marks.of_rows(joined, None).steps == "zero"  # the -1 of a turn is no rating of a step
