"""`dqo inspect` as a user types it."""

import pytest

from dqo import api
from dqo.commands.base import dqo_command
from dqo.errors import UserError
from tests.dqo.inspection.stored import make_run, rows_with_steps, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    make_run(folder, critic=False)
    write_rows(folder / "rows.jsonl", rows_with_steps())
    return folder


def call(place, *more):
    dqo_command(["inspect", str(place / "out"), "--dataset_name", str(place / "rows.jsonl"), *more])


def test_the_terminal_shows_what_was_asked_for_in_colours_only_where_they_are_wanted(place, capsys, monkeypatch):
    call(place, "--rows", "2", "4-5", "--by", "kl")
    shown = capsys.readouterr().out
    assert [f"rows.jsonl:{line}:" in shown for line in (1, 2, 3, 4, 5)] == [False, True, False, True, True]
    assert "tokens by KL" in shown and "\x1b" not in shown
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    call(place, "--rows", "2")
    assert "\x1b[30;48;5;" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    call(place, "--rows", "2")
    assert "\x1b" not in capsys.readouterr().out


def test_a_page_is_written_and_named(place, capsys, tmp_path):
    call(place, "--output_file", str(tmp_path / "page.html"))
    assert f"page: {tmp_path / 'page.html'}" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_a_view_that_the_run_does_not_have_and_wrong_options_are_refused(place, capsys):
    with pytest.raises(UserError, match="by value: .*out has no value model; choose one of advantage, soft_value, kl"):
        call(place, "--by", "value")
    with pytest.raises(UserError, match="responses must be at least 1, got 0"):
        call(place, "--responses", "0")
    assert api.inspect(place / "out", place / "rows.jsonl", responses=1).responses[0].source == "rows.jsonl:2"
