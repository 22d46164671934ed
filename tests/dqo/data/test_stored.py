"""Rows of a table: the rows of the file, whatever its form, and columns that say of all of them what each row says."""

import json
import logging
import threading

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dqo.data import rows, segments, stored, table
from dqo.data.control import with_shuffled_rewards
from dqo.data.rows import read_rows
from dqo.data.stored import _COLUMNS, column, open_rows, process_rewards
from dqo.data.together import split_by_prompt
from dqo.errors import UserError

IDS = {"prompt_ids": [3], "completion_ids": [4, 5, 2], "logprobs": [-0.5, -1.0, -0.25], "finish_reason": "stop"}
SAID = [{"role": "user", "content": "1+1="}]
ANSWERED = [{"role": "assistant", "content": "3"}, {"role": "user", "content": "no"}, *SAID[:0]]
FILES = {
    "flat": [
        {"prompt": f"{i // 2}+1=", "completion": f"a\n{i % 3}", "reward": i % 3 / 2, "answer": "3", "spare": 1}
        | ({"steps": [[0, 2], [2, 3]], "step_rewards": [0.5, -1.0 * i]} if i % 2 else {"finish_reason": "length"})
        for i in range(11)
    ],
    "ids": [{"prompt": "1", "completion": "2", "reward": float(i)} | IDS | {"prompt_value": 0.5} for i in range(5)],
    "grouped": [{"prompt": str(i), "completions": ["a", "b", "a"], "rewards": [1, 0, 1]} for i in range(4)],
    "preference": [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(4)],
    "turns": [
        {
            "prompt": SAID,
            "completion": [*ANSWERED, {"role": "assistant", "content": "2"}],
            "reward": i / 4,
            "turn_rewards": [0.0, 0.5],
            "tools": [{"name": "f"}],
        }
        for i in range(4)
    ],
}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    for module in (stored, table):
        monkeypatch.setattr(module, "ROWS", 3)
    monkeypatch.setattr(stored, "SHARED_FROM", 0)
    monkeypatch.setattr(segments, "MAPPED", 2)


def written(folder, rows, kind="jsonl"):
    path = folder / f"rollouts.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", FILES)
def test_a_table_has_the_rows_of_its_file_and_their_columns(name, kind, tmp_path, monkeypatch, caplog):
    path = written(tmp_path, FILES[name], kind)
    expected = read_rows(path)
    caplog.clear()
    rows = open_rows(path, root=tmp_path / "cache")
    said = caplog.messages
    assert list(rows) == expected and rows == expected and rows[-1] == expected[-1] and rows[1:3] == expected[1:3]

    def checked(*_):
        raise AssertionError("the rows are checked again")

    monkeypatch.setattr(stored, "checked_rows", checked)
    caplog.clear()
    again = open_rows(path, root=tmp_path / "cache")
    assert again == expected and caplog.messages == said
    assert any("not used: 'spare'" in message for message in said) == (name == "flat")

    shuffled, _ = with_shuffled_rewards(expected, 1, True) if len({r.reward for r in expected}) > 1 else (expected, "")
    moved = with_shuffled_rewards(rows, 1, True)[0] if shuffled != expected else rows
    chosen = np.array([3, 0, 2])
    for mine, theirs in ((rows, expected), (moved, shuffled), (moved.take(chosen), [shuffled[i] for i in chosen])):
        assert mine == theirs
        for of in _COLUMNS:
            np.testing.assert_array_equal(column(mine, of), column(theirs, of), of)
        np.testing.assert_array_equal(process_rewards(mine), process_rewards(theirs))
    assert split_by_prompt(rows, 0.5, 3) == split_by_prompt(expected, 0.5, 3)


def test_a_table_without_a_directory_lies_in_a_file_without_a_name_once_it_is_large(tmp_path, monkeypatch):
    path = written(tmp_path, FILES["flat"])
    small = open_rows(path)
    assert small.segments._memory and small.segments._file is None and small.root is None
    monkeypatch.setattr(segments, "IN_MEMORY", 10)
    large = open_rows(path)
    assert not large.segments._memory and len(large.segments._begins) == 4
    assert large == small == read_rows(path)


def test_other_files_and_options_have_other_tables_and_equal_ones_the_same(tmp_path):
    path, cache = written(tmp_path, FILES["flat"]), tmp_path / "cache"
    first = open_rows(path, root=cache)
    assert open_rows(path, root=cache).segments.directory == first.segments.directory
    other = open_rows(path, root=cache, reward_threshold=0.25)
    path.write_text(path.read_text().replace('"spare": 1', '"spare": 2'))
    changed = open_rows(path, root=cache)
    assert len({rows.segments.directory for rows in (first, other, changed)}) == 3
    assert [row.label for row in other] != [row.label for row in first]


def test_rows_that_do_not_fit_are_named_alike_and_no_table_is_left_of_them(tmp_path, caplog):
    path = written(tmp_path, [*FILES["flat"], {"prompt": "1", "completion": "", "reward": 1}])
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            open_rows(path, root=tmp_path / "cache")
        with pytest.raises(UserError) as expected:
            read_rows(path)
        assert str(caught.value) == str(expected.value)
    messages = []
    for read in (open_rows, open_rows, read_rows):
        caplog.clear()
        rows = read(path, skip_bad_rows=True, **({"root": tmp_path / "cache"} if read is open_rows else {}))
        assert len(rows) == 11
        messages.append(caplog.messages)
    assert messages[0] == messages[1] == messages[2] and "They are dropped; 11 rows are left" in messages[0][-1]


def test_a_damaged_segment_is_named_and_made_again(tmp_path, caplog):
    path, cache = written(tmp_path, FILES["flat"]), tmp_path / "cache"
    rows = open_rows(path, root=cache)
    expected = list(rows)
    file = rows.segments.directory / "segment-000001.safetensors"
    content = file.read_bytes()
    headers = [
        content.replace(*pair, 1)
        for pair in ((b'"header"', b'"heaper"'), (b'"{}"', b'"{1"'), (b'"reward"', b'"rewarm"'))
    ]
    for damage in (content[:-3], content[:-3] + b"abc", content[:5], b"", *headers):
        file.write_bytes(damage)
        caplog.clear()
        assert open_rows(path, root=cache) == expected
        assert any(str(file) in message and "is written again" in message for message in caplog.messages)


def test_what_is_known_of_all_rows_is_made_again_when_it_is_damaged(tmp_path, caplog):
    path, cache = written(tmp_path, FILES["flat"]), tmp_path / "cache"
    rows = open_rows(path, root=cache)
    file, expected = rows.segments.directory / "whole.json", list(rows)
    content = file.read_bytes()
    for damage in (
        content.replace(b"11", b"10"),
        content.replace(b"said", b"sand"),
        content[:-2],
        b'{"segments": 4}',
        b"[]",
    ):
        file.write_bytes(damage)
        caplog.clear()
        assert open_rows(path, root=cache) == expected
        assert [m for m in caplog.messages if "damaged" in m] == [f"{file} is damaged and is written again"]
        assert file.read_bytes() == content


def test_a_table_that_is_deleted_or_cut_while_it_is_in_use_is_named(tmp_path):
    rows = open_rows(written(tmp_path, FILES["flat"]), root=tmp_path / "cache")
    file = rows.segments.directory / "segment-000001.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(
        UserError, match=r"segment-000001.*was deleted or altered while it was in use \(it is cut off\)"
    ):
        rows[3]
    file.unlink()
    with pytest.raises(
        UserError, match=r"while it was in use \(No such file or directory\). The same command makes it again"
    ):
        rows[3]


def test_a_full_disk_is_named_and_what_was_written_is_used_later(tmp_path, monkeypatch):
    path, cache, write = written(tmp_path, FILES["flat"]), tmp_path / "cache", segments.write_whole

    def full(target, content):
        if "000002" in target.name:
            raise UserError(f"{target}: cannot be written: No space left on device. What was there before is whole")
        write(target, content)

    monkeypatch.setattr(segments, "write_whole", full)
    with pytest.raises(UserError, match="segment-000002.safetensors: cannot be written: No space left on device"):
        open_rows(path, root=cache)
    monkeypatch.setattr(segments, "write_whole", write)
    assert open_rows(path, root=cache) == read_rows(path)


def test_values_that_cannot_be_shared_stay_with_the_process(tmp_path):
    import datetime

    rows = [row | {"sampling": {"at": datetime.datetime(2026, 1, 1)}} for row in FILES["flat"]]
    path = written(tmp_path, rows, "parquet")
    opened = open_rows(path, root=tmp_path / "cache")
    assert opened.root is None and opened == read_rows(path)


def test_of_two_that_open_a_file_at_the_same_time_one_checks_it(tmp_path, monkeypatch):
    path, calls, checked, found = written(tmp_path, FILES["flat"]), [], stored.checked_rows, []

    def counted(*arguments):
        calls.append(1)
        return checked(*arguments)

    monkeypatch.setattr(stored, "checked_rows", counted)
    logging.getLogger("dqo.data.stored").setLevel(logging.ERROR)
    threads = [threading.Thread(target=lambda: found.append(open_rows(path, root=tmp_path / "c"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logging.getLogger("dqo.data.stored").setLevel(logging.NOTSET)
    assert len(calls) == 1 and found[0] == found[1] == found[2]


def test_who_waits_for_another_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    waiting = threading.Thread(target=lambda: open_rows(path, root=tmp_path / "cache"))
    path = written(tmp_path, FILES["flat"])
    directory = open_rows(path, root=tmp_path / "cache").segments.directory
    (directory / "whole.json").unlink()
    with segments.Segments(directory).alone():
        waiting.start()
        waiting.join(0.05)
        while waiting.is_alive() and not caplog.messages:
            waiting.join(0.05)
        assert f"another process writes {directory}" in caplog.text and not (directory / "whole.json").exists()
    waiting.join()
    assert (directory / "whole.json").exists()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_changes_while_it_is_read_is_refused_and_leaves_no_table(kind, tmp_path, monkeypatch):
    path, checked = written(tmp_path, FILES["flat"], kind), rows.checked

    def another_writes(*arguments):
        written(tmp_path, FILES["flat"] * 2, kind)
        return checked(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(rows, "checked", another_writes)
        for read in (read_rows, lambda path: open_rows(path, root=tmp_path / "cache")):
            with pytest.raises(
                UserError, match=f"rollouts.{kind}: changed while it was read; start again when its writer"
            ):
                read(written(tmp_path, FILES["flat"], kind))
    assert not list(tmp_path.rglob("whole.json"))
    assert open_rows(path, root=tmp_path / "cache") == read_rows(path)
