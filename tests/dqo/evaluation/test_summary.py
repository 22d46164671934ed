"""Measures of stored answers by hand, what cannot be read, and what is shown of it."""

import re
from pathlib import Path

import pytest

from dqo.evaluation.results import PROBLEMS_HASH, Evaluation
from dqo.evaluation.summary import per_problem, summary_of, table
from tests.dqo.evaluation.test_results import PROBLEMS, answer


def evaluation(answers, name="mine", scores=None, problems=3):
    told = [{"prompt": p.prompt, "answer": p.answer, "source": p.source} for p in PROBLEMS[:problems]]
    header = {"name": name, "verifier": answers[0].verifier, "model": "m", "options": {PROBLEMS_HASH: "hash"}}
    found = Evaluation(Path(name), header, told, answers, [])
    found.scores = scores or {}
    return found


def sampled(table):
    """Samples of each problem, (answer, right) each; None: an answer that could not be read."""
    return [
        answer(i, "sampling", k, answer=given, parsed=given is not None, score=float(right))
        for i, row in enumerate(table)
        for k, (given, right) in enumerate(row)
    ]


TABLE = [
    [("1", 1), ("1", 1), ("2", 0), (None, 0)],
    [("5", 0), ("5", 0), ("5", 0), ("2", 1)],
    [("3", 1), ("3", 1), ("3", 1), ("3", 1)],
]


def test_measures_by_hand():
    found = per_problem(evaluation(sampled(TABLE)))
    assert list(found) == ["pass@1", "pass@2", "pass@4", "maj@4"]
    assert found["pass@1"] == [[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]]
    # 1 - C(2,2)/C(4,2), 1 - C(3,2)/C(4,2), 1
    assert found["pass@2"] == pytest.approx([1 - 1 / 6, 1 - 3 / 6, 1])
    assert found["pass@4"] == [1, 1, 1]
    assert found["maj@4"] == [1, 0, 1]


def test_without_canonical_answers_there_is_no_majority():
    rows = [answer(i, "sampling", k, answer=None) for i in range(3) for k in range(4)]
    assert list(per_problem(evaluation(rows))) == ["pass@1", "pass@2", "pass@4"]


def test_the_best_by_a_score():
    scores = {"value": {("sampling", i, k): float(-k) for i in range(3) for k in range(4)}}
    found = per_problem(evaluation(sampled(TABLE), scores=scores))
    assert found["best@4 value"] == [1, 0, 1]
    # of the six pairs, ranked 0 1 2 3: the first wins three, the second two, the third one
    assert found["best@2 value"] == pytest.approx([5 / 6, 0, 1])
    del scores["value"]["sampling", 0, 0]
    assert "best@4 value" not in per_problem(evaluation(sampled(TABLE), scores=scores))


def test_a_decoding_is_summed_up_when_every_problem_has_its_answers():
    greedy = [answer(i, score=float(i == 1)) for i in range(3)]
    assert per_problem(evaluation(greedy)) == {"greedy": [0, 1, 0]}
    assert per_problem(evaluation(greedy[:2])) == {}
    samples = sampled(TABLE)
    assert per_problem(evaluation(samples[:-2]))["pass@1"] == [[1, 1], [0, 0], [1, 1]]
    assert per_problem(evaluation(samples[:-2]), samples=4) == {}
    assert "pass@4" not in per_problem(evaluation(samples), samples=2)


def test_a_score_between_is_right_above_a_half():
    assert per_problem(evaluation([answer(i, score=s) for i, s in enumerate((0.5, 0.6, 7.0))])) == {"greedy": [0, 1, 1]}


def test_the_summary_has_means_errors_and_what_was_not_read():
    found = summary_of(evaluation(sampled(TABLE)))
    assert found["measures"]["pass@1"]["mean"] == pytest.approx(7 / 12)
    means = [0.5, 0.25, 1.0]
    spread = sum((m - 7 / 12) ** 2 for m in means) / 2
    assert found["measures"]["pass@1"]["standard_error"] == pytest.approx((spread / 3) ** 0.5)
    assert found["unread"]["sampling"]["share"] == pytest.approx(1 / 12)
    assert found["problems"] == 3 and found["verifier"] == "gsm8k"


def unread(i, **changes):
    return answer(i, parsed=False, score=0.0, answer=None, response=f"It is \\boxed{{{i}}}\x1b[2J", **changes)


def test_unread_answers_stand_beside_the_accuracy_with_three_of_them_and_a_cure():
    mine = evaluation([unread(i) for i in range(3)])
    text = table(mine, summary_of(mine))
    assert re.search(r"greedy +0\.0 +0\.0 .* 100\.0$", text, re.M)
    assert "mine, greedy: no answer could be read by the verifier gsm8k" in text
    for i in range(3):
        assert f"tasks.jsonl:{i + 1} (answer {i + 1}): 'It is \\\\boxed{{{i}}}\\x1b[2J'" in text
    assert "try --verifier number or --verifier math" in text and "\x1b" not in text
    few = evaluation([answer(i) for i in range(3)])
    assert "could" not in table(few, summary_of(few))


def test_the_cure_fits_the_cause():
    cut = evaluation([unread(i, finish_reason="length") for i in range(3)])
    assert "100.0% of the answers were cut off before their end: raise --max_completion_length" in table(
        cut, summary_of(cut)
    )
    slow = evaluation([unread(i, error="timeout") for i in range(2)] + [answer(2)])
    text = table(slow, summary_of(slow))
    assert "66.7% of the answers could not be read" in text and "the verifier itself failed: timeout (2)" in text
