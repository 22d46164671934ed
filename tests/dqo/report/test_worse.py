import pytest

from dqo.report.comparison import Verdict, compare
from dqo.report.worse import risen, with_loss, worse_lines


def report(before, after, methods=()):
    change = {
        "name": "Held-out loss",
        "better": "lower",
        "how_to_read": "",
        "methods": {"dqo": list(zip(before, after))},
    }
    other = {"name": "Held-out KL", "better": "", "how_to_read": "", "methods": {"dqo": [[0.0, 9.0]]}}
    return {"changes": [change, other], "methods": list(methods), "baseline": "base"}


@pytest.mark.parametrize(
    "before, after, worse",
    [
        ([0.2], [0.3], True),
        ([0.2], [0.2011], False),  # less than RISE
        ([0.3], [0.2], False),
        ([0.2, 0.2, None], [0.1, 0.4, 0.9], True),  # the mean of the runs that have both
        ([-2.0], [-1.0], True),
        ([None], [1.0], False),
    ],
)
def test_a_loss_that_has_risen(before, after, worse):
    assert bool(risen(report(before, after))) == worse


def test_without_answers_the_loss_has_the_first_word():
    known = Verdict("The value model tells right held-out responses from wrong ones.", ["AUC: 0.7."])
    found = with_loss(known, report([0.2], [1300.0]), "dqo", answered=False)
    assert (
        found.sentence == "dqo ends worse than it began: the held-out loss is 0.200 before training, 1.3e+03 after it."
    )
    assert found.details == [known.sentence, *known.details]
    answered = with_loss(known, report([0.2], [0.3]), "dqo", answered=True)
    assert answered.sentence == known.sentence and answered.details[-1].startswith("dqo ends worse")
    assert with_loss(known, report([0.3], [0.2]), "dqo", answered=False) == known
    assert with_loss(None, report([0.2], [0.3]), None, answered=False).details == []
    assert with_loss(None, report([0.3], [0.2]), None, answered=False) is None


def test_significantly_fewer_right_answers_are_said_and_a_few_are_not():
    def lines(lost):
        methods = [
            {"name": "base", "greedy": [1.0] * 40},
            {"name": "dqo", "greedy": [0.0] * lost + [1.0] * (40 - lost)},
        ]
        found = report([0.3], [0.2], methods)
        return worse_lines(found, compare(found["methods"], "base"))

    assert lines(12) == ["dqo ends worse than it began: with greedy decoding it solves fewer problems than base"]
    assert lines(2) == []
