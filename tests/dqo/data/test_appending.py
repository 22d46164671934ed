"""Rows that a long command appends: whatever stopped it, none is lost, doubled or half there."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dqo.data import appending as module
from dqo.data.appending import appending, begun_under
from dqo.errors import UserError
from tests.dqo.together import launched

ROOT = Path(__file__).parents[3]
ROWS = [{"k": k, "text": "é" * k} for k in range(4)]


def number(row):
    return row["k"]


def finish(path, options=None):
    """Appends those of ROWS that are missing; returns what was there."""
    with appending(path, options or {"seed": 0}, number) as file:
        for row in ROWS:
            if row["k"] not in file.found:
                file.append([row])
        return file.found


def test_a_file_that_was_cut_anywhere_is_finished_as_if_it_had_never_been(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert finish(path) == []
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert finish(path) == list(range(whole[:size].count(b"\n")))
        assert path.read_bytes() == whole


def test_a_file_of_other_options_is_refused_and_names_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    finish(path, {"seed": 0, "top_p": 1.0, "model": "a"})
    before = path.read_bytes()
    with pytest.raises(
        UserError, match="rows.jsonl: was begun under other options: seed 0 then, 1 now; top_p 1.0 then, null"
    ):
        finish(path, {"seed": 1, "model": "a"})
    assert path.read_bytes() == before
    path.unlink()
    finish(path, {"seed": 1})  # without rows nothing depends on the options


@pytest.mark.parametrize("content", ["{}\n", "no end"])
def test_a_file_of_something_else_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(
        UserError, match="rows.jsonl: exists, and this command did not write it; choose another --output_file"
    ):
        finish(path)
    assert path.read_text() == content


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b'{"j": 1}\n', b"\xff\n", b"\n"])
def test_a_damaged_row_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    finish(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + line + lines[2])
    with pytest.raises(UserError, match="rows.jsonl:2: is no row of this command"):
        finish(path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff"])
def test_damaged_options_are_named(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    finish(path)
    (tmp_path / "rows.jsonl.options.json").write_bytes(content)
    assert begun_under(path) == {}
    with pytest.raises(UserError, match="rows.jsonl.options.json: is damaged; choose another --output_file, or delete"):
        finish(path)


def test_names_that_are_no_files_of_lines_are_refused(tmp_path):
    with pytest.raises(UserError, match="rows are written as JSON Lines; name the file .jsonl"):
        finish(tmp_path / "rows.parquet")
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(UserError, match="a.jsonl: cannot be written: Is a directory"):
        finish(tmp_path / "a.jsonl")


def test_a_second_process_is_refused_while_the_first_is_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    second = [
        sys.executable,
        "-c",
        "import sys; from tests.dqo.data.test_appending import finish; finish(sys.argv[1])",
        path,
    ]
    with appending(path, {"seed": 0}, number):
        found = subprocess.run(second, capture_output=True, text=True, cwd=ROOT)
        assert found.returncode != 0
        assert (
            "rows.jsonl: another process is writing to it; wait for its end, or choose another --output_file"
            in found.stderr
        )
    assert subprocess.run(second, cwd=ROOT).returncode == 0
    assert finish(path) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fills_while_rows_are_written_keeps_the_whole_ones(tmp_path, monkeypatch, kind):
    path, write, calls = tmp_path / "rows.jsonl", os.write, []

    def fills(descriptor, content):
        calls.append(1)
        if len(calls) % 2 == 0:
            raise OSError(kind, os.strerror(kind))
        return write(descriptor, content[: len(content) // 2])

    with appending(path, {"seed": 0}, number) as file:
        file.append(ROWS[:1])
        monkeypatch.setattr(module.os, "write", fills)
        with pytest.raises(
            UserError, match=f"rows.jsonl: cannot be written: {os.strerror(kind)}. What was there before is"
        ):
            file.append(ROWS[1:3])
        monkeypatch.undo()
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS[:1]
    assert finish(path) == [0]


def test_the_processes_of_a_launch_append_to_one_file_and_another_command_waits_for_all_of_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    finish(path)

    def work(processes):
        with appending(path, {"seed": 0}, number, processes=processes) as file:
            assert file.found == [0, 1, 2, 3]
            for k in range(100):
                file.append([{"k": 4 + 100 * processes.rank + k, "text": "x" * k}])
            if processes.rank == 0:
                processes.barrier()
                return
            with pytest.raises(UserError, match="rows.jsonl: another process is writing to it"):
                finish(path)
            processes.barrier()
            with pytest.raises(UserError, match="rows.jsonl: another process is writing to it"):
                finish(path)  # the first process may have left

    launched(2, work)
    assert sorted(finish(path)) == list(range(204))


def test_a_row_that_a_killed_process_left_half_written_is_cut_by_the_next_one_that_writes(tmp_path):
    path = tmp_path / "rows.jsonl"

    def work(processes):
        with appending(path, {"seed": 0}, number, processes=processes) as file:
            if processes.rank == 0:
                file.append([ROWS[0]])
                os.write(file.descriptor, b'{"k": 7, "te')
            processes.barrier()
            if processes.rank == 1:
                file.append([ROWS[1]])

    launched(2, work)
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS[:2]


def test_processes_of_a_launch_that_read_other_things_are_told(tmp_path):
    def work(processes):
        options = {"prompts": f"hash {processes.rank}"}
        if processes.rank == 0:
            with appending(tmp_path / "rows.jsonl", options, number, processes=processes):
                return
        told = 'do not read the same: prompts "hash 0" in process 0, "hash 1" in process 1'
        with pytest.raises(UserError, match=told):
            appending(tmp_path / "rows.jsonl", options, number, processes=processes).__enter__()

    launched(2, work)
