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
