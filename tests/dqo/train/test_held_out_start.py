"""What the initial model said of held-out responses is kept once, and is never taken for that of others."""

import numpy as np
import pytest

from dqo.train.held_out_start import START_FILE, read_start, write_start
from tests.dqo.helpers import episodes


def told(members):
    for e in members:
        e.step_ends = sorted({0, e.action_count - 1})
    return [
        {"logprobs": -np.arange(1.0, e.action_count + 1), "entropy": np.arange(e.action_count) / 10} for e in members
    ]


def test_each_response_has_sums_and_the_doubt_of_each_step(tmp_path):
    members = episodes(6)
    write_start(tmp_path, members, told(members))
    e = next(e for e in members if e.action_count > 2)
    row, last = read_start(tmp_path, members)[members.index(e)], e.action_count - 1
    assert row["start_logps"] == -sum(range(1, last + 2)) and row["start_entropy"] == pytest.approx(
        sum(range(last + 1)) / 10
    )
    assert row["start_step_logprobs"] == [-1.0, -(last + 1.0)]
    assert row["start_step_entropies"] == pytest.approx([0.0, last / 10])


def test_what_is_of_other_responses_or_damaged_is_left_out_and_named(tmp_path, caplog):
    members = episodes(6)
    assert read_start(tmp_path, members) == [] and not caplog.records  # of a run that kept none
    write_start(tmp_path, members, told(members))
    assert read_start(tmp_path, members[:5]) == [] and "of other responses" in caplog.text
    (tmp_path / START_FILE).write_text('{"source": ')
    assert (
        read_start(tmp_path, members) == []
        and f"{START_FILE} is left out of the report: JSONDecodeError" in caplog.text
    )
