"""Several runs as one report: what is pooled, what is named, and what cannot be compared."""

import dataclasses
import re

import numpy as np
import pytest

from dqo.errors import UserError
from dqo.report.build import report_of
from dqo.report.page import rendered
from dqo.report.predictors import IMPLICIT, VALUE
from dqo.report.runs import read_run
from tests.dqo.report.stored import PROMPTS, stored_run

TASKS = {"verifier": "gsm8k", "eval_tasks": "t.jsonl"}


def built(tmp_path, *runs, **given):
    return report_of([read_run(stored_run(tmp_path / f"run{i}", **run)) for i, run in enumerate(runs)], **given)


def by_name(report):
    return {method["name"]: method for method in report["methods"]}


def test_runs_of_one_method_and_several_seeds_are_pooled(tmp_path):
    report = built(
        tmp_path, {"seed": 1, "after": (1, 1, 1, 0)}, {"seed": 2, "after": (1, 0, 0, 0)}, {"seed": 3, "method": "kto"}
    )
    methods = by_name(report)
    assert list(methods) == ["base", "dqo", "kto"]
    assert methods["dqo"]["greedy"] == [1.0, 0.5, 0.5, 0.0]
    assert np.shape(methods["dqo"]["sampling"]) == (4, 4)
    assert [(run["seed"], run["accuracy"]["greedy"]) for run in methods["dqo"]["seeds"]] == [(1, 0.75), (2, 0.25)]
    assert "seeds" not in methods["kto"] and methods["base"]["greedy"] == [0, 0, 0, 1]
    assert [run["seed"] for run in methods["base"]["seeds"]] == [1, 2, 3]
    assert report["baseline"] == "base" and report["headline"] == "dqo"


def test_a_method_with_two_sets_of_options_has_two_names(tmp_path):
    report = built(tmp_path, {"beta": 0.1}, {"beta": 0.2}, {"beta": 0.2, "seed": 1})
    assert list(by_name(report)) == ["base", "dqo, beta 0.1", "dqo, beta 0.2"]
    long = built(tmp_path / "long", {"ref_model_name_or_path": "a" * 50}, {"ref_model_name_or_path": "b" * 50})
    assert list(by_name(long)) == ["base", "dqo, run0", "dqo, run1"]


def test_every_run_has_its_curves_with_seed_and_warmup(tmp_path):
    report = built(tmp_path, {"seed": 1}, {"seed": 2}, {"method": "kto"})
    losses = [(c["method"], c["seed"], c["warmup"]) for c in report["curves"] if c["name"] == "loss"]
    assert losses == [("dqo", 1, 2), ("dqo", 2, 2), ("kto", 42, 2)]
    page = rendered(report)["report.html"]
    assert page.count(">value warm-up<") == 4  # loss and gradient norm, of each method


def test_before_and_after_come_from_the_metrics_and_the_answers(tmp_path):
    report = built(tmp_path, {"seed": 1}, {"seed": 2}, {"method": "kto", "finished": False})
    changes = {change["name"]: change["methods"] for change in report["changes"]}
    assert changes["Held-out loss"] == {"dqo": [[0.5, 0.251], [0.5, 0.252]], "kto": [[0.5, None]]}
    assert changes["Greedy accuracy"] == {"dqo": [[0.25, 0.75], [0.25, 0.75]]}
    assert changes["Held-out KL"]["dqo"] == [[0.0, 0.02], [0.0, 0.02]]
    assert "AUC of the value model" not in changes


def test_problems_that_changed_are_those_of_the_first_run(tmp_path):
    flips = built(tmp_path, {"after": (1, 0, 0, 0)})["flips"]
    assert [flip["prompt"] for flip in flips["fixed"]] == PROMPTS[:1]
    assert flips["broken"] == [{"prompt": PROMPTS[3], "before": "right", "after": "wrong"}]


def test_lengths_stand_beside_the_value_model_as_predictors(tmp_path):
    report = built(tmp_path, {}, {"method": "kto"})
    found = {(p["name"], p["method"]): p["auc"] for p in report["predictors"]}
    assert found[(VALUE, "dqo")] == 0.5
    assert found[("Length of the response, shorter is better (no model)", "")] == 1.0
    assert found[(IMPLICIT, "kto")] == 1.0
    assert sum("no model" in name for name, _ in found) == 2  # once, not for each method
    assert report["value_auc"]["at_end"] == 0.5 and report["value_auc"]["n"] == 20


@pytest.mark.parametrize(
    "other, warning",
    [
        (
            {"data": "e" * 64},
            r"trained on different data: run0: a\.jsonl \(dddddddddddd \.\.\.\); run1: a.jsonl \(eeeeeeeeeeee",
        ),
        ({"model": "n" * 64}, "start from different models; base is that of the first: run0: M; run1: M"),
        ({"prompts": ["9+9=", *PROMPTS[1:]]}, "answered other problems than the first, .* left out: run1"),
        ({"finished": False, "rows": 3}, r"run1 is not finished: step 6 of 8; what is there is shown"),
        ({"record": False}, r"kept no run\.json, .* are not known: run1"),
    ],
)
def test_what_cannot_be_compared_is_said_on_the_page(tmp_path, other, warning):
    report = built(tmp_path, {}, {"method": "kto", **other})
    page = rendered(report)
    assert any(re.search(warning, text) for text in report["warnings"]), report["warnings"]
    assert 'class="warning"' in page["report.html"]
    assert built(tmp_path / "alike", {}, {"method": "kto"})["warnings"] == []


def test_accuracies_on_other_problems_are_left_out_and_the_rest_is_compared(tmp_path):
    report = built(tmp_path, {}, {"method": "kto", "prompts": ["9+9=", *PROMPTS[1:]]})
    assert "greedy" not in by_name(report)["kto"] and "greedy" in by_name(report)["dqo"]
    assert "kto" in {curve["method"] for curve in report["curves"]}


def test_answers_that_could_not_be_read_stand_beside_accuracies_and_examples_are_shown(tmp_path):
    report = built(tmp_path, {"seed": 1, "unread_share": 0.25, **TASKS}, {"seed": 2, **TASKS})
    assert by_name(report)["base"]["unread"] == {"greedy": 0.125, "sampling": 0.125}
    assert [(lost["method"], lost["decoding"]) for lost in report["unread"]] == [
        (method, kind) for method in ("base", report["headline"]) for kind in ("greedy", "sampling")
    ]
    page = rendered(report)["report.html"]
    assert "25.0% of the answers of base, greedy, could not be read" in page and "four &lt;b&gt;" in page
    assert "12.5 unread" in page and "--verifier math" in page
    assert built(tmp_path / "read", {})["unread"] == []


def test_held_out_rows_that_differ_between_seeds_are_a_limit(tmp_path):
    report = built(tmp_path, {}, {"seed": 1, "held_out": "i" * 64})
    assert report["warnings"] == [] and "held-out rows are not the same" in report["notes"][0]


def test_a_run_that_went_on_is_of_the_method_of_one_that_did_not(tmp_path):
    """Its options come from its checkpoint, with 0.0 for 0."""
    report = built(tmp_path, {"seed": 1}, {"seed": 2, "warmup_steps": 0.0})
    assert [run["method"] for run in report["runs"]] == ["dqo", "dqo"]
    told = built(tmp_path / "told", {"warmup_steps": 1}, {"warmup_steps": 2})
    assert [run["method"] for run in told["runs"]] == ["dqo, warmup_steps 1.0", "dqo, warmup_steps 2.0"]


def test_options_of_all_and_of_each_are_told_apart(tmp_path):
    report = built(tmp_path, {"beta": 0.2, "learning_rate": 1e-4}, {"method": "kto", "learning_rate": 1e-4})
    assert report["options"]["learning_rate"] == 1e-4 and "seed" not in report["options"]
    assert report["options_of"] == {"dqo": {"beta": 0.2}}
    alone = built(tmp_path / "alone", {"seed": 5})
    assert alone["options"]["seed"] == 5 and alone["options_of"] == {}


def test_commands_are_shown_once_each(tmp_path):
    report = built(tmp_path, {"seed": 1}, {"seed": 2})
    assert report["command"] == "dqo train --seed 1\ndqo train --seed 2"


def test_one_directory_twice_is_refused(tmp_path):
    run = read_run(stored_run(tmp_path / "a"))
    with pytest.raises(UserError, match="a is given twice"):
        report_of([run, read_run(tmp_path / "a" / ".." / "a")])


def test_the_verdict_of_several_seeds_counts_them(tmp_path):
    report = built(tmp_path, *({"seed": i, "after": (1, 1, 1, i % 2)} for i in range(3)), {"method": "kto", "seed": 0})
    text = rendered(report)["report.md"]
    assert "better with 3 of 3 training seeds (95% interval over seeds" in text
    assert "dqo over kto: with greedy decoding" in text


def test_without_problems_and_value_model_the_verdict_is_the_implicit_reward(tmp_path):
    run = read_run(stored_run(tmp_path / "a", method="kto"))
    rows = [{k: v for k, v in row.items() if not k.startswith("value")} for row in run.held_out]
    report = report_of([dataclasses.replace(run, answers=[], held_out=rows)])
    assert (
        "**The policy's implicit reward tells right held-out responses from wrong ones.**"
        in rendered(report)["report.md"]
    )
