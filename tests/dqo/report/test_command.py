"""`dqo report`: one page from directories, written whole or not at all."""

import errno
import os

import pytest

from dqo import files
from dqo.api import report
from dqo.commands.report import report_command
from dqo.errors import UserError
from tests.dqo.report.stored import stored_run


def test_several_runs_become_one_self_contained_page(tmp_path, capsys):
    runs = [str(stored_run(tmp_path / f"{m}-{s}", method=m, seed=s)) for m in ("dqo", "kto") for s in (1, 2)]
    report_command([*runs, "--output_file", str(tmp_path / "new" / "page.html"), "--title", "Mine"])
    page = (tmp_path / "new" / "page.html").read_text()
    assert capsys.readouterr().out == f"report: {tmp_path / 'new' / 'page.html'}\n"
    assert "<h1>Mine</h1>" in page and page.count("<svg") > 4 and "<script" not in page
    assert os.listdir(tmp_path / "new") == ["page.html"]


def test_a_page_that_exists_stays_unless_it_may_be_replaced(tmp_path):
    run, page = stored_run(tmp_path / "a"), tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(UserError, match=r"page.html exists; choose another, or replace it with --overwrite"):
        report([run], page)
    assert page.read_text() == "old"
    assert report([run], page, overwrite=True) == page and "<h1>" in page.read_text()


def test_nothing_is_written_where_no_page_can_be(tmp_path):
    run = stored_run(tmp_path / "a")
    with pytest.raises(UserError, match="is a directory; name the page, such as"):
        report([run], tmp_path)
    with pytest.raises(UserError, match="no run to report; give one output_dir or more"):
        report([], tmp_path / "page.html")
    with pytest.raises(UserError, match="b does not exist"):
        report([run, tmp_path / "b"], tmp_path / "page.html")
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_a_full_disk_leaves_the_old_page_and_no_half_of_a_new_one(tmp_path, monkeypatch):
    run, page = stored_run(tmp_path / "a"), tmp_path / "page.html"
    page.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=f"{page}: cannot be written: No space left on device. What was there"):
        report([run], page, overwrite=True)
    assert page.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a", "page.html"]
