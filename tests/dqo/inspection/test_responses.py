"""Which rows are shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqo.data.marks import Marks
from dqo.data.rows import Row
from dqo.errors import UserError
from dqo.inspection.responses import chosen, siblings
from tests.dqo.inspection.stored import response


def rows_of(kinds):
    """(prompt, right, known wrong step) of each."""
    return [
        Row(f"p{p}", "c", float(right), right, step_rewards=[-1.0] if known else None, source=f"f.jsonl:{i + 2}")
        for i, (p, right, known) in enumerate(kinds)
    ]


def shown(rows, count, lines):
    return chosen(rows, count, lines, Marks.of_rows(rows, None))


kinds = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans()), min_size=1, max_size=20)


@given(kinds, st.integers(1, 8))
def test_rows_of_distinct_prompts_right_and_wrong_ones_as_many_as_there_are(of, count):
    rows = rows_of(of)
    found = shown(rows, count, ())
    prompts = [rows[i].prompt for i in found]
    assert len(set(prompts)) == len(prompts) <= count
    assert found and (len(found) == count or set(prompts) == {row.prompt for row in rows})
    labels = [rows[i].label for i in found]
    assert labels == sorted(labels)  # the wrong ones first
    others = siblings(rows, found)
    assert sorted([*found, *others]) == [i for i, row in enumerate(rows) if row.prompt in prompts]


def test_both_kinds_are_shown_alike_and_wrong_ones_with_a_known_step_first():
    rows = rows_of([(0, False, False), (1, True, False), (2, False, True), (3, True, False), (4, True, False)])
    assert shown(rows, 4, ()) == [2, 0, 1, 3]
    assert shown(rows, 5, ()) == [2, 0, 1, 3, 4]
    assert shown(rows, 1, ()) == [2]


def test_lines_are_those_of_the_file_and_all_rows_of_a_line():
    rows = [Row("p", "c", 1.0, True, source=s) for s in ("f:1, completion 1", "f:1, completion 2", "f:4, chosen", "x")]
    assert shown(rows, 1, ["1"]) == [0, 1]
    assert shown(rows, 1, ["4", "1-999999999999"]) == [2, 3, 0, 1]  # what has no line counts as the row that it is
    for line, part in (
        ("7", "no row is in line 7; the file has rows in lines 1 to 4"),
        ("3-2", "no row is in line 3-2"),
    ):
        with pytest.raises(UserError, match=part):
            shown(rows, 1, [line])
    with pytest.raises(UserError, match="'last' is no line; give lines such as 12, or 3-7"):
        shown(rows, 1, ["last"])


def test_tokens_of_an_environment_belong_to_the_step_before_them():
    one = response([1.0, 2.0, 3.0], step_ends=[0, 1], texts="aEEbc", env=(1, 2))
    assert one.step_of_text.tolist() == [0, 0, 0, 1, 1]
    assert one.action_of_text == [0, None, None, 1, 2]
    assert one.step_sums.tolist() == [1.0, 5.0] and one.lowest_step == 0
    assert response([1.0]).lowest_step is None
