"""Plans that are older than an option train what they did."""

import pytest

from benchmarks.evidence.as_planned import as_planned
from benchmarks.evidence.study import training


@pytest.mark.parametrize(
    "options, found",
    [
        ({"method": "dqo"}, 0.0),
        ({}, 0.0),
        ({"method": "dqo", "nll_coef": 0.04}, 0.04),
        ({"method": "dqo", "preset": "paper"}, None),  # which names it
        ({"method": "dpo"}, None),
    ],
)
def test_dqo_has_no_likelihood_that_its_plan_does_not_name(options, found):
    assert as_planned(options).get("nll_coef") == found and as_planned(options) | options == as_planned(options)


@pytest.mark.parametrize("options, nll_coef", [({}, 0.0), ({"nll_coef": 0.1}, 0.1)])
def test_the_study_trains_what_it_planned(options, nll_coef, tmp_path, monkeypatch):
    import dqo.train.run

    trained = []
    monkeypatch.setattr(dqo.train.run, "train", lambda options, name: trained.append(options))
    training.train_once({"method": "dqo", "file": "rows.jsonl"} | options, tmp_path, tmp_path, tmp_path / "run", 0)
    assert trained[0].objective.nll_coef == nll_coef and trained[0].train.dataset_name == str(tmp_path / "rows.jsonl")
