"""dqo score: rewards are the verifier's, columns stay, a killed run goes on without a doubled or lost row."""

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dqo.api import score
from dqo.commands.score import score_command
from dqo.data.rows import read_rows
from dqo.errors import UserError
from tests.dqo.helpers import rollout_rows

GSM8K = [
    {"prompt": "a", "completion": "2+2=4\n#### 4", "answer": "4", "prompt_id": "first", "tests": [1, 2]},
    {"prompt": "a", "completion": "#### 5", "answer": "4", "prompt_id": "first", "finish_reason": "stop"},
    {"prompt": "b", "completion": "It is \\boxed{7}.", "answer": "7", "sampling": {"model": "m"}},
    {"prompt": "b", "completion": "#### 7 but then", "answer": "7", "finish_reason": "length"},
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_rewards_are_the_verifiers_and_all_columns_stay(place, capsys):
    data = write("rollouts.jsonl", GSM8K)
    score_command([data, "--verifier", "gsm8k", "--output_file", "scored.jsonl"])
    rows = read("scored.jsonl")
    assert [row["reward"] for row in rows] == [1.0, 0.0, 0.0, 0.0]
    assert [row["grading"]["outcome"] for row in rows] == ["right", "wrong", "unparsed", "cut"]
    assert [row["grading"].get("answer") for row in rows] == ["4", "5", None, None]
    assert [{k: v for k, v in row.items() if k not in ("reward", "grading")} for row in rows] == GSM8K
    assert [row.reward for row in read_rows("scored.jsonl")] == [1.0, 0.0, 0.0, 0.0]
    shown = capsys.readouterr().out
    for line in (
        "4 rows, mean reward 0.25",
        "right            1    25.0%",
        "unparsed         1    25.0%",
        "cut              1",
    ):
        assert line in shown
    assert "no answer was found in row 3: 'It is \\\\boxed{7}.'" in shown


def test_a_strict_verifier_that_reads_few_answers_is_told_of_the_flexible_one(place, capsys):
    data = write("rollouts.jsonl", [GSM8K[2]] * 3 + GSM8K[:1])
    score_command([data, "--verifier", "gsm8k", "--output_file", "a.jsonl"])
    assert "--verifier number takes it however it is written" in capsys.readouterr().out
    score_command([data, "--verifier", "number", "--output_file", "b.jsonl"])
    assert "--verifier number" not in capsys.readouterr().out
    assert [row["reward"] for row in read("b.jsonl")] == [1.0] * 4


def test_from_python_too_and_truncated_responses_when_that_is_asked_for(place):
    found = score(
        data=write("r.jsonl", GSM8K), verifier="number", output_file="s.jsonl", truncated="grade", processes=1
    )
    assert found.outcomes == {"right": 3, "wrong": 1, "unparsed": 0, "timeout": 0, "crash": 0}
    assert (found.rows, found.mean_reward) == (4, 0.75)


def test_messages_are_graded_by_their_content(place):
    rows = [
        {
            "prompt": [{"role": "user", "content": "2+2?"}],
            "completion": [{"role": "assistant", "content": text}],
            "answer": "4",
        }
        for text in ("#### 4", "#### 3")
    ]
    score(data=write("r.jsonl", rows), verifier="gsm8k", output_file="s.jsonl")
    assert [row["reward"] for row in read("s.jsonl")] == [1.0, 0.0]


def test_what_the_environment_wrote_is_no_answer_of_the_model(place, caplog):
    def turns(*texts):
        roles = ("assistant", "tool")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]

    asked = [{"role": "user", "content": "2+2?"}]
    completions = [turns("#### 3", "#### 4"), turns("?", "#### 4", "#### 3"), turns("?", "#### 3", "#### 4")]
    rows = [{"prompt": asked, "completion": completion, "answer": "4"} for completion in completions]
    score(data=write("r.jsonl", rows), verifier="gsm8k", output_file="s.jsonl")
    assert [row["reward"] for row in read("s.jsonl")] == [0.0, 0.0, 1.0]
    row = {"prompt": "2+2?", "completion": "#### 3\n#### 4", "answer": "4"}
    spans, mask = {"turn_spans": [[0, 7]]}, {"completion_ids": [3, 4], "env_mask": [1, 0]}
    score(data=write("r.jsonl", [row | spans, row]), verifier="gsm8k", output_file="t.jsonl")
    assert [row["reward"] for row in read("t.jsonl")] == [0.0, 1.0] and "env_mask" not in caplog.text
    score(data=write("r.jsonl", [row | mask]), verifier="gsm8k", output_file="u.jsonl")
    assert "1 completions are strings that only env_mask divides: what the environment wrote is graded" in caplog.text


@pytest.mark.parametrize(
    "options", [{"steps": "lines"}, {"prefix_values": 2, "steps": "lines", "model_name_or_path": "m"}]
)
def test_completions_of_several_turns_get_no_steps(place, options):
    data = write("r.jsonl", [GSM8K[0], GSM8K[0] | {"turn_spans": [[0, 3], [4, 7]]}])
    with pytest.raises(UserError, match=r"r.jsonl:2: its completion has turns .*, as 1 of 2 rows .* leave out --steps"):
        score(data=data, verifier="gsm8k", output_file="s.jsonl", **options)
    assert not Path("s.jsonl").exists()


def test_answers_may_lie_elsewhere(place):
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in GSM8K]
    write("answers.jsonl", [{"prompt_id": "first", "answer": "4"}, {"prompt": "b", "answer": 7}])
    score(data=write("r.jsonl", rows), verifier="gsm8k", output_file="s.jsonl", answers="answers.jsonl")
    assert [row["reward"] for row in read("s.jsonl")] == [1.0, 0.0, 0.0, 0.0]
    assert [row["answer"] for row in read("s.jsonl")] == ["4", "4", "7", "7"]


@pytest.mark.parametrize(
    "answers, said",
    [
        ([{"prompt_id": "first", "answer": "4"}], r"r.jsonl:3: answers.jsonl has no answer for its prompt_id or prompt \(the"),
        ([{"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"}], "answers.jsonl:2: answer is '2', and a line"),
        ([{"answer": "1"}], "answers.jsonl:1: has neither prompt_id nor prompt; found answer"),
        ([{"prompt": "a", "answer": None}], r"answers.jsonl:1: has no answer \(a string\); found prompt"),
    ],
)  # fmt: skip
def test_answers_that_do_not_fit_are_named(place, answers, said):
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in GSM8K]
    write("answers.jsonl", answers)
    with pytest.raises(UserError, match=said):
        score(data=write("r.jsonl", rows), verifier="gsm8k", output_file="s.jsonl", answers="answers.jsonl")
    assert not Path("s.jsonl").exists()


def test_two_answers_to_one_row_are_refused(place):
    write("answers.jsonl", [{"prompt": "a", "answer": "9"}, {"prompt": "b", "answer": "7"}])
    with pytest.raises(UserError, match="r.jsonl:1: answer is '4', and answers.jsonl has '9'; drop one of them"):
        score(data=write("r.jsonl", GSM8K), verifier="gsm8k", output_file="s.jsonl", answers="answers.jsonl")


@pytest.mark.parametrize(
    "options, said",
    [
        (
            {"verifier": "gsm9k"},
            "verifier must be one of gsm8k, number, math, arith, or python:module:function, got gsm9k",
        ),
        ({"verifier": "python:nothing:f"}, "python:nothing:f: Python finds no module nothing"),
        ({"verifier": None}, "verifier is missing: what grades the responses"),
        ({"output_file": None}, "output_file is missing"),
        ({"output_file": "r.jsonl"}, "output_file r.jsonl is the file that is scored; choose another"),
        ({"output_file": "s.csv"}, "s.csv: rows are written as JSON Lines; name the file .jsonl"),
        ({"processes": 0}, "processes must be at least 1, got 0"),
        ({"timeout": 0.0}, "timeout must be positive, got 0.0"),
        ({"steps": "words"}, "steps must be one of lines, sentences, or python:module:function, got words"),
        ({"steps": "python:nothing:f"}, "python:nothing:f: Python finds no module nothing"),
        ({"share": 0.5}, "share must be left out without prefix_values, for which it is, got 0.5"),
        ({"prefix_values": 4}, "model_name_or_path must be given with prefix_values"),
        (
            {"prefix_values": 4, "model_name_or_path": "m"},
            r"r.jsonl:1: has no steps, .* \(4 of 4 rows have none\); give --steps lines",
        ),
        ({"prefix_values": 4, "model_name_or_path": "m", "share": 1.5}, "share must be in .0, 1., got 1.5"),
        (
            {"prefix_values": 4, "model_name_or_path": "m", "temperature": 0.0},
            "temperature must be at least 1e-06: pass",
        ),
        (
            {"prefix_values": 4, "model_name_or_path": "m", "prefix_cache": "./s.jsonl"},
            "prefix_cache ./s.jsonl is the output_file too; choose another",
        ),
        ({"data": "none.jsonl"}, "none.jsonl: no such file"),
        ({"verifer": "x"}, "unknown option 'verifer'. Did you mean 'verifier'"),
        (
            {"data": "half.jsonl"},
            "half.jsonl: 2 of 3 rows do not fit:\n.*half.jsonl:2: column 'note' is \".*\", which JSON cannot hold; write it as "
            "a string, or drop the column\n.*half.jsonl:3: column 'weight' is NaN",
        ),
        ({"data": "dates.parquet"}, "dates.parquet:1: column 'when' is .*2020.*, which JSON cannot hold"),
        (
            {"data": "bad.jsonl"},
            "bad.jsonl:2: the reference answer 'four' is no number\nthe verifier gsm8k cannot grade by it",
        ),
    ],
)
def test_options_and_rows_that_do_not_fit_are_named_before_anything_is_written(place, options, said):
    write("bad.jsonl", [GSM8K[0], GSM8K[1] | {"answer": "four"}])
    write("half.jsonl", [GSM8K[0], GSM8K[1] | {"note": "\ud83d"}, GSM8K[2] | {"weight": float("nan")}])
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    dated = {"prompt": ["a"], "completion": ["b"], "answer": ["4"], "when": [datetime.date(2020, 1, 2)]}
    parquet.write_table(pyarrow.table(dated), "dates.parquet")
    given = {"data": write("r.jsonl", GSM8K), "verifier": "gsm8k", "output_file": "s.jsonl"} | options
    before = sorted(Path().iterdir())
    with pytest.raises(UserError, match=said):
        score(**given)
    assert sorted(Path().iterdir()) == before


def test_rewards_that_are_there_are_replaced_or_kept_only_when_told(place):
    data = write("r.jsonl", [GSM8K[0] | {"reward": 0.25, "label": True}, GSM8K[1]])
    with pytest.raises(UserError, match=r"r.jsonl:1: has reward already, as 1 of 2 rows .*; --existing_rewards keep"):
        score(data=data, verifier="gsm8k", output_file="s.jsonl")
    kept = score(data=data, verifier="gsm8k", output_file="kept.jsonl", existing_rewards="keep")
    assert kept.outcomes["kept"] == 1 and kept.outcomes["wrong"] == 1
    assert [(row["reward"], row.get("label")) for row in read("kept.jsonl")] == [(0.25, True), (0.0, None)]
    score(data=data, verifier="gsm8k", output_file="new.jsonl", existing_rewards="replace")
    assert [(row["reward"], row.get("label")) for row in read("new.jsonl")] == [(1.0, None), (0.0, None)]


def test_steps_are_written_and_step_rewards_are_not_overwritten(place):
    score(data=write("r.jsonl", GSM8K), verifier="gsm8k", output_file="s.jsonl", steps="lines")
    assert [row["steps"] for row in read("s.jsonl")] == [[[0, 6], [6, 12]], [[0, 6]], [[0, 16]], [[0, 15]]]
    data = write("old.jsonl", [GSM8K[0] | {"step_rewards": [0.5, 0.5]}])
    with pytest.raises(
        UserError, match="old.jsonl:1: has step_rewards already, .* --existing_rewards replace makes them again"
    ):
        score(data=data, verifier="gsm8k", output_file="t.jsonl", steps="sentences")
    score(data=data, verifier="gsm8k", output_file="t.jsonl", steps="sentences", existing_rewards="replace")
    assert "step_rewards" not in read("t.jsonl")[0]


BAD = """
import os, time
def grade(completion, row):
    time.sleep(row.get("seconds", 0))
    done = {"crash": os.abort, "hang": lambda: time.sleep(99), "nan": lambda: float("nan")}
    return done.get(completion, lambda: row["weight"])()
"""


def test_a_verifier_of_the_users_gets_all_columns_and_its_failures_are_counted(place, capsys):
    (place / "own_grader.py").write_text(BAD)
    rows = [{"prompt": "p", "completion": text, "weight": 0.75} for text in ("a", "crash", "hang", "nan", "b")]
    data = write("r.jsonl", rows)
    arguments = ["--verifier", "python:own_grader:grade", "--timeout", "0.5", "--output_file", "s.jsonl"]
    score_command([data, *arguments])
    assert [row["reward"] for row in read("s.jsonl")] == [0.75, 0.0, 0.0, 0.0, 0.75]
    errors = [row["grading"].get("error") for row in read("s.jsonl")]
    assert errors[1:3] == ["crash: the process was killed by SIGABRT", "timeout"] and "nan" in errors[3]
    shown = capsys.readouterr().out
    assert "timeout          1    20.0%" in shown and "crash            2    40.0%" in shown


def test_a_killed_run_goes_on_and_no_row_is_lost_or_doubled(place):
    (place / "own_grader.py").write_text(BAD)
    rows = [{"prompt": f"p{i}", "completion": "a", "weight": i / 100, "seconds": 0.02} for i in range(160)]
    data = write("r.jsonl", rows)
    command = [
        sys.executable,
        "-m",
        "dqo",
        "score",
        data,
        "--verifier",
        "python:own_grader:grade",
        "--output_file",
        "s.jsonl",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(place), *sys.path])}
    kills, sizes = 0, []
    while True:
        running = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        size = Path("s.jsonl").stat().st_size if Path("s.jsonl").exists() else 0
        while running.poll() is None and kills < 1:
            if Path("s.jsonl").exists() and Path("s.jsonl").stat().st_size > size:
                os.kill(running.pid, signal.SIGKILL)
                running.wait()
                kills += 1
                with open("s.jsonl", "ab") as file:  # as if it had been in the middle of a line
                    file.write(b'{"prompt": "p')
                break
            time.sleep(0.02)
        out, error = running.communicate()
        if running.returncode != -signal.SIGKILL:
            break
        sizes.append(Path("s.jsonl").stat().st_size)
    assert running.returncode == 0, error
    assert kills == 1 and 0 < sizes[0] < Path("s.jsonl").stat().st_size
    assert [row["reward"] for row in read("s.jsonl")] == [row["weight"] for row in rows]
    assert b"160 rows, mean reward" in out
    whole = Path("s.jsonl").read_bytes()
    score_command(command[4:])  # nothing is left to do
    assert Path("s.jsonl").read_bytes() == whole
    with pytest.raises(UserError, match="s.jsonl: was begun under other options: truncated .wrong. then, .grade. now"):
        score_command([*command[4:], "--truncated", "grade"])
    (place / "own_grader.py").write_text(BAD + "\n")
    with pytest.raises(UserError, match="source of verifier"):
        score_command(command[4:])
    write("r.jsonl", rows[1:])
    with pytest.raises(UserError, match="other options: data"):
        score_command(command[4:])


def test_the_demonstrations_rows_are_scored_as_the_demonstration_scored_them(place):
    rows = rollout_rows()
    bare = [{k: v for k, v in row.items() if k != "reward"} for row in rows]
    score(data=write("r.jsonl", bare), verifier="arith", output_file="s.jsonl")
    assert [row["reward"] for row in read("s.jsonl")] == [row["reward"] for row in rows]
