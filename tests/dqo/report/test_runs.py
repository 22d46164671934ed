"""A run's directory as the report reads it: whole, half, damaged, or none at all."""

import json

import pytest

from dqo.errors import UserError
from dqo.report.runs import read_run
from tests.dqo.report.stored import stored_run


def test_a_finished_run_is_read_whole(tmp_path):
    run = read_run(stored_run(tmp_path / "a", seed=7, beta=0.3))
    assert (run.method, run.seed, run.step, run.steps, run.warmup) == ("dqo", 7, 8, 8, 2)
    assert run.finished and run.state == "finished"
    assert len(run.answers) == 4 and len(run.held_out) == 20
    changed = run.changed()
    assert changed["beta"] == 0.3 and "learning_rate" not in changed and "lam" not in changed


def test_a_run_that_has_not_finished_says_how_far_it_is(tmp_path):
    run = read_run(stored_run(tmp_path / "a", finished=False, rows=2, steps=9))
    assert run.state == "not finished: step 4 of 9" and not run.answers and not run.held_out


def test_a_run_without_a_record_is_read_from_its_options_and_metrics(tmp_path):
    run = read_run(stored_run(tmp_path / "a", finished=False, record=False))
    assert run.record == {} and run.warmup == 0 and run.state == "not finished: step 8 of 8"
    (run.directory / "report.json").write_text("{}")  # as earlier versions ended
    assert read_run(run.directory).finished


def test_a_run_that_never_logged_is_read_too(tmp_path):
    path = stored_run(tmp_path / "a", finished=False)
    (path / "metrics.jsonl").unlink()
    assert read_run(path).state == "not finished: step 0 of 8"


@pytest.mark.parametrize("left", range(1, 20))
def test_a_last_line_that_is_being_written_is_left_out(tmp_path, left):
    path = stored_run(tmp_path / "a", finished=False)
    whole = (path / "metrics.jsonl").read_bytes()
    (path / "metrics.jsonl").write_bytes(whole + b'{"step": 10, "loss": 0.5}'[:left])
    assert read_run(path).metrics == [json.loads(line) for line in whole.splitlines()]


@pytest.mark.parametrize("file", ["metrics.jsonl", "answers.jsonl", "held_out.jsonl"])
@pytest.mark.parametrize("line", [b"{", b"[1]", b"{}", b'"text"', b"\xff", b"[" * 100_000], ids=ascii)
def test_a_damaged_line_is_named_with_its_file(tmp_path, file, line):
    path = stored_run(tmp_path / "a")
    lines = (path / file).read_bytes().splitlines(keepends=True)
    lines[2] = line + b"\n"
    (path / file).write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=rf"{file}:3: not a row that a run writes; the file was altered"):
        read_run(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_record_is_named_with_the_cure(tmp_path, text):
    path = stored_run(tmp_path / "a")
    (path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json: no(t JSON| object).*delete it, and the page does without it"):
        read_run(path)


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "\x00"])
def test_damaged_options_are_named(tmp_path, text):
    path = stored_run(tmp_path / "a")
    (path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml: (not a mapping of options|cannot be read)"):
        read_run(path)


def test_what_is_no_run_is_refused_with_the_runs_that_lie_in_it(tmp_path):
    stored_run(tmp_path / "runs" / "one")
    with pytest.raises(UserError, match=r"runs holds no run \(it has no config.yaml\); runs are in it: one"):
        read_run(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no run .*; give the output_dir of a run"):
        read_run(tmp_path / "empty")
    with pytest.raises(UserError, match="absent does not exist"):
        read_run(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"):
        read_run(tmp_path / "file")
