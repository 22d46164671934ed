import dataclasses
import itertools
import json
import logging
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqo.data.rows import Row, read_rows, write_rows
from dqo.data.together import check_contrast, duplicate_count, split_by_prompt
from dqo.errors import UserError
from tests.dqo.row_cases import ASSISTANT, GOOD, IDS, OTHER, USER, refusal, says, write

# Rows that are read


def test_the_example_of_the_format_is_read_whole(tmp_path):
    example = {
        "prompt_id": "gsm8k/train/17",
        "prompt": [{"role": "user", "content": "2+3*4?"}],
        "completion": [{"role": "assistant", "content": "3*4=12\n2+12=14\n#### 14"}],
        "label": True,
        "reward": 1.0,
        "steps": [[0, 7], [7, 15], [15, 22]],
        "step_rewards": [0.5, 0.5, 0.0],
        "prompt_value": 0.25,
        **IDS,
        "finish_reason": "stop",
        "answer": "14",
        "sampling": {"model": "sft@3f2a", "temperature": 1.0},
        "grading": {"verifier": "gsm8k", "outcome": "right"},
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    (row,) = read_rows(write(tmp_path, example))
    expected = {**example, "steps": [(0, 7), (7, 15), (15, 22)], "source": "rollouts.jsonl:1"}
    expected |= dict.fromkeys(("env_mask", "turn_spans", "turn_rewards"))  # of other rows, see test_turns.py
    assert dataclasses.asdict(row) == expected


def test_three_columns_are_enough_and_every_other_field_is_none(tmp_path):
    (row,) = read_rows(write(tmp_path, GOOD))
    assert row == Row(**GOOD, label=True, source="rollouts.jsonl:1")


def test_other_columns_are_ignored(tmp_path):
    (row,) = read_rows(write(tmp_path, {**GOOD, "difficulty": 3, "prompt_idx": 7, "completions": []}))
    assert row == Row(**GOOD, label=True, source="rollouts.jsonl:1")


def test_empty_lines_are_passed_over_but_counted(tmp_path):
    assert [row.source for row in read_rows(write(tmp_path, GOOD, "", "  ", OTHER))] == [
        "rollouts.jsonl:1",
        "rollouts.jsonl:4",
    ]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(f"\ufeff{json.dumps(GOOD)}\r\n{json.dumps(OTHER)}\r\n".encode())
    assert [row.reward for row in read_rows(path)] == [1.0, 0.0]


def test_an_integer_is_a_reward():
    (row,) = read_rows([{**GOOD, "reward": -2}])
    assert (row.reward, type(row.reward)) == (-2.0, float)


@pytest.mark.parametrize(("reward", "threshold", "label"), [(0.5, 0.5, False), (0.6, 0.5, True), (0.6, 0.7, False)])
def test_a_missing_label_is_a_reward_above_the_threshold(reward, threshold, label):
    (row,) = read_rows([{**GOOD, "reward": reward}], reward_threshold=threshold)
    assert row.label is label


def test_a_given_label_is_kept_whatever_the_reward():
    (row,) = read_rows([{**GOOD, "label": False}])
    assert row.label is False


def test_a_missing_reward_is_the_label():
    rows = read_rows([{"prompt": "a", "completion": "b", "label": label} for label in (True, False)])
    assert [(row.reward, row.label) for row in rows] == [(1.0, True), (0.0, False)]


def test_a_column_of_null_rewards_beside_labels_is_no_column():
    rows = read_rows([{"prompt": "a", "completion": "b", "reward": None, "label": x} for x in (True, False)])
    assert [row.reward for row in rows] == [1.0, 0.0]


def test_null_stands_for_an_absent_optional_field():
    (row,) = read_rows([{**GOOD, "label": None, "steps": None, "logprobs": None, "answer": None}])
    assert row == Row(**GOOD, label=True, source="row 1")


def test_without_steps_they_are_the_lines_and_a_newline_ends_its_line():
    (row,) = read_rows([{**GOOD, "step_rewards": [1, 0.5, 0]}])
    assert row.steps == [(0, 7), (7, 15), (15, 18)]
    assert row.step_rewards == [1.0, 0.5, 0.0]


def test_a_trailing_newline_makes_no_further_step():
    (row,) = read_rows([{**GOOD, "completion": "a\n\nb\n", "step_rewards": [0, 0, 0]}])
    assert row.steps == [(0, 2), (2, 3), (3, 5)]


def test_steps_count_characters_and_not_bytes():
    (row,) = read_rows([{**GOOD, "completion": "½€\n😀", "steps": [[0, 3], [3, 4]]}])
    assert row.steps == [(0, 3), (3, 4)]


def test_log_probabilities_above_zero_by_rounding_become_zero():
    (row,) = read_rows([{**GOOD, **IDS, "logprobs": [3e-7, -0.5, 0]}])
    assert row.logprobs == [0.0, -0.5, 0.0]


def test_integer_identifiers_become_strings():
    (row,) = read_rows([{**GOOD, "prompt_id": 17, "answer": 14}])
    assert (row.prompt_id, row.answer) == ("17", "14")


def test_numpy_values_are_read_as_numbers():
    numpy = pytest.importorskip("numpy")
    arrays = {name: numpy.array(value) for name, value in IDS.items()}
    (row,) = read_rows([{**GOOD, **arrays, "reward": numpy.float32(0.5), "label": numpy.bool_(True)}])
    assert row == Row(**(GOOD | {"reward": 0.5}), label=True, **IDS, source="row 1")


def test_rows_are_read_again_and_keep_their_source():
    rows = read_rows([GOOD, OTHER])
    renamed = [dataclasses.replace(row, source=f"a.jsonl:{i}") for i, row in enumerate(rows)]
    assert read_rows(renamed) == renamed


def test_null_keys_of_messages_are_dropped():
    prompt = [{**USER, "name": None, "tool_calls": None}]
    (row,) = read_rows([{"prompt": prompt, "completion": [ASSISTANT], "reward": 1}])
    assert row.prompt == [USER]


# One message for many rows


def test_ten_problems_are_listed_in_the_order_of_the_file_and_the_rest_is_counted(tmp_path):
    rows = (
        [{**GOOD, "reward": f"{i}"} for i in range(7)] + ["{"] + [{**GOOD, "label": i} for i in range(2, 7)] + [OTHER]
    )
    message = refusal(write(tmp_path, *rows))
    lines = message.splitlines()
    assert lines[0] == "rollouts.jsonl: 13 of 14 rows do not fit:"
    assert [line.split()[0] for line in lines[1:11]] == [f"rollouts.jsonl:{i}:" for i in range(1, 11)]
    says(lines[8], "not valid JSON")
    assert lines[11] == "  ... and 3 more"
    says(lines[12], "1 rows fit")


def test_what_is_the_same_for_several_rows_is_said_once_with_their_lines(tmp_path):
    rows = [{**GOOD, "reward": "1"}, OTHER, {**GOOD, "completion": ""}] + [{**GOOD, "reward": "1"}] * 12
    lines = refusal(write(tmp_path, *rows)).splitlines()
    assert lines[0] == "rollouts.jsonl: 14 of 15 rows do not fit:" and len(lines) == 4
    says(
        lines[1],
        'rollouts.jsonl:1: reward is "1"',
        "(the same in 12 more: rollouts.jsonl:4, ... rollouts.jsonl:12, ...)",
    )
    says(lines[2], "rollouts.jsonl:3: completion is empty")


def test_bad_rows_are_skipped_on_request_and_the_log_says_how_many(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        rows = read_rows(write(tmp_path, GOOD, "{", {**GOOD, "reward": None}, OTHER), skip_bad_rows=True)
    assert [row.source for row in rows] == ["rollouts.jsonl:1", "rollouts.jsonl:4"]
    says(caplog.text, "2 of 4 rows do not fit", "rollouts.jsonl:2", "dropped; 2 rows are left")


def test_skipping_does_not_end_with_no_rows(tmp_path):
    path = write(tmp_path, {**GOOD, "completion": ""})
    says(refusal(path, skip_bad_rows=True), "rollouts.jsonl:1: completion is empty")


def test_good_rows_leave_no_warning(tmp_path, caplog):
    read_rows(write(tmp_path, GOOD, OTHER), skip_bad_rows=True)
    assert not caplog.records


# Writing

TEXT = st.text(min_size=1).filter(str.strip)
NUMBER = st.floats(-1e38, 1e38)  # of float32, in which training computes
LOGPROB = st.floats(min_value=-1e6, max_value=0.0)


@st.composite
def any_row(draw, messages: bool, logprobs: bool):
    prompt, completion = draw(st.text(min_size=1)), draw(TEXT)
    cuts = sorted(draw(st.sets(st.integers(0, len(completion))) | st.none()) or []) or None
    steps = None
    if cuts is not None:
        edges = sorted({0, *cuts, len(completion)})
        steps = list(zip(edges, edges[1:]))
    some_ids = st.lists(st.integers(0, 2**31), min_size=1, max_size=4)
    ids = draw(some_ids if logprobs else some_ids | st.none())
    mask = None if ids is None else draw(st.none() | st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
    mask = mask if mask is not None and 0 < sum(mask) < len(mask) else None  # all ones say what no mask says
    turns = None if mask is None else sum(own for own, _ in itertools.groupby(mask))
    steps = steps if turns is None else None
    return Row(
        prompt=[{"role": "user", "content": prompt}] if messages else prompt,
        completion=[{"role": "assistant", "content": completion}] if messages else completion,
        reward=draw(NUMBER),
        label=draw(st.booleans()),
        steps=steps,
        step_rewards=None if steps is None or draw(st.booleans()) else [draw(NUMBER) for _ in steps],
        prompt_ids=None if ids is None else draw(st.none() | st.lists(st.integers(0, 99), min_size=1)),
        completion_ids=ids,
        logprobs=[draw(LOGPROB) if own else 0.0 for own in mask or [1] * len(ids)] if logprobs else None,
        env_mask=mask,
        turn_rewards=None if turns is None or draw(st.booleans()) else [draw(NUMBER) for _ in range(turns)],
        finish_reason=draw(st.sampled_from([None, "stop", "length"])),
        answer=draw(st.none() | st.text()),
        prompt_id=draw(st.none() | st.text()),
        sampling=draw(st.none() | st.dictionaries(st.text(), st.text() | NUMBER | st.booleans())),
    )


@settings(deadline=None)  # it waits for the disk
@given(data=st.data(), messages=st.booleans(), logprobs=st.booleans())
def test_what_is_written_is_read_again_exactly(data, messages, logprobs, tmp_path_factory):
    rows = data.draw(st.lists(any_row(messages, logprobs), min_size=1, max_size=4))
    path = tmp_path_factory.mktemp("rows") / "rollouts.jsonl"
    write_rows(path, rows)
    read = read_rows(path)
    assert [row.source for row in read] == [f"rollouts.jsonl:{i + 1}" for i in range(len(rows))]
    assert [dataclasses.replace(row, source="") for row in read] == rows


def test_absent_fields_and_the_source_are_not_written(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write_rows(path, [Row("p", "c ½", reward=1.0, source="a.jsonl:9")])
    assert path.read_text() == '{"prompt": "p", "completion": "c ½", "reward": 1.0}\n'


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_rows(path, [Row("p", "c", reward=1.0), Row("p", "c", reward=math.nan)])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none/rollouts.jsonl: cannot be written: No such file"):
        write_rows(tmp_path / "none" / "rollouts.jsonl", [Row("p", "c", reward=1.0)])
    with pytest.raises(UserError, match=r"rows.parquet: .*name the file .jsonl"):
        write_rows(tmp_path / "rows.parquet", [])


# What the rows hold together


def rewarded(*pairs, **more):
    return [Row(prompt, f"c{i}", reward=reward, **more) for i, (prompt, reward) in enumerate(pairs)]


def test_a_prompt_with_different_rewards_is_contrast():
    assert check_contrast(rewarded(("p", 1.0), ("p", 0.0), ("q", 1.0))) == ""


def test_equal_rewards_are_nothing_to_learn():
    with pytest.raises(UserError, match=r"every reward is 0\.0: nothing to learn\. Check the grader"):
        check_contrast(rewarded(("p", 0.0), ("q", 0.0)))
    with pytest.raises(UserError, match=r"every reward is 1\.0"):
        check_contrast(rewarded(("p", 1.0), steps=[(0, 2)], step_rewards=[0.0]))


def test_step_rewards_are_something_to_learn_where_every_reward_is_equal():
    warning = check_contrast(rewarded(("p", 0.0), ("q", 0.0), steps=[(0, 2)], step_rewards=[-0.5]))
    says(warning, "no prompt has responses with different rewards", "2 responses, 2 prompts")


def test_contrast_between_prompts_only_is_a_warning_with_counts():
    messages = [{"role": "user", "content": "p"}]
    rows = [Row(messages, "a", reward=1.0), Row(list(messages), "b", reward=1.0), Row("q", "c", reward=0.0)]
    says(check_contrast(rows), "no prompt has responses with different rewards (3 responses, 2 prompts)")


def test_duplicates_repeat_both_prompt_and_completion():
    rows = [
        Row("p", "a", 1.0),
        Row("p", "a", 0.0),
        Row("p", "b", 1.0),
        Row("q", "a", 1.0),
        Row("p", "a", 1.0),
    ]
    assert duplicate_count(rows) == 2


@given(st.permutations(range(60)), st.integers(0, 5))
def test_the_side_of_a_prompt_does_not_depend_on_the_other_rows_or_their_order(order, seed):
    rows = [Row(f"problem {i // 3}", f"{i}", reward=0.0) for i in range(60)]
    train, held_out = split_by_prompt(rows, 0.3, seed)
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert len(train) + len(held_out) == 60
    shuffled = split_by_prompt([rows[i] for i in order[:30]], 0.3, seed)
    assert {row.prompt for row in shuffled[1]} <= {row.prompt for row in held_out}
    assert {row.prompt for row in shuffled[0]} <= {row.prompt for row in train}


def test_the_split_has_about_the_share_asked_for_and_follows_the_seed():
    rows = [Row(f"problem {i}", "c", reward=0.0) for i in range(4000)]
    first, second = (split_by_prompt(rows, 0.1, seed)[1] for seed in (0, 1))
    assert 330 < len(first) < 470
    assert {row.prompt for row in first} != {row.prompt for row in second}
    assert split_by_prompt(rows, 0.0, 0) == (rows, [])
    # a frozen side: a split that changed between releases would leak held-out problems into a resumed run
    assert [row.prompt for row in first[:3]] == ["problem 4", "problem 15", "problem 16"]


def test_a_fraction_out_of_range_is_refused():
    for fraction in (-0.1, 1.0):
        with pytest.raises(UserError, match=r"held-out fraction must be in \[0, 1\)"):
            split_by_prompt([], fraction, 0)


def test_rows_are_checked_without_importing_torch():
    heavy = "{'torch', 'transformers', 'numpy', 'pyarrow', 'tqdm'}"
    code = f"import sys, dqo.data.rows, dqo.convert.entry; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pipe_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="pipe.jsonl: is a pipe.*write them to a file"):
        read_rows(tmp_path / "pipe.jsonl")
