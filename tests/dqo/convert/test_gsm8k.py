import json
import logging
from pathlib import Path

import pytest

from dqo.convert import gsm8k as convert_gsm8k
from dqo.convert.entry import convert
from dqo.convert.gsm8k import without_annotations
from dqo.data.rows import Row, read_rows
from dqo.data.together import check_contrast
from dqo.errors import UserError

SOLUTIONS = Path(__file__).parents[4] / "shared" / "data" / "gsm8k" / "example_model_solutions.jsonl"

RIGHT = "9 * 2 = $<<9*2=18>>18\nA: 18"
WRONG = "9 * 2 = $<<9*2=11>>11\n<<11+x=12>>12 and <<11+1=12>>12\nA: 12"
CUT = "first 9 * 2 = $<<9*2=18>>18\nthen <<18+"
PROBLEM = {
    "question": "How much?",
    "ground_truth": "9 * 2 = $<<9*2=18>>18\nA: 18",
    "small": {"solution": WRONG, "is_correct": False},
    "large": {"solution": RIGHT, "is_correct": True},
}


def convert_gsm8k_solutions(source, **options):
    return convert_gsm8k.convert_gsm8k_solutions(source, **options).rows


def write(folder, *lines) -> Path:
    path = folder / "solutions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_problem_becomes_one_row_a_model(tmp_path):
    wrong, right = convert_gsm8k_solutions(write(tmp_path, PROBLEM))
    assert right == Row(
        prompt="How much?\n",
        completion=RIGHT,
        reward=1.0,
        label=True,
        steps=[(0, 22), (22, 27)],
        step_rewards=[0.0, 0.0],
        finish_reason="stop",
        answer="18",
        prompt_id="gsm8k/test/1",
        sampling={"model": "large"},
        source="solutions.jsonl:1",
    )
    assert (wrong.reward, wrong.label, wrong.sampling) == (0.0, False, {"model": "small"})


def test_only_lines_with_a_wrong_annotation_are_penalised(tmp_path):
    wrong, _ = convert_gsm8k_solutions(write(tmp_path, PROBLEM))
    assert wrong.step_rewards == [-0.5, 0.0, 0.0]
    wrong, _ = convert_gsm8k_solutions(write(tmp_path, PROBLEM), step_penalty=2.0)
    assert wrong.step_rewards == [-2.0, 0.0, 0.0]


@pytest.mark.parametrize("penalty", [-0.5, float("nan"), float("inf")])
def test_a_penalty_that_is_none_is_refused(penalty, tmp_path):
    with pytest.raises(UserError, match=f"step_penalty must be a finite number from 0 up, got {penalty}"):
        convert_gsm8k_solutions(write(tmp_path, PROBLEM), step_penalty=penalty)


@pytest.mark.parametrize(
    ("solution", "finish_reason"),
    [(CUT, "length"), (RIGHT, "stop"), ("A:", "stop"), ("25", "stop"), ("2 a", "length"), ("A: 2\n", "stop")],
)
def test_a_solution_without_an_answer_was_cut(solution, finish_reason, tmp_path):
    problem = PROBLEM | {"small": {"solution": solution, "is_correct": False}}
    assert convert_gsm8k_solutions(write(tmp_path, problem))[0].finish_reason == finish_reason


@pytest.mark.parametrize(("truth", "answer"), [("A: 1,234", "1234"), ("A: $-7.", "-7"), ("A: 0.25", "0.25")])
def test_the_answer_is_the_reference_number(truth, answer, tmp_path):
    assert convert_gsm8k_solutions(write(tmp_path, PROBLEM | {"ground_truth": truth}))[0].answer == answer


def test_empty_solutions_are_left_out_and_counted(tmp_path, caplog):
    empty = PROBLEM | {"small": {"solution": " \n", "is_correct": False}}
    with caplog.at_level(logging.WARNING):
        rows = convert_gsm8k_solutions(write(tmp_path, PROBLEM, empty))
    assert len(rows) == 3
    assert "1 empty solutions are left out" in caplog.text


BAD = {
    "JSON": ("{", "not valid JSON"),
    "question": (PROBLEM | {"question": 3}, "question is 3; expected a string"),
    "ground_truth": ({"question": "q"}, "ground_truth is null; expected a string"),
    "answer": (PROBLEM | {"ground_truth": "A: many"}, 'ground_truth ends in "A: many"; expected a line'),
    "solution": (PROBLEM | {"small": {"is_correct": True}}, "small.solution is null; expected a string"),
    "is_correct": (PROBLEM | {"small": {"solution": "A: 1", "is_correct": 1}}, "is_correct is 1; "),
    "no solutions": ({"question": "q", "ground_truth": "A: 1"}, "has no solutions; expected such as"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_line_of_another_form_is_refused_with_its_number_and_field(name, tmp_path):
    line, part = BAD[name]
    with pytest.raises(UserError) as caught:
        convert_gsm8k_solutions(write(tmp_path, PROBLEM, line))
    assert str(caught.value).startswith("solutions.jsonl:2: ")
    assert part in str(caught.value)


def test_a_source_of_empty_solutions_only_writes_nothing(tmp_path):
    empty = {**PROBLEM, "small": {"solution": "", "is_correct": False}}
    del empty["large"]
    with pytest.raises(UserError, match="no response is left to write"):
        convert("gsm8k-solutions", write(tmp_path, empty), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_annotations_are_removed_and_steps_keep_to_their_lines():
    only_annotation = "<<1+1=2>>\n"
    text = f"½ of <<4/2=2>>2 is <<2/2=1>>1\n{only_annotation}A: 1 <<2"
    steps = [(0, 30), (30, 40), (40, len(text))]
    row = without_annotations(Row("p", text, reward=1.0, steps=steps, step_rewards=[0.0, -0.5, 0.0]))
    assert [row.completion[a:b] for a, b in row.steps] == ["½ of 2 is 1\n", only_annotation, "A: 1 <<2"]
    assert row.step_rewards == [0.0, -0.5, 0.0]
    assert without_annotations(Row("p", "<<1+1=2>>2 eggs", reward=1.0)) == Row("p", "2 eggs", reward=1.0)


def test_the_summary_counts_what_the_file_holds(tmp_path):
    misgraded = PROBLEM | {
        "question": "And now?",
        "small": {"solution": CUT, "is_correct": False},
        "large": {"solution": "A: 18", "is_correct": False},
    }
    summary = convert("gsm8k-solutions", write(tmp_path, PROBLEM, misgraded), tmp_path / "out.jsonl")
    assert summary == {
        "rows": 4,
        "problems": 2,
        "problems_with_mixed_rewards": 1,
        "correct": 0.25,
        "not_ended": 1,
        "steps": 8,
        "step_rewards": "-0.5 to 0, mean -0.0625",
        "correct_by_model": {"small": 0.0, "large": 0.5},
        "lines_checked": 3,
        "annotations": 6,
        "wrong_annotations": 1,
        "unparsed_annotations": 2,
        "rows_with_wrong_annotations": 1,
        "grading_agreement": 0.75,
        "grading_disagreements": 1,
    }
    assert len(read_rows(tmp_path / "out.jsonl")) == 4


def test_the_published_solutions_become_rows_that_pass_every_check(tmp_path):
    if not SOLUTIONS.exists():
        pytest.skip("GSM8K is not beside the project")
    destination = tmp_path / "gsm8k.jsonl"
    summary = convert("gsm8k-solutions", SOLUTIONS, destination)
    assert (summary["rows"], summary["problems"], summary["not_ended"]) == (5276, 1319, 10)
    shares = {model: round(share, 3) for model, share in summary["correct_by_model"].items()}
    assert shares == {
        "6b_finetuning": 0.217,
        "6b_verification": 0.390,
        "175b_finetuning": 0.347,
        "175b_verification": 0.563,
    }
    rows = read_rows(destination)
    assert len(rows) == 5276
    assert sum(min(row.step_rewards) < 0 for row in rows) == summary["rows_with_wrong_annotations"] > 0
    assert check_contrast(rows) == ""

    convert("gsm8k-solutions", SOLUTIONS, destination, keep_annotations=False)
    plain = read_rows(destination)
    assert [row.step_rewards for row in plain] == [row.step_rewards for row in rows]
    assert not any(">>" in row.completion for row in plain)


@pytest.mark.parametrize("written, kept", [("18.50", "18.5"), ("1,000", "1000"), ("9" * 400 + ".5", "9" * 400 + ".5")])
def test_the_reference_answer_is_kept_exactly(tmp_path, written, kept):
    path = tmp_path / "solutions.jsonl"
    graded = {"solution": f"A: {written}", "is_correct": True}
    path.write_text(json.dumps({"question": "q", "ground_truth": f"A: {written}", "6b": graded}))
    rows, _ = convert_gsm8k.convert_gsm8k_solutions(path)
    assert rows[0].answer == kept
