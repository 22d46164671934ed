"""A third language model, whose log-probabilities are a column."""

import json
import shutil

import numpy as np
import pytest
import torch

from dqo.config.options import load_options
from dqo.data.batches import collate, distinct
from dqo.errors import UserError
from dqo.models.new import character_tokenizer, new_llama, save
from dqo.models.policy import policy_stats
from dqo.train.run import begin, train
from tests.dqo.helpers import arguments, measured, policy, tokenizer


def flags(files, **changes):
    return arguments(files, method="rto", behavior="reference", max_steps=6, **changes)


def test_its_log_probabilities_are_computed_once_and_cached(files, capsys):
    other = policy(seed=1)
    save(other, tokenizer(), files / "other")
    trainer = begin(load_options(flags(files, dpo_model=files / "other")))
    assert capsys.readouterr().out.count("reference pass:") == 2
    everything = [*trainer.prepared.episodes(), *distinct(trainer.prepared.held_out)]
    for e in everything[:4] + everything[-2:]:
        found = policy_stats(other, collate([e], 0)).logprobs.detach().numpy()
        assert np.allclose(e.columns["dpo_model_logprobs"], found, atol=1e-5)
        assert not np.allclose(e.columns["dpo_model_logprobs"], e.ref_logprobs, atol=1e-2)
    train(load_options(flags(files, dpo_model=files / "other")))
    assert "reference pass:" not in capsys.readouterr().out  # both are in the cache
    shutil.rmtree(files / "other")
    save(policy(seed=2), tokenizer(), files / "other")
    with pytest.raises(UserError, match="frozen models: .* then, .* now"):
        train(load_options(flags(files, dpo_model=files / "other")))


def test_a_model_that_is_missing_or_of_other_tokens_is_refused(files):
    with pytest.raises(UserError, match="--dpo_model is missing: method rto reads the log-probabilities of that model"):
        begin(load_options(flags(files)))
    fewer = character_tokenizer("ab")
    save(new_llama(fewer, hidden_size=16, layers=1, heads=2, max_length=64, seed=0), fewer, files / "fewer")
    with pytest.raises(
        UserError, match="dpo_model .*fewer has a vocabulary of .*, the policy of .*; give a model that shares"
    ):
        begin(load_options(flags(files, dpo_model=files / "fewer")))


# what a method needs beside the file
METHODS = {
    "ppo": {"method": "ppo", "behavior": "reference", "process_reward": "none"},
    "oreo": {"method": "oreo", "level": "step", "process_reward": "additive"},
    "dro": {"method": "dro", "value_states": "all", "process_reward": "none"},
    "dapo": {"method": "dapo", "process_reward": "potential"},
    "etpo": {"method": "etpo", "process_reward": "additive"},
    "rto": {"method": "rto", "behavior": "reference", "process_reward": "none"},
    "rto by dqo": {"method": "rto", "algorithm": "dqo", "process_reward": "none"},
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_read_more_than_rewards_train_on_one_file(files, name):
    rows = [json.loads(line) for line in (files / "rollouts.jsonl").read_text().splitlines()]
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, measured(rows))))
    save(policy(seed=1), tokenizer(), files / "other")
    options = METHODS[name] | ({"dpo_model": files / "other"} if name.startswith("rto") else {})
    run = train(load_options(arguments(files, max_steps=4, logging_steps=1, **options)))
    rows = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4 and np.isfinite(losses).all() and np.isfinite(run.held_out["eval_loss"])
    trained = [row["grad_norm"] > 0 for row in rows if "grad_norm" in row]
    expected = [True] * (2 if name == "dapo" else 4)  # its critic has the first half
    expected[0] = name != "etpo"  # whose policy is the Q-model's at first
    assert trained == expected
    before, after = policy(), run.prepared.learner.policy
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
