"""Scores against the models' own forward pass; where their models are found."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml

from dqo.data.batches import collate
from dqo.errors import UserError
from dqo.evaluation.options import SCORER_NAMES, EvalConfig
from dqo.evaluation.scoring import Models, episode_of, load_models, reference_of, scorer_of, scores
from dqo.models.critic import ValueHead, make_value_model, save_value_model, score_of, value_rows
from dqo.models.new import save
from dqo.models.policy import hidden_positions, weights_hash
from dqo.models.value_form import ValueForm
from tests.dqo.helpers import policy, tokenizer

RESPONSES = [([1, 3, 4], [5, 6, 7, 2], True), ([1, 8], [9, 4], False), ([1, 5, 5, 6, 3], [11, 2], True)]
EPISODES = [episode_of(*response) for response in RESPONSES]


def logprobs(model, prompt, ids):
    with torch.no_grad():
        table = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    return [table[len(prompt) - 1 + t, token].item() for t, token in enumerate(ids)]


def test_likelihood_is_the_mean_over_the_tokens():
    model = policy()
    found = scores(Models(model, 0), ["likelihood"], EPISODES)["likelihood"]
    for value, (prompt, ids, _) in zip(found, RESPONSES):
        own = logprobs(model, prompt, ids)
        assert value == pytest.approx(sum(own) / len(own), abs=1e-5)


def test_implicit_is_beta_times_the_log_ratio():
    model, reference = policy(0), policy(1)
    found = scores(Models(model, 0, reference=reference, beta=0.3), ["implicit"], EPISODES)["implicit"]
    for value, (prompt, ids, _) in zip(found, RESPONSES):
        gap = sum(logprobs(model, prompt, ids)) - sum(logprobs(reference, prompt, ids))
        assert value == pytest.approx(0.3 * gap, abs=1e-5)


@pytest.mark.parametrize("kind", ["separate", "head"])
def test_value_is_that_of_the_state_before_the_end_token_or_after_the_last_one(kind):
    model = policy()
    critic = make_value_model(kind, model)
    last = critic.outer if isinstance(critic, ValueHead) else score_of(critic)
    torch.nn.init.normal_(last.weight)
    found = scores(Models(model, 0, value_model=critic), ["value"], EPISODES)["value"]
    for value, (prompt, ids, ended) in zip(found, RESPONSES):
        state = torch.tensor([prompt + (ids[:-1] if ended else ids)])
        with torch.no_grad():
            if kind == "head":
                expected = critic(model.base_model(state).last_hidden_state[0, -1]).item()
            else:
                expected = critic(state).logits[0, -1, 0].item()
        assert value == pytest.approx(expected, abs=1e-5)
        assert value != 0


def test_every_scorer_says_what_it_needs_and_scores_nothing_of_nothing():
    assert SCORER_NAMES == ("implicit", "likelihood", "value")
    for name in SCORER_NAMES:
        assert {"value_model", "reference"} >= scorer_of(name).NEEDS
        assert scores(Models(policy(), 0), [name], []) == {name: []}


def config(model, **changes):
    return EvalConfig(model_name_or_path=str(model), **changes)


@pytest.mark.parametrize("where", [".", "checkpoint-4"])
def test_the_reference_and_beta_are_those_of_the_training_run(tmp_path, where):
    told = {"model_name_or_path": "base", "ref_model_name_or_path": None, "beta": 0.03}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(told))
    assert reference_of(config(tmp_path / where)) == ("base", 0.03)
    assert reference_of(config(tmp_path / where, beta=0.0)) == ("base", 0.0)
    assert reference_of(config(tmp_path / where, ref_model_name_or_path="other")) == ("other", 0.03)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(told | {"ref_model_name_or_path": "theirs"}))
    assert reference_of(config(tmp_path / where)) == ("theirs", 0.03)


def test_models_that_are_not_found_are_named_with_their_option(tmp_path):
    with pytest.raises(UserError, match="no config.yaml.*--ref_model_name_or_path"):
        load_models(config(tmp_path, scorers=("implicit",)), policy(), 0)
    with pytest.raises(UserError, match="no value model in .*critic; give --value_model"):
        load_models(config(tmp_path, scorers=("value",)), policy(), 0)


def test_the_value_model_of_a_run_is_found_beside_its_policy(tmp_path):
    model = policy()
    critic = make_value_model("head", model)
    save_value_model(critic, critic.state_dict(), tmp_path / "critic")
    found = load_models(config(tmp_path, scorers=("value",)), model, 0)
    assert isinstance(found.value_model, ValueHead)


@pytest.mark.parametrize("kind", ["separate", "head"])
def test_a_value_model_that_reads_the_reference_is_given_the_one_it_knew(tmp_path, kind):
    model, reference = policy(0), policy(1)
    save(reference, tokenizer(), tmp_path / "reference")
    save(policy(2), tokenizer(), tmp_path / "another")
    critic = make_value_model(kind, model, form=ValueForm(input="ref_logprob", reference=weights_hash(reference)))
    torch.manual_seed(0)
    for parameter in list(critic.parameters())[-2:] + [p for p in critic.parameters() if p.dim() == 1]:
        torch.nn.init.normal_(parameter)
    save_value_model(critic, critic.state_dict(), tmp_path / "critic")
    options = {"scorers": ("value",), "value_model": str(tmp_path / "critic")}
    with pytest.raises(UserError, match="scorer value: .* no config.yaml .*give --ref_model_name_or_path"):
        load_models(config(tmp_path, **options), model, 0)
    with pytest.raises(UserError, match="scorer value: .*read another reference than .*another when it was trained"):
        load_models(config(tmp_path, **options, ref_model_name_or_path=str(tmp_path / "another")), model, 0)
    given = config(tmp_path, **options, ref_model_name_or_path=str(tmp_path / "reference"))
    found = scores(load_models(given, model, 0), ["value"], EPISODES)["value"]
    known = [
        dataclasses.replace(e, ref_logprobs=np.array(logprobs(reference, *response[:2]), np.float32))
        for e, response in zip(EPISODES, RESPONSES)
    ]
    batch = collate(known, 0)
    hidden = hidden_positions(model, batch)
    rows, ends = value_rows(critic, batch, hidden)
    expected = torch.where(batch.terminated, rows[batch.cu_seqlens[1:] - 1], ends)
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
