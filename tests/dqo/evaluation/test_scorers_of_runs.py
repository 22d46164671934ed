"""Samples of one model ranked, and its steps searched, by the models of another run."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from dqo.config.options import load_options
from dqo.errors import UserError
from dqo.evaluation.evaluate import evaluated
from dqo.evaluation.options import EvalConfig
from dqo.evaluation.results import read_evaluation
from dqo.evaluation.scoring import episode_of, stored_name
from dqo.models.new import character_tokenizer, save
from dqo.scoring.by import models_of, step_rewards
from dqo.train.run import train
from dqo.train.token_scores import token_scores
from tests.dqo.helpers import arguments, policy, rollout_rows, tokenizer

VERIFIER = "python:tests.dqo.evaluation.verifiers:digits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, which answers; run/ of two steps from it with a value model."""
    folder = tmp_path_factory.mktemp("scorers")
    save(policy(), tokenizer(), folder / "model")
    rows = rollout_rows(prompts=12, samples=4)
    (folder / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = [{"prompt": prompt, "answer": "1"} for prompt in list(dict.fromkeys(row["prompt"] for row in rows))[:3]]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    settings = {"max_steps": 2, "learning_rate": 1e-2, "critic_learning_rate": 1e-2, "eval_fraction": 0.0, "beta": 0.05}
    train(load_options(arguments(folder, output_dir=folder / "run", **settings)))
    return folder


@pytest.fixture(autouse=True)
def place(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")


def evaluate(**changes):
    told = {"model_name_or_path": "model", "tasks": "problems.jsonl", "verifier": VERIFIER, "output_dir": "out"}
    told |= {"num_generations": 4, "max_completion_length": 12, "greedy": False, "use_cpu": True}
    return evaluated(EvalConfig(**told | changes), quiet=True)


def test_samples_of_a_model_are_ranked_by_the_models_of_a_run():
    _, summary = evaluate(scorers=("implicit:run", "value:run", "likelihood:run", "likelihood"))
    found = read_evaluation("out")
    names = {name.partition("@")[0]: name for name in found.scores}
    assert names.keys() == {"implicit:run", "value:run", "likelihood:run", "likelihood"}
    assert all(f"best@4 {name}" in summary["measures"] for name in names.values())
    prompts = [tokenizer()(p["prompt"], add_special_tokens=False)["input_ids"] for p in found.problems]
    models = models_of("implicit", "run")
    for key, answer in found.answers.items():
        episode = episode_of(prompts[answer.problem], answer.completion_ids, answer.finish_reason == "stop")
        episode.step_ends = [len(answer.completion_ids) - 1]
        (scores,) = token_scores(models, [episode], ["logprobs", "ref_logprobs"])
        expected = step_rewards("implicit", episode, scores, 0.05)[1].sum()  # as `dqo score --by implicit:run` pays it
        assert found.scores[names["implicit:run"]][key] == pytest.approx(expected, abs=1e-5)
    own, others = found.scores["likelihood"], found.scores[names["likelihood:run"]]
    assert any(abs(own[key] - others[key]) > 1e-3 for key in own)


def test_a_search_by_a_run_goes_on_and_a_run_that_was_trained_again_is_another_scorer():
    options = {"scorers": ("implicit_min:run",), "step_beams": 2, "step_samples": 2, "step_separator": "="}
    evaluate(**options)
    found = read_evaluation("out")
    (name,) = found.scores
    assert Counter(key[0] for key in found.answers) == {"sampling": 12, f"step-2x2 {name}": 3}
    lines = Path("out/scores.jsonl").read_text()
    evaluate(**options)
    assert Path("out/scores.jsonl").read_text() == lines
    save(policy(seed=4), tokenizer(), Path("other"))
    shutil.copy("other/model.safetensors", "run/model.safetensors")
    evaluate(**options)
    again = read_evaluation("out")
    assert len(again.scores) == 2 and again.scores[name] == found.scores[name]
    assert Counter(key[0] for key in again.answers)["sampling"] == 12


def test_a_run_with_another_reference_or_beta_is_another_scorer():
    save(policy(seed=4), tokenizer(), Path("other"))
    path = Path("run/config.yaml")
    config = path.read_text()
    assert "ref_model_name_or_path: null" in config and "beta: 0.05" in config
    names = [stored_name("implicit:run"), stored_name("implicit:run")]
    value = stored_name("value:run")
    path.write_text(config.replace("beta: 0.05", "beta: 0.06"))
    names.append(stored_name("implicit:run"))
    path.write_text(config.replace("ref_model_name_or_path: null", "ref_model_name_or_path: other"))
    names.append(stored_name("implicit:run"))
    shutil.copy("run/model.safetensors", "other/model.safetensors")
    names.append(stored_name("implicit:run"))
    assert names[0] == names[1] and len(set(names)) == 4
    assert stored_name("value:run") == value


@pytest.mark.parametrize(
    "scorer, said",
    [
        ("implicit:digits", "digits has no config.yaml of a training run that names its reference"),
        (
            "likelihood:digits",
            "scorer likelihood:digits: has another tokenizer than model, .*: token 3 is '9' of the scorer, and '.' of the model",
        ),
        ("implicit:nothing", "nothing: there is no such directory; name a run's output_dir"),
        ("value:plain", r"value:plain: the run has no value model \(critic/\)"),
    ],
)
def test_a_run_that_cannot_score_is_refused_before_anything_is_answered(scorer, said):
    save(policy(), character_tokenizer("9876543210+-*=#\n"), Path("digits"))
    shutil.copytree("run", "plain")
    shutil.rmtree("plain/critic")
    with pytest.raises(UserError, match=said):
        evaluate(scorers=(scorer,))
    assert not Path("out/results.jsonl").exists() or not Path("out/results.jsonl").read_text()
