"""Paired tests with known results, and what is not comparable."""

import random

import pytest

from dqo.errors import UserError
from dqo.evaluation.compare import compare, comparison_text
from dqo.evaluation.results import PROBLEMS_HASH
from dqo.stats import paired_test
from tests.dqo.evaluation.test_results import answer
from tests.dqo.evaluation.test_summary import evaluation as of_three
from tests.dqo.evaluation.test_summary import sampled, unread


def evaluation(answers, name, problems, **changes):
    found = of_three(answers, name, **changes)
    found.problems = [{"prompt": str(i), "answer": str(i), "source": f"tasks.jsonl:{i + 1}"} for i in range(problems)]
    return found


def greedy(name, right, problems=12):
    return evaluation([answer(i, score=float(i in right)) for i in range(problems)], name, problems)


def test_greedy_answers_are_tested_by_mcnemar():
    found = compare([greedy("a", range(10)), greedy("b", range(2))])
    (pair,) = found["measures"]["greedy"]["pairs"]
    assert (pair["a"], pair["b"], pair["wins"], pair["losses"]) == ("a", "b", 8, 0)
    assert pair["difference"] == pytest.approx(8 / 12)
    assert pair["p_value"] == pair["p_holm"] == pytest.approx(2 / 2**8)
    assert "p = 0.00781 by the exact McNemar test; 8 problems better, 0 worse: a is better" in comparison_text(found)


def test_all_pairs_are_tested_and_corrected_together():
    found = compare([greedy("a", range(10)), greedy("b", range(2)), greedy("c", range(4))])
    pairs = found["measures"]["greedy"]["pairs"]
    assert [(p["a"], p["b"]) for p in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    raw = [p["p_value"] for p in pairs]
    assert raw == pytest.approx([2 / 2**8, 2 / 2**6, 0.5])
    assert [p["p_holm"] for p in pairs] == pytest.approx([3 * raw[0], 2 * raw[1], 0.5])
    assert "corrected for all pairs (Holm)" in comparison_text(found)
    # 6 problems better and none worse is p = 0.03 alone, and 0.06 beside two other tests
    assert comparison_text(found).count("no significant difference") == 2


def test_samples_are_tested_by_the_means_of_problems():
    rng = random.Random(0)
    tables = {
        name: [[("1", rng.random() < p) for _ in range(4)] for _ in range(20)] for name, p in (("a", 0.9), ("b", 0.3))
    }
    found = compare([evaluation(sampled(table), name, 20) for name, table in tables.items()])
    assert list(found["measures"]) == ["pass@1", "maj@4"]
    (pair,) = found["measures"]["pass@1"]["pairs"]
    means = [[sum(right for _, right in row) / 4 for row in table] for table in tables.values()]
    expected = paired_test(*means)
    assert (pair["difference"], pair["p_value"]) == (expected.difference, expected.p_value)
    assert pair["test"] == "sign-flip permutation"


@pytest.mark.parametrize("n", [3, 10, 16])
def test_of_pass_at_k_pass_at_1_alone_is_tested(n):
    table = [[(str(k % 3), (i + k) % 2) for k in range(n)] for i in range(5)]
    found = compare([evaluation(sampled(table), name, 5) for name in ("a", "b")])
    assert list(found["measures"]) == ["pass@1", f"maj@{n}"]


def test_where_nothing_was_read_nothing_is_said_of_a_difference():
    lost = [evaluation([unread(i) for i in range(3)], name, 3) for name in ("base", "dqo")]
    text = comparison_text(compare(lost))
    assert "no significant difference" not in text and "p =" not in text
    assert "base and dqo: no answer of either could be read, so nothing is known of their difference" in text
    assert "try --verifier number" in text
    read = evaluation([answer(i) for i in range(3)], "third", 3)
    pairs = compare([*lost, read])["measures"]["greedy"]["pairs"]
    assert [("p_value" in pair, pair.get("unreadable", False)) for pair in pairs] == [
        (False, True),
        (True, False),
        (True, False),
    ]


def test_what_is_not_comparable_is_refused():
    first, other = greedy("a", [0]), greedy("b", [0])
    other.header["options"][PROBLEMS_HASH] = "another"
    with pytest.raises(UserError, match="b has other problems than a"):
        compare([first, other])
    with pytest.raises(UserError, match="several evaluations have the name 'a'"):
        compare([first, greedy("a", [1])])
    math = evaluation([answer(i, verifier="math") for i in range(12)], "b", 12)
    with pytest.raises(UserError, match="b was graded by math, and a by gsm8k"):
        compare([first, math])
    with pytest.raises(UserError, match="no measure in common .a: greedy; b: pass@1"):
        compare([first, evaluation(sampled([[("1", 1)]] * 12), "b", 12)])
