"""What an evaluation keeps: whole lines alone, of one evaluation alone, by one process alone."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqo.data.prompts import Prompt
from dqo.errors import UserError
from dqo.evaluation.results import Answer, Lines, opened, problems_hash, read_evaluation

PROBLEMS = [Prompt(f"{i}+1=", str(i + 1), source=f"tasks.jsonl:{i + 1}") for i in range(3)]
HEADER = {"problems": problems_hash(PROBLEMS), "model": "abc", "options": {"seed": 0, "model_name_or_path": "m"}}


def answer(problem=0, decoding="greedy", sample=0, **changes):
    told = {"response": "#### 1", "completion_ids": [3, 2], "finish_reason": "stop", "logprob": -1.0}
    told |= {"verifier": "gsm8k", "score": 1.0, "parsed": True, "answer": "1", "error": None}
    return Answer(decoding, problem, sample, **told | changes)


ROWS = [{"n": i, "text": "ä\n" * i} for i in range(4)]


@given(st.integers(0, 200))
def test_a_killed_writer_loses_no_whole_line_and_doubles_none(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    whole = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
    path.write_bytes(whole[:cut])
    lines = Lines(path)
    kept = len(lines.rows)
    assert kept == whole[:cut].count(b"\n") and lines.rows == ROWS[:kept]
    lines.append(ROWS[kept:])
    lines.close()
    assert path.read_bytes() == whole


def test_a_second_writer_is_refused_and_a_later_one_is_not(tmp_path):
    first = Lines(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="rows.jsonl: another process writes to it"):
        Lines(tmp_path / "rows.jsonl")
    first.replace(ROWS)
    with pytest.raises(UserError, match="another process"):
        Lines(tmp_path / "rows.jsonl")
    first.append(ROWS[:1])
    first.close()
    assert Lines(tmp_path / "rows.jsonl").rows == [*ROWS, ROWS[0]]


def test_an_altered_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"n": 1}\n[2]\n{"n": 3}\n')
    with pytest.raises(UserError, match="rows.jsonl:2: not a line of an evaluation"):
        Lines(tmp_path / "rows.jsonl")


def test_what_was_stored_is_there_again(tmp_path):
    with opened(tmp_path / "e", "mine", HEADER, PROBLEMS) as (evaluation, results, scored):
        assert not evaluation.answers
        results.append([asdict(answer(i)) for i in (2, 0, 1)])
        results.append([asdict(answer(0, "sampling", k)) for k in (1, 0)])
        scored.append([{"decoding": "sampling", "problem": 0, "sample": 1, "scorer": "value", "value": 0.5}])
    found = read_evaluation(tmp_path / "e")
    assert found.name == "mine" and found.decodings == ["greedy", "sampling"]
    assert [[a.problem for a in given] for given in found.of("greedy")] == [[0], [1], [2]]
    assert [a.sample for a in found.of("sampling")[0]] == [0, 1]
    assert found.scores == {"value": {("sampling", 0, 1): 0.5}}
    assert found.problems[1]["prompt"] == "1+1="
    with opened(tmp_path / "e", "mine", HEADER, PROBLEMS) as (evaluation, _, _):
        assert evaluation.answers == found.answers


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"problems": problems_hash(PROBLEMS[:2])}, "the problems are others"),
        ({"model": "other"}, "the weights of the model are others"),
        ({"options": {"seed": 1, "model_name_or_path": "m"}}, "seed: 0 then, 1 now"),
    ],
)
def test_another_evaluation_in_the_directory_is_refused_and_left_alone(tmp_path, changes, message):
    with opened(tmp_path / "e", "mine", HEADER, PROBLEMS):
        pass
    before = {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()}
    with pytest.raises(UserError, match=f"holds another evaluation: {message}"):
        with opened(tmp_path / "e", "mine", HEADER | changes, PROBLEMS):
            pass
    assert {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()} == before


def test_a_directory_of_other_things_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is in use and has no eval.json"):
        with opened(tmp_path, "mine", HEADER, PROBLEMS):
            pass
    with pytest.raises(UserError, match="is no directory of `dqo eval`"):
        read_evaluation(tmp_path)


def test_the_hash_is_of_what_is_asked_and_of_its_order():
    assert problems_hash(PROBLEMS) == problems_hash([replace(p, source="x", prompt_id="y") for p in PROBLEMS])
    for changed in ([replace(PROBLEMS[0], answer="9"), *PROBLEMS[1:]], PROBLEMS[::-1], PROBLEMS[:2]):
        assert problems_hash(changed) != problems_hash(PROBLEMS)
