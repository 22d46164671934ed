"""The command: formats, options, summary."""

import json
from pathlib import Path

import pytest

from dqo.commands.base import dqo_command
from dqo.convert import entry
from dqo.convert.entry import FORMATS, as_messages, convert, summary
from dqo.data.rows import Row, read_rows
from dqo.errors import UserError

SAMPLES = Path(__file__).parents[4] / "shared" / "data" / "process_samples"
KTO = {"prompt": "The sky is", "completion": " blue", "label": True}
SHEPHERD = "How? Step 1: 1+1 = <<1+1=2>>2 ки\nStep 2: 2+1 = 3. The answer is: 3 ки"


def test_formats_are_the_files_of_the_folder_and_each_has_its_test():
    helpers = {"__init__", "entry", "source"}
    files = {path.stem for path in Path(entry.__file__).parent.glob("*.py")} - helpers
    assert {function.__module__ for function in FORMATS.values()} == {f"dqo.convert.{name}" for name in files}
    assert {path.stem for path in Path(__file__).parent.glob("test_*.py")} >= {f"test_{name}" for name in files}


def test_convert_is_what_the_package_hands_out():
    from dqo.convert import convert as handed_out

    assert handed_out is convert
    with pytest.raises(ImportError, match="cannot import name 'converted'"):
        from dqo.convert import converted  # noqa: F401


def written(folder, *rows, name="source.jsonl"):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_missing_source_and_an_unknown_format_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl: no such file"):
        convert("gsm8k-solutions", tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"unknown format 'gsm8k-solution';.* Did you mean 'gsm8k-solutions'"):
        convert("gsm8k-solution", tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_refuses_rows_of_another_and_says_what_it_found(format, tmp_path):
    source = written(tmp_path, {"text": "neither"})
    with pytest.raises(UserError, match=r"source.jsonl.*\n?.*found text|source.jsonl:1: .* expected"):
        convert(format, source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_prints_the_summary_and_its_help_the_formats(tmp_path, capsys):
    source = written(tmp_path, KTO, KTO | {"completion": " red", "label": False})
    dqo_command(["convert", "trl-kto", str(source), str(tmp_path / "out.jsonl")])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed == {
        "rows": "2",
        "problems": "1",
        "problems_with_mixed_rewards": "1",
        "correct": "0.5",
        "not_ended": "0",
    }
    with pytest.raises(SystemExit):
        dqo_command(["convert", "--help"])
    helped = capsys.readouterr().out
    assert not [format for format in FORMATS if format not in helped]


def test_messages_wrap_strings_and_keep_the_spans(tmp_path):
    source = written(tmp_path, {"input": SHEPHERD, "label": SHEPHERD.replace("ки", "+")})
    convert("math-shepherd", source, tmp_path / "out.jsonl", messages=True)
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert row.prompt == [{"role": "user", "content": "How?"}]
    assert row.completion[0]["role"] == "assistant"
    content = row.completion[0]["content"]
    assert [content[a:b] for a, b in row.steps] == ["Step 1: 1+1 = <<1+1=2>>2\n", "Step 2: 2+1 = 3. The answer is: 3"]
    assert as_messages(row) == row


def test_annotations_leave_any_format(tmp_path):
    source = written(tmp_path, {"input": SHEPHERD, "label": SHEPHERD.replace("ки", "+")})
    convert("math-shepherd", source, tmp_path / "out.jsonl", keep_annotations=False)
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert row.completion == "Step 1: 1+1 = 2\nStep 2: 2+1 = 3. The answer is: 3"
    assert row.steps == [(0, 16), (16, len(row.completion))]


def test_annotations_stay_where_token_ids_hold_them(tmp_path):
    source = written(tmp_path, KTO | {"completion_ids": [1, 2]})
    with pytest.raises(UserError, match="has completion_ids, which annotations cannot be taken out of"):
        convert("trl-kto", source, tmp_path / "out.jsonl", keep_annotations=False)


def test_an_option_of_another_format_is_refused(tmp_path):
    with pytest.raises(UserError, match="step_penalty is an option of gsm8k-solutions; trl-kto has"):
        convert("trl-kto", written(tmp_path, KTO), tmp_path / "out.jsonl", step_penalty=0.5)


def test_the_summary_counts_rows_prompts_steps_and_ends():
    rows = [
        Row("p", "a", reward=1.0, label=True, steps=[(0, 1)], step_rewards=[0.5]),
        Row("p", "b", reward=0.0, label=False, finish_reason="length", steps=[(0, 1)], step_rewards=[-1.0]),
        Row("q", "c", reward=1.0, label=True),
    ]
    assert summary(rows) == {
        "rows": 3,
        "problems": 2,
        "problems_with_mixed_rewards": 1,
        "correct": 2 / 3,
        "not_ended": 1,
        "steps": 2,
        "step_rewards": "-1 to 0.5, mean -0.25",
    }


def test_parquet_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([KTO]), tmp_path / "source.parquet")
    assert convert("trl-kto", tmp_path / "source.parquet", tmp_path / "out.jsonl")["rows"] == 1
    assert read_rows(tmp_path / "out.jsonl")[0].completion == " blue"


STEP = {"completions": [{"text": "a # Answer\n2", "rating": 1, "flagged": False}], "human_completion": None}
WHOLE = {
    "gsm8k-solutions": {"question": "q", "ground_truth": "A: 1", "m": {"solution": "A: 1", "is_correct": True}},
    "prm800k": {
        "question": {"problem": "q", "ground_truth_answer": "2"},
        "label": {"steps": [STEP | {"chosen_completion": 0}], "finish_reason": "solution"},
    },
    "math-shepherd": {
        "input": "q Step 1: a. The answer is: 2 ки",
        "label": "q Step 1: a. The answer is: 2 +",
        "task": "MATH",
    },
    "math-aps": {
        "question": "q",
        "final_answer": "2",
        "reasoning_steps": [{"solution_prefix": "q\n\\boxed{2}", "mc_value": 1.0}],
    },
    "trl-preference": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "trl-kto": KTO,
    "trl-stepwise": {"prompt": "p", "completions": ["a", "b"], "labels": [True, True]},
    "oreo": {"prompt": "p", "response": "a", "reward": 1.0},
    "open-r1": {
        "problem": "q",
        "generations": ["a"],
        "correctness_math_verify": [True],
        "finish_reasons": ["stop"],
        "uuid": "u",
    },
    "verl": {
        "data_source": "d",
        "prompt": [{"role": "user", "content": "q"}],
        "reward_model": {"ground_truth": "2"},
        "extra_info": {"index": 1},
        "responses": ["#### 2"],
        "scores": [1.0],
    },
    "vllm": {
        "prompt": "q",
        "prompt_token_ids": [4],
        "outputs": [{"text": "a", "token_ids": [5], "logprobs": [{"5": {"logprob": -1.0}}], "finish_reason": "stop"}],
        "rewards": [1.0],
    },
}


def places(value, path=()):
    """Every path into a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def spoilt(value, path, wrong):
    if not path:
        return wrong
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = spoilt(value[path[0]], path[1:], wrong)
    return copied


@pytest.mark.parametrize("format", FORMATS)
def test_whatever_stands_in_a_field_the_rows_pass_every_check_or_the_source_is_refused(format, tmp_path):
    """Every value inside a row is replaced by values of every other kind."""
    assert convert(format, written(tmp_path, WHOLE[format]), tmp_path / "out.jsonl")["rows"] >= 1
    refused = 0
    for path in [path for path in places(WHOLE[format]) if path]:
        for wrong in (None, True, -1.5, "", "text", [], [None], ["text"], {}, {"text": 1}):
            source = written(tmp_path, WHOLE[format], spoilt(WHOLE[format], path, wrong))
            try:
                convert(format, source, tmp_path / "out.jsonl")
                read_rows(tmp_path / "out.jsonl", scored=format != "vllm")  # whose outputs may have no rewards
            except UserError as error:
                assert "source.jsonl" in str(error), (path, wrong)
                refused += 1
            except Exception as error:
                raise AssertionError(f"{path} = {wrong!r}") from error
    assert refused


@pytest.mark.parametrize(
    "format, rows, correct, not_ended",
    [("prm800k", 35, 9, 26), ("math-shepherd", 7, 0, 0), ("math-aps", 124, 115, 8)],
)
def test_published_rows_become_rows_that_pass_every_check(format, rows, correct, not_ended, tmp_path):
    source = SAMPLES / f"samples_{format}.jsonl"
    if not source.exists():
        pytest.skip("the sample rows are not beside the project")
    summary = convert(format, source, tmp_path / "out.jsonl")
    read = read_rows(tmp_path / "out.jsonl")
    assert len(read) == summary["rows"] == rows
    assert sum(row.label for row in read) == correct
    assert summary["not_ended"] == not_ended
    assert all(row.step_rewards is not None for row in read)
