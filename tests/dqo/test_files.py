"""A file has its old content or its new one, and what is half-written goes."""

import contextlib
import os
import time

import pytest

from dqo import files


def test_a_file_that_is_being_written_has_its_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_whole(path, b"old")
    monkeypatch.setattr(files.os, "fsync", lambda _: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        files.write_whole(path, b"new content")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    files.write_whole(path, b"new content")
    assert path.read_bytes() == b"new content"


def test_names_aside_are_never_shared(tmp_path):
    assert files.aside(tmp_path / "a") != files.aside(tmp_path / "a")

    assert files.is_aside(files.aside(tmp_path / "a")) and not files.is_aside(tmp_path / "a")


@pytest.mark.parametrize("before", [None, "a file", "a directory"])
@pytest.mark.parametrize("written", ["a file", "a directory"])
def test_what_is_written_takes_the_place_of_what_was_there_and_nothing_else_is_left(before, written, tmp_path):
    def put(path, kind, text):
        if kind == "a directory":
            path.mkdir()
            (path / f"{text}.txt").write_text(text)
        elif kind is not None:
            path.write_text(text)

    path = tmp_path / "a"
    put(path, before, "old")
    with contextlib.suppress(KeyError), files.replacing(path) as beside:
        put(beside, written, "half")
        raise KeyError
    assert path.exists() == (before is not None) and not list(tmp_path.rglob("*half*"))
    with files.replacing(path):
        pass  # as in a process that writes nothing
    assert path.exists() == (before is not None)
    if (before, written) == ("a directory", "a file"):
        return
    with files.replacing(path) as beside:
        put(beside, written, "new")
    assert list(tmp_path.iterdir()) == [path]
    assert [p.read_text() for p in ([path] if path.is_file() else path.iterdir())] == ["new"]


def test_what_is_half_written_is_deleted_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in ("a.txt", ".hidden", "b.partial")]
    for path in kept:
        path.write_text("x")
    old, fresh, folder = (files.aside(tmp_path / name) for name in ("old", "fresh", "folder"))
    old.write_text("x")
    fresh.write_text("x")
    os.utime(old, (time.time() - 100,) * 2)
    files.remove_asides(tmp_path, older_than=50)
    assert fresh.exists() and not old.exists()
    folder.mkdir()
    (folder / "inside").write_text("x")
    files.remove_asides(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize(
    "size, shown",
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 KB"), (13_600, "13.6 KB"), (2.5e9, "2.5 GB"), (7e15, "7e+03 TB")],
)
def test_sizes_are_shown_in_their_unit(size, shown):
    assert files.in_units(size) == shown


def test_the_room_is_that_of_the_nearest_folder_that_is_there(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return files.shutil._ntuple_diskusage(100, 90, 10)

    monkeypatch.setattr(files.shutil, "disk_usage", usage)
    files.check_room(tmp_path / "a" / "b", 10, "it needs", "free some")
    with pytest.raises(
        files.UserError, match=f"^{tmp_path}/a/b: it needs 11 bytes, and the disk has 10 bytes left; free some$"
    ):
        files.check_room(tmp_path / "a" / "b", 11, "it needs", "free some")
    assert asked == [tmp_path, tmp_path]
