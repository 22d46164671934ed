"""Answers that no verifier could read: they stand in table and verdict, and are no finding of "no difference"."""

from dqo.report.comparison import compare, verdict_of
from dqo.report.page import console_table


def method(name, right, unread):
    return {"name": name, "greedy": right, "sampling": [[x, x] for x in right], "unread": unread}


ALL, NONE = {"greedy": 1.0, "sampling": 1.0}, {"greedy": 0.0, "sampling": 0.0}


def verdict(*methods):
    return verdict_of(compare(list(methods), "base"), "dqo", "base", None)


def test_where_nothing_was_read_nothing_is_known():
    found = verdict(method("base", [0] * 20, ALL), method("dqo", [0] * 20, ALL))
    assert found.sentence.startswith("No answer of dqo or of base could be read by the verifier")
    assert "no significant difference" not in " ".join([found.sentence, *found.details])
    assert all("(100.0% of the answers could not be read)" in line and " p " not in line for line in found.details)


def test_one_decoding_that_was_read_is_tested_alone():
    half = {"greedy": 1.0, "sampling": 0.0}
    results = compare([method("base", [0] * 20, half), method("dqo", [0] * 20, half)], "base")
    assert list(results[1].against) == ["sampling"] and results[1].unreadable == ["greedy"]


def test_answers_that_were_read_are_compared_as_before():
    found = verdict(method("base", [0] * 20, ALL), method("dqo", [1] * 20, NONE))
    assert found.sentence.startswith("dqo is better than base")
    plain = verdict_of(compare([{"name": n, "greedy": [1, 0]} for n in ("base", "dqo")], "base"), "dqo", "base", None)
    assert plain.sentence == "There is no significant difference between dqo and base."


def test_the_share_stands_beside_every_accuracy():
    text = console_table([method("base", [0] * 20, ALL), method("dqo", [1] * 20, NONE)], "base")
    head, _, base, dqo = text.splitlines()
    assert "greedy unread %" in head and "sampling unread %" in head
    assert base.count("100.0") == 2 and " 0.0 " in dqo
    assert "unread" not in console_table([{"name": "base", "greedy": [1, 0]}], "base")
