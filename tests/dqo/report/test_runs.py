"""A run's directory as the report reads it: whole, half, damaged, or none at all."""

import json

import pytest
import yaml

from dqo.errors import UserError
from dqo.report.build import report_of
from dqo.report.runs import read_run
from tests.dqo.report.stored import credited_row, stored_run


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


def altered(path, change):
    """The run with its JSON file changed: an object, or the first row of several."""
    first, newline, rest = path.read_text().partition("\n") if path.suffix == ".jsonl" else (path.read_text(), "", "")
    found = json.loads(first)
    change(found)
    path.write_text(json.dumps(found) + newline + rest)
    return path.parent


@pytest.mark.parametrize("value", [None, "x", 3, [], {}, True])
@pytest.mark.parametrize(
    "name",
    ["created", "commands", "phases", "data", "model", "parameters", "versions", "seconds", "cpu_seconds", "files"],
)
def test_a_record_of_other_types_is_named_or_makes_a_page(tmp_path, name, value):
    path = stored_run(tmp_path / "a") / "run.json"
    try:
        read_run(altered(path, lambda record: record.update({name: value})))
    except UserError as error:
        assert str(error).startswith(f"{path}: {name} ") and str(error).endswith("the page does without it")
        path.unlink()
        assert read_run(path.parent).record == {}
    else:
        assert type(value) is type(json.loads((stored_run(tmp_path / "b") / "run.json").read_text())[name]) or name in (
            "seconds",
            "cpu_seconds",
        )


@pytest.mark.parametrize("name, key", [("data", "of"), ("data", "sha256"), ("model", "sha256"), (None, "made")])
def test_a_record_that_lacks_a_part_is_named(tmp_path, name, key):
    path = stored_run(tmp_path / "a") / "run.json"
    with pytest.raises(UserError, match=f"run.json: .*{key}.*, not as a run writes it; delete it"):
        read_run(altered(path, lambda record: (record if name is None else record[name]).pop(key)))


@pytest.mark.parametrize("file", ["answers.jsonl", "held_out.jsonl"])
def test_rows_of_other_types_are_named_with_their_line(tmp_path, file):
    row = json.loads((stored_run(tmp_path / "run") / file).read_text().partition("\n")[0])
    parts = [(one,) for one in row if one != "source"] + [(w, k) for w in ("before", "after") for k in row.get(w, ())]
    for number, (*outer, name) in enumerate(parts):
        path = stored_run(tmp_path / str(number)) / file

        def change(row, outer=outer, name=name):
            (row[outer[0]] if outer else row)[name] = None

        with pytest.raises(UserError, match=rf"{file}:1: not a row that a run writes"):
            read_run(altered(path, change))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 3},
        {"steps": None},
        {"first_wrong_step": 4},
        {"first_wrong_step": "1"},
        {"step_ratios": [0.0, 0.0, 0.0, None]},
        {"step_values": 0.5},
        {"ratio": []},
    ],
    ids=str,
)
def test_scores_of_steps_of_other_shapes_are_named_with_their_line(tmp_path, change):
    path = stored_run(tmp_path / "a") / "held_out.jsonl"
    rows = [credited_row(i) for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(path.parent).held_out == rows
    for broken in (change, dict.fromkeys(change)):
        if broken != {"first_wrong_step": None}:
            rows[1] = credited_row(1) | broken
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            with pytest.raises(UserError, match="held_out.jsonl:2: not a row that a run writes"):
                read_run(path.parent)
    rows[1] = {name: value for name, value in credited_row(1).items() if name not in change}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="held_out.jsonl:2: not "):
        read_run(path.parent)


def test_rows_that_differ_in_what_they_have_are_named(tmp_path):
    path = stored_run(tmp_path / "a") / "answers.jsonl"
    with pytest.raises(UserError, match=r"answers.jsonl:2: not as its first row"):
        read_run(altered(path, lambda row: row["after"]["sampling"].append(1)))
    path = stored_run(tmp_path / "b") / "held_out.jsonl"
    with pytest.raises(UserError, match=r"held_out.jsonl:2: not as its first row"):
        read_run(altered(path, lambda row: row.pop("value_half")))


def test_a_directory_in_the_place_of_a_file_is_named(tmp_path):
    for name in ("metrics.jsonl", "run.json", "answers.jsonl"):
        path = stored_run(tmp_path / name) / name
        path.unlink()
        path.mkdir()
        with pytest.raises(UserError, match=f"{name}: cannot be read: Is a directory"):
            read_run(path.parent)


@pytest.mark.parametrize("name, value", [("seed", None), ("seed", "x"), ("method", 3), ("max_steps", "many")])
def test_options_of_another_type_are_named(tmp_path, name, value):
    path = stored_run(tmp_path / "a")
    options = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump(options | {name: value}))
    with pytest.raises(UserError, match=f"config.yaml: {name} is .*; the file was altered"):
        read_run(path)


def test_a_string_that_a_callback_logged_is_no_point_of_a_curve(tmp_path):
    path = stored_run(tmp_path / "a")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    odd = [row | {name: "n/a" for name in ("loss", "eval_loss") if name in row} for row in rows]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    found = report_of([read_run(path)])
    assert all(y is None for curve in found["curves"] if curve["name"] == "loss" for y in curve["y"])
    assert "Held-out KL" in [change["name"] for change in found["changes"]]
