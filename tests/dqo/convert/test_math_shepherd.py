"""Math-Shepherd's rows: small ones written here."""

import logging

from dqo.convert.math_shepherd import convert_math_shepherd
from tests.dqo.convert.sources import write


def shepherd(text, signs="+-", mark="ки"):
    label = text
    for sign in signs:
        label = label.replace(mark, sign, 1)
    return {"input": text, "label": label, "task": "MATH"}


def test_marks_become_step_rewards_and_the_last_one_the_outcome(tmp_path):
    text = "How much?  Step 1: a\nb  ки\nStep 2: so c. The answer is: 3 ки"
    rows, counts = convert_math_shepherd(write(tmp_path, shepherd(text), shepherd(text, "-+")))
    assert [(row.step_rewards, row.reward, row.label) for row in rows] == [
        ([1.0, 0.0], 0.0, False),
        ([0.0, 1.0], 1.0, True),
    ]
    row = rows[0]
    assert row.prompt == "How much?\n" and row.finish_reason == "stop" and row.sampling == {"task": "MATH"}
    assert [row.completion[a:b] for a, b in row.steps] == ["Step 1: a\nb\n", "Step 2: so c. The answer is: 3"]
    assert counts == {"left_out_mislabelled": 0, "by_task": {"MATH": 0.5}}


def test_a_solution_without_an_answer_was_cut(tmp_path):
    rows, _ = convert_math_shepherd(write(tmp_path, shepherd("Q? Step 1: a ки\nStep 2: b ки", "++")))
    assert (rows[0].reward, rows[0].finish_reason) == (0.0, "length")


def test_mislabelled_rows_are_named_and_left_out(tmp_path, caplog):
    good = "Q? Step 1: a ки\nStep 2: b. The answer is: 3 ки"
    bad = [
        ({"input": good, "label": good.replace("ки", "+", 1)}, "mark 2 has no + or - in label"),
        ({"input": good, "label": good.replace("ки", "+") + " more"}, "text after the last mark"),
        ({"input": good, "label": "other " + good.replace("ки", "+")}, "mark 1 has no + or - in label"),
        (shepherd("Q ки? Step 1: a ки", "++"), "a mark inside the question"),
        (shepherd("Q? a ки", "+"), 'no "Step 1:"'),
        (shepherd("Q? Step 1: a ки ки", "++"), "an empty question or step"),
    ]
    with caplog.at_level(logging.WARNING):
        rows, counts = convert_math_shepherd(write(tmp_path, shepherd(good), *[row for row, _ in bad]))
    assert len(rows) == 1 and counts["left_out_mislabelled"] == len(bad)
    for number, (_, why) in list(enumerate(bad, start=2))[:5]:
        assert f"source.jsonl:{number} ({why})" in caplog.text
    assert "6 mislabelled rows are left out" in caplog.text and "..." in caplog.text
