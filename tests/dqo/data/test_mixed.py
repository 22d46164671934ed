"""Rows of several data sets: as one file has them, in the tables that each has alone, and what does not fit together."""

import json

import numpy as np
import pytest

from dqo.data.control import with_shuffled_rewards
from dqo.data.episode import content_of
from dqo.data.episodes import open_episodes
from dqo.data.mixed import names_of, open_data, sources_of, weights_of
from dqo.data.rows import read_rows
from dqo.data.stored import _COLUMNS, column, process_rewards
from dqo.data.together import split_by_prompt
from dqo.errors import UserError
from tests.dqo.data.test_table import COLUMNS, PAYMENTS, TOKENIZER, EpisodeColumns, mixed_rows, small_segments  # noqa: F401
from tests.dqo.row_cases import GOOD, says

SETTINGS = {"vocab_size": len(TOKENIZER), "max_length": 64}


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def parts(tmp_path, monkeypatch, small_segments):  # noqa: F811
    """Three files, of segments of three rows, and one with all of their rows."""
    monkeypatch.chdir(tmp_path)
    rows = mixed_rows(17)
    for name, some in {"a": rows[:7], "b": rows[7:8], "c": rows[8:], "whole": rows}.items():
        write(tmp_path / f"{name}.jsonl", some)
    return "a.jsonl:0.5,b.jsonl:0.25,c.jsonl:0.25"


def content(row):
    return [getattr(row, name) for name in row.__slots__ if name != "source"]


def test_they_are_the_rows_of_one_file_in_any_order(parts):
    mixed, whole = open_data(parts), open_data("whole.jsonl")
    assert [content(row) for row in mixed] == [content(row) for row in whole]
    assert (mixed[6].source, mixed[7].source, mixed[-1].source) == ("a.jsonl:7", "b.jsonl:1", "c.jsonl:9")
    order = np.random.default_rng(0).permutation(17)[:12]
    for one, other in (
        (mixed, whole),
        (mixed.take(order), whole.take(order)),
        (mixed.take(order).take(order < 9), whole.take(order[order < 9])),
    ):
        assert [content(row) for row in one] == [content(row) for row in other]
        for name in _COLUMNS:
            np.testing.assert_array_equal(column(one, name), column(other, name), name)
        np.testing.assert_array_equal(process_rewards(one), process_rewards(other))
    assert sources_of(mixed.take(order)).tolist() == np.repeat([0, 1, 2], [7, 1, 9])[order].tolist()
    assert names_of(mixed.take(order)) == ("a.jsonl", "b.jsonl", "c.jsonl")
    assert list(weights_of(mixed)) == [0.5, 0.25, 0.25] and weights_of(open_data("a.jsonl,c.jsonl")) is None
    assert not len(names_of(whole)) and not sources_of(whole).any()


@pytest.mark.parametrize("options", PAYMENTS, ids=str)
def test_their_episodes_are_those_of_one_file(options, parts):
    keep = np.arange(17) % 5 != 3
    mixed, whole = (
        open_episodes(open_data(name).take(keep), TOKENIZER, **(SETTINGS | options)) for name in (parts, "whole.jsonl")
    )
    assert [content_of(e) for e in mixed] == [content_of(e) for e in whole] and len(mixed)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(EpisodeColumns(mixed), name), getattr(EpisodeColumns(whole), name), name)


def test_each_data_set_is_checked_and_tokenised_once_however_it_is_read(parts, tmp_path, monkeypatch):
    alone = {
        name: open_episodes(open_data(name, root=tmp_path / "t"), TOKENIZER, **SETTINGS)
        for name in ("a.jsonl", "c.jsonl")
    }
    before = sorted((tmp_path / "t").iterdir())
    monkeypatch.setattr("dqo.data.stored.checked_rows", None)
    monkeypatch.setattr("dqo.data.table.tokenize_chunk", None)
    mixed = open_episodes(open_data("c.jsonl:0.5,a.jsonl:0.5", root=tmp_path / "t"), TOKENIZER, **SETTINGS)
    assert [e.completion_ids for e in mixed] == [
        e.completion_ids for name in ("c.jsonl", "a.jsonl") for e in alone[name]
    ]
    assert sorted((tmp_path / "t").iterdir()) == before


def test_rows_are_named_by_their_data_set_where_the_file_alone_would_not_tell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in "xy":
        write(tmp_path / folder / "rows.jsonl", [GOOD])
    rows = open_data("x/rows.jsonl,y/rows.jsonl")
    assert [row.source for row in rows] == ["x/rows.jsonl:1", "y/rows.jsonl:1"]
    write(tmp_path / "y" / "rows.jsonl", [GOOD, GOOD | {"reward": "good"}])
    with pytest.raises(UserError, match='^y/rows.jsonl:2: reward is "good"'):
        open_data("x/rows.jsonl,y/rows.jsonl")


def test_saved_data_sets_and_parquet_are_read_beside_files(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [GOOD])
    made = datasets.Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r"}])  # another form than the file's
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "b.parquet"))
    rows = open_data("saved:0.5,a.jsonl:0.25,b.parquet:0.25")
    assert [row.reward for row in rows] == [1.0, 0.0, GOOD["reward"], 1.0, 0.0]
    assert [row.source.partition(":")[0] for row in rows] == ["saved", "saved", "a.jsonl", "b.parquet", "b.parquet"]


MESSAGES = {"prompt": [{"role": "user", "content": "1"}], "completion": [{"role": "assistant", "content": "2"}]}
IDS = {"prompt_ids": [5], "completion_ids": [6], "logprobs": [-1.0]}
UNLIKE = {
    "prompts": (MESSAGES | {"reward": 1.0}, "b.jsonl: its prompts are messages, and those of a.jsonl are strings"),
    "logprobs": (GOOD | IDS, "a.jsonl: its rows have no logprobs, and those of b.jsonl have; give all rows theirs"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_rows_of_one_file_must_share_is_shared_by_all(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row, message = UNLIKE[name]
    write(tmp_path / "a.jsonl", [GOOD])
    write(tmp_path / "b.jsonl", [row])
    with pytest.raises(UserError) as error:
        open_data("a.jsonl,b.jsonl")
    says(str(error.value), message)


def test_a_prompt_is_held_out_of_all_data_sets_and_a_share_of_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, first in (("a", 0), ("b", 300)):
        rows = [{"prompt": f"{i}", "completion": f"{name}", "reward": float(i % 2)} for i in range(first, first + 400)]
        write(tmp_path / f"{name}.jsonl", rows)
    trained, held = split_by_prompt(open_data("a.jsonl:0.9,b.jsonl:0.1"), 0.25, 3)
    assert not {row.prompt for row in trained} & {row.prompt for row in held}
    assert all(70 < count < 130 for count in np.bincount(sources_of(held)))
    assert list(weights_of(trained)) == [0.9, 0.1]


def test_shuffled_rewards_stay_in_their_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, base in (("a", 0), ("b", 100)):
        rows = [{"prompt": f"{i}", "completion": name, "reward": base + i} for i in range(30)]
        write(tmp_path / f"{name}.jsonl", rows)
    rows = open_data("a.jsonl,b.jsonl")
    found, _ = with_shuffled_rewards(rows, 0, False)
    rewards = [row.reward for row in found]
    assert sorted(rewards[:30]) == list(range(30)) and sorted(rewards[30:]) == list(range(100, 130)) != rewards[30:]
    assert [row.reward for row in read_rows("a.jsonl")] != rewards[:30]
