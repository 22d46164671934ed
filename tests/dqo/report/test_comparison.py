"""Methods on the same problems, in words and as a table."""

import re

import pytest

from dqo.report.comparison import compare
from dqo.report.page import console_table, write_report
from dqo.stats import Proportion, paired_test
from tests.dqo.report.pages import full_report, scores


def verdict_of(directory, **changes):
    report = {"title": "t", "command": "c", "baseline": "sft", "headline": "dqo", **changes}
    write_report(directory, report)
    return re.search(r"\*\*(.*)\*\*", (directory / "report.md").read_text()).group(1)


def test_the_verdict_names_a_clear_winner_with_numbers(tmp_path):
    full = full_report()
    write_report(tmp_path, full)
    text = (tmp_path / "report.md").read_text()
    base, _, dqo = full["methods"]
    test = paired_test(dqo["greedy"], base["greedy"])
    rate = Proportion(sum(dqo["greedy"]), 400)
    assert "**dqo is better than base with greedy decoding and with sampling.**" in text
    assert f"dqo solves {100 * rate.mean:.1f}% ({100 * rate.low:.1f} to {100 * rate.high:.1f}) of 400" in text
    assert f"+{100 * test.difference:.1f} points" in text and "p < 0.001 by the exact McNemar test" in text


def test_the_verdict_says_no_significant_difference_when_there_is_none(tmp_path):
    same_skill = [{"name": "sft", **scores(seed=5)}, {"name": "dqo", **scores(seed=6)}]
    assert not any(test.significant for test in compare(same_skill, "sft")[1].against.values())
    verdict = verdict_of(tmp_path, methods=same_skill)
    assert verdict == "There is no significant difference between dqo and sft."


def test_the_verdict_admits_defeat_and_a_split_decision(tmp_path):
    good, poor = scores(skill=2.0, seed=1), scores(skill=0.0, seed=2)
    methods = [{"name": "sft", **good}, {"name": "dqo", **poor}]
    verdict = verdict_of(tmp_path, methods=methods)
    assert verdict == "dqo is worse than sft with greedy decoding and with sampling."
    methods = [
        {"name": "sft", **poor},
        {"name": "dqo", "greedy": good["greedy"], "sampling": poor["sampling"]},
    ]
    verdict = verdict_of(tmp_path, methods=methods)
    assert verdict == (
        "dqo is better than sft with greedy decoding, but shows no significant difference with sampling."
    )


@pytest.mark.parametrize("interval, expected", [([0.62, 0.8], "from wrong ones."), ([0.45, 0.8], "than chance.")])
def test_without_scores_the_verdict_is_about_the_value_model(tmp_path, interval, expected):
    auc = {"at_end": 0.7, "at_half": None, "n": 50, "interval": interval}
    write_report(tmp_path, {"title": "t", "command": "c", "methods": [{"name": "dqo"}], "value_auc": auc})
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"\*\*(.*)\*\*", text).group(1).endswith(expected)
    assert f"0.700 (95% interval {interval[0]:.3f} to {interval[1]:.3f})" in text


def test_the_console_table_is_aligned_and_complete():
    methods = [
        {"name": "base", "greedy": [0, 0, 1, 0] * 50},
        {"name": "a longer name", "greedy": [1, 1, 1, 0] * 50, "sampling": [[1, 0]] * 200},
    ]
    header, rule, base, better = console_table(methods, "base").split("\n")
    assert len({len(line) for line in (header, rule, base, better)}) == 1
    assert base.split() == ["base", "25.0", "±6.0", "-", "-", "-"]
    test = paired_test(methods[1]["greedy"], methods[0]["greedy"])
    assert better.startswith("a longer name")
    assert f"+50.0 [+{100 * test.low:.1f}, +{100 * test.high:.1f}]  <0.001" in better
    assert "-" not in console_table(methods[1:]).split("\n")[2]


def test_methods_on_different_problems_are_refused():
    methods = [{"name": "base", "greedy": [0, 1]}, {"name": "dqo", "greedy": [1, 1, 1]}]
    with pytest.raises(ValueError, match="dqo has 3 problems and base has 2"):
        console_table(methods, "base")
    with pytest.raises(ValueError, match="number of problems"):
        console_table([{"name": "dqo", "greedy": [1], "sampling": [[1], [0]]}])
    with pytest.raises(ValueError, match="one number of samples"):
        console_table([{"name": "dqo", "sampling": [[1, 0], [0]]}])


@pytest.mark.parametrize("names, baseline", [(["a", "a"], "a"), (["a", "b"], "c")])
def test_unclear_names_are_refused(names, baseline):
    with pytest.raises(ValueError, match="names must differ|not among"):
        console_table([{"name": name, "greedy": [1]} for name in names], baseline)
