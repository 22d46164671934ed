"""What a finished run says of each token, against plain forward passes; which models it finds, and which it refuses."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from dqo.config.options import load_options
from dqo.data.batches import collate
from dqo.errors import UserError
from dqo.models.critic import ValueHead, load_critic, value_rows
from dqo.models.new import character_tokenizer, save
from dqo.models.policy import hidden_positions, load_policy
from dqo.train.export import export
from dqo.train.run import train
from dqo.train.saved import run_options
from dqo.train.token_scores import NAMES, beta_of, load_run, reference_of, token_scores
from tests.dqo.helpers import arguments, episodes, policy, rollout_rows, tokenizer

EPISODES = episodes(5)


def trained(folder, name, *flags, **settings):
    settings = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2, "eval_fraction": 0.0} | settings
    train(load_options([*arguments(folder, output_dir=folder / name, **settings), *flags]))
    return folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two steps from model/: full/ and lora/ with a separate value model, head/ of adapters with a head, rft/ without."""
    folder = tmp_path_factory.mktemp("runs")
    save(policy(), tokenizer(), folder / "model")
    (folder / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rollout_rows(prompts=12, samples=4))))
    trained(folder, "full", beta=0.05, value_model="separate")
    trained(folder, "lora", "--use_peft", lora_r=2, value_model="separate")
    trained(folder, "head", "--use_peft", lora_r=2, value_model="head")
    shutil.rmtree(trained(folder, "rft", method="rft", max_steps=1) / "checkpoint-1")
    return folder


def by_hand(model, reference, episode):
    """{name: (T,)} from the logits of one row alone."""
    ids = torch.tensor([episode.prompt_ids + episode.completion_ids])
    states = slice(len(episode.prompt_ids) - 1, -1)
    actions = torch.tensor(episode.completion_ids)[:, None]
    found = {}
    with torch.no_grad():
        logits = [m(ids).logits[0, states].double() for m in (model, reference)]
    logp, ref_logp = (x.log_softmax(-1) for x in logits)
    for prefix, x, table in (("", logits[0], logp), ("ref_", logits[1], ref_logp)):
        found[f"{prefix}logprobs"] = table.gather(-1, actions)[:, 0]
        found[f"{prefix}entropy"] = -(table.exp() * table).sum(-1)
        found[f"{prefix}lse"] = x.logsumexp(-1)
    return found | {"kl": (logp.exp() * (logp - ref_logp)).sum(-1)}


@pytest.mark.parametrize("name", ["full", "lora", "full/checkpoint-1", "lora/checkpoint-1"])
def test_scores_are_those_of_the_two_models_and_of_the_value_model(runs, name):
    models = load_run(runs / name)
    found = token_scores(models, EPISODES, NAMES)
    own, reference = load_policy(str(runs / name)), load_policy(str(runs / "model"))
    for scores, episode in zip(found, EPISODES, strict=True):
        assert scores.keys() == set(NAMES)
        for key, expected in by_hand(own, reference, episode).items():
            assert scores[key].dtype == np.float32
            np.testing.assert_allclose(scores[key], expected, atol=2e-5, err_msg=key)
    assert max(scores["kl"].max() for scores in found) > 1e-4
    if name.endswith("checkpoint-1"):
        assert any(scores["values"].any() for scores in found)
    else:
        critic = load_critic(runs / name / "critic")
        for scores, episode in zip(found, EPISODES):
            ids = torch.tensor([episode.prompt_ids + episode.completion_ids])
            with torch.no_grad():
                values = critic(ids).logits[0, len(episode.prompt_ids) - 1 : -1, 0]
            np.testing.assert_allclose(scores["values"], values, atol=1e-5)
    assert models.beta == (0.05 if "full" in name else 0.1)


def test_a_checkpoint_of_adapters_has_the_value_model_that_was_published(runs):
    """The last checkpoint keeps the adapter alone, output_dir the merged model, of a trunk or of a head."""
    for name in ("lora", "head"):
        values = [
            np.concatenate([scores["values"] for scores in token_scores(load_run(path), EPISODES, ["values"])])
            for path in (runs / name, runs / name / "checkpoint-2")
        ]
        assert np.abs(values[0]).max() > 1e-4
        np.testing.assert_allclose(*values, atol=1e-5)
    assert isinstance(load_run(runs / "head").value_model, ValueHead)


def test_a_method_without_a_reference_is_compared_with_the_model_that_it_began_with(runs):
    models = load_run(runs / "rft")
    assert models.value_model is None and models.beta == 1.0 and models.options["method"] == "rft"
    (scores,) = token_scores(models, EPISODES[:1], ["ref_logprobs"])
    expected = by_hand(models.policy, load_policy(str(runs / "model")), EPISODES[0])["ref_logprobs"]
    np.testing.assert_allclose(scores["ref_logprobs"], expected, atol=2e-5)
    with pytest.raises(UserError, match=r"rft has no value model \(critic/\)"):
        token_scores(models, EPISODES, ["values"])
    with pytest.raises(UserError, match="no score of a token is called 'advantage'; there are logprobs"):
        token_scores(models, EPISODES, ["advantage"])


def test_what_was_exported_needs_the_reference_by_name(runs, tmp_path):
    export(runs / "full", tmp_path / "whole")
    with pytest.raises(UserError, match="whole has no config.yaml .* give --ref_model_name_or_path"):
        load_run(tmp_path / "whole")
    found, expected = (
        token_scores(models, EPISODES, ["logprobs", "ref_logprobs"])
        for models in (load_run(tmp_path / "whole", reference=str(runs / "model")), load_run(runs / "full"))
    )
    for scores, others in zip(found, expected):
        assert all(np.array_equal(scores[name], others[name]) for name in scores)


def test_a_reference_of_other_tokens_or_of_later_weights_is_refused(runs, tmp_path):
    save(policy(), character_tokenizer("9876543210+-*=#\n"), tmp_path / "other")
    with pytest.raises(
        UserError, match=r"another tokenizer: token \d+ is .* of the model, and .* of the reference; give"
    ):
        load_run(runs / "full", reference=str(tmp_path / "other"))
    grown = policy()
    grown.resize_token_embeddings(24)
    save(grown, tokenizer(), tmp_path / "grown")
    with pytest.raises(UserError, match="grown has 24 tokens, and the model has 19"):
        load_run(runs / "full", reference=str(tmp_path / "grown"))
    with pytest.raises(UserError, match="the reference: .*nowhere.*; give --ref_model_name_or_path"):
        load_run(runs / "full", reference=str(tmp_path / "nowhere"))
    run = shutil.copytree(runs / "full", tmp_path / "full")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    save(policy(seed=1), tokenizer(), tmp_path / "later")
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"ref_model_name_or_path": str(tmp_path / "later")}))
    with pytest.raises(UserError, match="later has other weights than the one that .* was trained against"):
        load_run(run)
    assert load_run(run, reference=str(tmp_path / "later")).beta == 0.05


@pytest.mark.parametrize(
    "form", [{"value_model": "implicit"}, {"value_model": "head", "value_input": "ref_logprob"}], ids=str
)
def test_a_value_model_that_reads_the_reference_is_given_it(runs, form):
    """The values are those that it has beside the reference's log-probabilities, and others beside other ones."""
    out = trained(runs, f"reads-{form['value_model']}", **form, learning_rate=0.3, critic_learning_rate=0.3)
    models = load_run(out, with_reference=False)
    (found, *_) = token_scores(models, EPISODES[:1], ["values"])
    episode = EPISODES[0]
    known = dataclasses.replace(
        episode, ref_logprobs=by_hand(models.policy, models.reference, episode)["ref_logprobs"].float().numpy()
    )
    batch = collate([known], 0)
    hidden = hidden_positions(models.policy, batch)
    assert found["values"] == pytest.approx(value_rows(models.value_model, batch, hidden)[0].tolist(), abs=1e-5)
    shifted = dataclasses.replace(known, ref_logprobs=known.ref_logprobs - 1)
    assert found["values"] != pytest.approx(value_rows(models.value_model, collate([shifted], 0), hidden)[0].tolist())
    with pytest.raises(UserError, match="its value model read another reference when it was trained"):
        token_scores(dataclasses.replace(models, reference=policy(7)), EPISODES[:1], ["values"])


@pytest.mark.parametrize("where", [".", "checkpoint-4"])
def test_the_reference_and_beta_are_those_of_the_config(tmp_path, where):
    told = {"model_name_or_path": "base", "ref_model_name_or_path": None, "beta": 0.03}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(told))
    options = run_options(tmp_path / where)
    assert reference_of(tmp_path / where, options) == "base" and beta_of(options) == 0.03
    assert reference_of(tmp_path / where, options, "other") == "other"
    assert reference_of(tmp_path, options | {"ref_model_name_or_path": "theirs"}) == "theirs"
    with pytest.raises(UserError, match="began with a model object.* give --ref_model_name_or_path"):
        reference_of(tmp_path, {"method": "dqo", "model_name_or_path": None})
