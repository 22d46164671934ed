"""What is known of scores on held-out responses, from what a run keeps, and in words."""

import json

import pytest

from dqo.report.build import report_of
from dqo.report.knowledge import credit_sentences
from dqo.report.page import rendered
from dqo.report.predictors import CERTAINTY, IMPLICIT, IMPLICIT_BEFORE, INITIAL, LIKELIHOOD, VALUE
from dqo.report.runs import read_run
from tests.dqo.report.pages import Page
from tests.dqo.report.stored import credited_row, stored_run


@pytest.fixture
def report(tmp_path):
    directory = stored_run(tmp_path / "run")
    (directory / "held_out.jsonl").write_text("".join(json.dumps(credited_row(i)) + "\n" for i in range(20)))
    return report_of([read_run(directory)])


def by_name(report):
    return {(p["name"], p["method"]): p for p in report["predictors"]}


def test_every_score_is_judged_by_responses_by_pairs_and_by_steps(report):
    found = by_name(report)
    policy, before, value = (found[name, "dqo"] for name in (IMPLICIT, IMPLICIT_BEFORE, VALUE))
    assert policy["auc"] == before["auc"] == policy["within"][0] == 1.0  # each prompt has one right and one wrong
    assert policy["found"][0] == before["found"][0] == policy["found_in_half"][0] == 0.8
    assert policy["found"][1] < 0.8 < policy["found"][2]
    assert (value["auc"], value["within"][0], value["found"][0]) == (0.5, 0.5, 0.0)
    assert value["found_in_half"][0] == 0.5  # among the steps that were in doubt both have changed nothing
    assert found[LIKELIHOOD, INITIAL]["found"][0] == found[CERTAINTY, INITIAL]["found"][0] == 0.0
    assert report["chance"] == {"found": [0.25, *report["chance"]["found"][1:]], "n": 10} | {
        "found_in_half": [0.5, *report["chance"]["found_in_half"][1:]]
    }


def test_the_verdict_says_what_each_score_knows(report):
    sentences = credit_sentences(report, "dqo")
    assert len(sentences) == 2 and "log(π/ref) of dqo 1.00 (" in sentences[0] and "within a prompt 1.00" in sentences[0]
    assert "the value model of dqo before the last token 0.50 (" in sentences[0]
    assert "log(π/ref) of dqo 80% (" in sentences[1] and "by chance 25%, over 10 responses" in sentences[1]
    text = rendered(report)["report.md"]
    assert all(sentence in text for sentence in sentences)
    assert credit_sentences({"title": "t", "command": "c"}, None) == []


def test_the_table_is_on_the_page(report):
    text = Page(rendered(report)["report.html"]).text
    assert f"{IMPLICIT_BEFORE} dqo 1.000" in text and "A step drawn by chance 0.500 0.500 25.0" in text
    assert "the 10 responses with a wrong step" in text and "among uncertain steps, %" in text


def test_a_run_that_kept_no_steps_has_the_rest_of_the_table(tmp_path):
    report = report_of([read_run(stored_run(tmp_path / "old"))])
    found = by_name(report)
    assert found[IMPLICIT, "dqo"]["auc"] == 1.0 and "chance" not in report
    assert "found" not in found[IMPLICIT, "dqo"] and (IMPLICIT_BEFORE, "dqo") not in found
    text = Page(rendered(report)["report.html"]).text
    assert "AUC within a prompt" in text and "First wrong step found" not in text


def test_responses_without_a_wrong_step_have_no_share(tmp_path):
    directory = stored_run(tmp_path / "run")
    rows = [credited_row(i) | {"first_wrong_step": None} for i in range(20)]
    (directory / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = report_of([read_run(directory)])
    assert "chance" not in report and by_name(report)[IMPLICIT, "dqo"]["found"] is None
    assert len(credit_sentences(report, "dqo")) == 1
    assert "First wrong step found" not in Page(rendered(report)["report.html"]).text
