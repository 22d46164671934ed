"""A file has its old content or its new one, and what is half-written goes."""

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
    (partial,) = (p for p in tmp_path.iterdir() if p != path)
    assert files.is_aside(partial) and not files.is_aside(path)
    monkeypatch.undo()
    files.write_whole(path, b"new content")
    assert path.read_bytes() == b"new content"


def test_names_aside_are_never_shared(tmp_path):
    assert files.aside(tmp_path / "a") != files.aside(tmp_path / "a")


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
