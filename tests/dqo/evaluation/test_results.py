"""What an evaluation keeps, and of which evaluation."""

from dataclasses import asdict, replace

import pytest

from dqo.data.prompts import Prompt
from dqo.errors import UserError
from dqo.evaluation.results import PROBLEMS_HASH, Answer, opened, problems_hash, read_evaluation

PROBLEMS = [Prompt(f"{i}+1=", str(i + 1), source=f"tasks.jsonl:{i + 1}") for i in range(3)]
OPTIONS = {PROBLEMS_HASH: problems_hash(PROBLEMS), "seed": 0}
HEADER = {"name": "mine", "verifier": "gsm8k", "model": "m"}


def answer(problem=0, decoding="greedy", sample=0, **changes):
    told = {"response": "#### 1", "completion_ids": [3, 2], "finish_reason": "stop", "logprob": -1.0}
    told |= {"verifier": "gsm8k", "score": 1.0, "parsed": True, "answer": "1", "error": None}
    return Answer(decoding, problem, sample, **told | changes)


def test_what_was_stored_is_there_again(tmp_path):
    with opened(tmp_path / "e", HEADER, OPTIONS, PROBLEMS) as (evaluation, results, scored):
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
    with opened(tmp_path / "e", HEADER, OPTIONS, PROBLEMS) as (evaluation, _, _):
        assert evaluation.answers == found.answers


def test_grades_of_another_verifier_are_further_rows(tmp_path):
    with opened(tmp_path / "e", HEADER, OPTIONS, PROBLEMS) as (_, results, _):
        results.append([asdict(answer(i)) for i in range(2)])
    with opened(tmp_path / "e", HEADER | {"verifier": "number"}, OPTIONS, PROBLEMS) as (evaluation, results, _):
        assert evaluation.answers == {} and len(evaluation.of_others) == 2
        results.append([asdict(answer(0, verifier="number", score=0.0))])
    found = read_evaluation(tmp_path / "e")
    assert found.verifier == "number" and [a.score for a in found.answers.values()] == [0.0]
    assert list(found.of_others) == [("greedy", 1, 0)]
    with opened(tmp_path / "e", HEADER, OPTIONS, PROBLEMS) as (evaluation, _, _):
        assert [a.score for a in evaluation.answers.values()] == [1.0, 1.0] and not evaluation.of_others


def begin(directory, **changes):
    with opened(directory, HEADER, OPTIONS | changes, PROBLEMS):
        pass


def test_another_evaluation_in_the_directory_is_refused_and_left_alone(tmp_path):
    with opened(tmp_path / "e", HEADER, OPTIONS, PROBLEMS) as (_, results, _):
        results.append([asdict(answer())])
        with pytest.raises(UserError, match="another process is writing to it.*another --output_dir"):
            begin(tmp_path / "e")
    before = {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()}
    with pytest.raises(UserError, match="begun under other options: seed 0 then, 1 now.*another --output_dir"):
        begin(tmp_path / "e", seed=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()} == before


def test_a_directory_of_other_things_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is in use and holds no evaluation"):
        begin(tmp_path)
    with pytest.raises(UserError, match="is no directory of `dqo eval`"):
        read_evaluation(tmp_path)


def test_the_hash_is_of_what_is_asked_and_of_its_order():
    assert problems_hash(PROBLEMS) == problems_hash([replace(p, source="x", prompt_id="y") for p in PROBLEMS])
    for changed in ([replace(PROBLEMS[0], answer="9"), *PROBLEMS[1:]], PROBLEMS[::-1], PROBLEMS[:2]):
        assert problems_hash(changed) != problems_hash(PROBLEMS)
