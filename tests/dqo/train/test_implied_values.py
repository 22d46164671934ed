"""A critic that the policy of a finished run implies: its values, what training makes of them, and which runs are refused."""

import dataclasses

import numpy as np
import pytest
import torch

from dqo.config.options import load_options
from dqo.data.batches import collate, distinct
from dqo.data.episode import Episode
from dqo.errors import UserError
from dqo.models.new import character_tokenizer, save
from dqo.objectives import DQO, DRO
from dqo.train.implied_values import add_columns, mean_return
from dqo.train.run import begin, run_of, train
from dqo.train.token_scores import load_run, token_scores
from tests.dqo.helpers import arguments, policy, tokenizer
from tests.dqo.objectives.packed import stats_of
from tests.tabular import random_tree

TREE = random_tree(3)


def paths(policy_logprobs):
    """An episode for each trajectory of the tree, and its log-probabilities under a policy (S, A)."""
    splits = TREE.cu_seqlens[1:-1].tolist()
    ref = TREE.ref_logits.log_softmax(-1)
    columns = [ref[TREE.states, TREE.actions], TREE.rewards, policy_logprobs[TREE.states, TREE.actions]]
    actions = np.split(TREE.actions.numpy(), splits)
    pieces = zip(actions, *(np.split(x.numpy().astype(np.float32), splits) for x in columns))
    found, logprobs = [], []
    for own, ref_logprobs, rewards, of_policy in pieces:
        given = {"terminated": True, "prompt_index": 0, "source": "", "reward": 0.0, "label": True}
        found.append(Episode([1], own.tolist(), rewards, ref_logprobs=ref_logprobs, **given))
        logprobs.append(of_policy)
    return found, logprobs


def loss_of(objective, episodes, logprobs):
    batch = collate(episodes, 0)
    stats = stats_of(torch.from_numpy(np.concatenate(logprobs)).requires_grad_(True))
    loss, _ = objective(stats, batch.columns, batch.cu_seqlens)
    loss.backward()
    return loss, stats.logprobs.grad, batch


def test_of_the_optimal_policy_it_is_the_optimal_value_and_nothing_is_left_to_learn():
    optimum = TREE.optimum()
    episodes, logprobs = paths(optimum.log_policy)
    objective = DQO(nll_coef=0.0, beta=TREE.beta, is_level="none")
    add_columns(objective, episodes, logprobs, TREE.beta, mean=-99.0)
    values = np.concatenate([e.columns["values"] for e in episodes])
    np.testing.assert_allclose(values, optimum.v[TREE.states].numpy(), atol=1e-5)
    loss, gradient, _ = loss_of(objective, episodes, logprobs)
    assert loss < 1e-8 and gradient.abs().max() < 1e-4
    for e in episodes:
        e.columns["values"] = e.columns["values"] + 0.5
    assert loss_of(objective, episodes, logprobs)[0] > 1e-2


def test_of_the_live_policy_every_residual_is_that_of_dro():
    torch.manual_seed(0)
    live = torch.randn_like(TREE.ref_logits).log_softmax(-1)
    episodes, logprobs = paths(live)
    objective = DQO(nll_coef=0.0, beta=0.3, is_level="none", value_coef=0.0)
    add_columns(objective, episodes, logprobs, 0.3, mean=0.0)
    for e, own in zip(episodes, logprobs):
        loss = loss_of(objective, [e], [own])[0]
        whole = loss_of(DRO(beta=0.3, policy_scale=1.0, value_coef=0.0), [e], [own])[0]
        torch.testing.assert_close(loss, e.action_count * whole)  # a token has the residual of the whole response


def test_where_it_begins_and_what_a_cut_response_is_worth():
    episodes, logprobs = paths(TREE.optimum().log_policy)
    one, two = episodes[:2]
    other = dataclasses.replace(episodes[2], prompt_ids=[2])
    objective = DQO(beta=0.1)
    add_columns(objective, [one, two, other], logprobs[:3], 0.5, mean=7.0)

    def soft(e, own):
        return float((e.rewards - 0.5 * (own - e.ref_logprobs)).sum())

    begins = [e.columns["values"][0] for e in (one, two, other)]
    assert begins == pytest.approx([soft(two, logprobs[1]), soft(one, logprobs[0]), 7.0], abs=1e-5)
    assert "bootstrap" not in one.columns
    cut = dataclasses.replace(two, terminated=False, columns={})
    add_columns(objective, [one, cut, other], logprobs[:3], 0.5, mean=7.0)
    assert one.columns["values"][0] == 7.0  # a cut response does not tell what it would have earned
    assert one.columns["bootstrap"].tolist() == [0.0] * one.action_count
    end = cut.columns["values"][0] - soft(cut, logprobs[1])
    assert cut.columns["bootstrap"][-1] == pytest.approx(end, abs=1e-5) and not cut.columns["bootstrap"][:-1].any()
    assert mean_return(DQO(gamma=0.5), [one, cut]) == pytest.approx(one.rewards @ 0.5 ** np.arange(one.action_count))


@pytest.fixture
def first(files):
    """A finished run of the model."""
    train(load_options(arguments(files, output_dir=files / "first", value_model="none", beta=0.3, max_steps=3)))
    return files / "first"


def options(files, run, *flags, **changes):
    settings = {"value_model": f"implied:{run}", "max_steps": 4, "save_steps": 2, "beta": 0.1} | changes
    return load_options([*arguments(files, **settings), *flags])


def test_a_run_reads_the_values_that_another_implies_and_keeps_no_model_of_it(files, first, capsys):
    trainer = begin(options(files, first, value_warmup_steps=2))
    prepared = trainer.prepared
    assert prepared.learner.value_model is None and prepared.implied.policy is None
    assert [stretch.phase.trains for stretch in trainer.stretches] == [("policy",)]
    said = capsys.readouterr().out
    assert f"V is what the policy of {first} implies, with its beta 0.3" in said and "frozen pass: " in said
    for episodes in (list(prepared.episodes()), distinct(prepared.held_out)):
        scores = token_scores(load_run(first, dtype="float32"), episodes, ["logprobs", "ref_logprobs"])
        values = [e.columns["values"] for e in episodes]
        add_columns(DQO(), episodes, [s["logprobs"] for s in scores], 0.3, mean_return(DQO(), prepared.episodes()))
        for e, found in zip(episodes, values):
            np.testing.assert_allclose(found, e.columns["values"], atol=1e-4)
    held_out = trainer.run("implied")
    trainer.finish()
    assert 0 <= held_out["eval_value/auc_half"] <= 1 and np.isfinite(held_out["eval_loss"])
    assert not (files / "out" / "critic").exists()
    assert run_of(trainer, held_out).prepared.learner.value_model is None
    computed = capsys.readouterr().out
    assert train(options(files, first)).steps == 4  # goes on, and finds every number in the cache
    assert "pass: " not in capsys.readouterr().out + computed
    save(policy(seed=7), tokenizer(), files / "new")
    (files / "new" / "model.safetensors").rename(first / "model.safetensors")
    with pytest.raises(UserError, match="implied values"):
        train(options(files, first))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target_ema", "0.9"], "target_ema must be None with value_model implied"),
        (["--target", "residual"], "target must be detach with value_model implied, whose values have no gradient"),
        (["--value_loss", "bce"], "value_loss bce is for value_model separate or head, not implied:"),
        (["--value_init", "mean_return"], "value_init mean_return is for value_model separate or head"),
        (["--gamma", "0"], "gamma must be above 0 with value_model implied:"),
        (["--value_model", "implied:"], "value_model must be separate, .*, implied:RUN, or the directory of"),
        (["--value_model", "implied:gone"], "value_model implied:gone: there is no such directory"),
        (["--freeze_value_model"], "freeze_value_model needs a value model that was fitted"),
    ],
)
def test_options_that_fit_no_implied_values_are_refused(files, flags, said):
    save(policy(), tokenizer(), files / "finished")
    (files / "finished" / "config.yaml").write_text(f"model_name_or_path: {files / 'model'}\nbeta: 0.3\n")
    with pytest.raises(UserError, match=said) as caught:
        begin(options(files, files / "finished", *flags))
    assert "\n" not in str(caught.value)


def test_a_run_that_implies_no_values_of_this_model_is_refused(files):
    def refused(said, config, model=None, tok=None, **changes):
        name = f"run-{len(list(files.iterdir()))}"
        save(model or policy(), tok or tokenizer(), files / name)
        (files / name / "config.yaml").write_text(config)
        with pytest.raises(UserError, match=said) as caught:
            begin(options(files, files / name, output_dir=files / f"out-{name}", **changes))
        assert "\n" not in str(caught.value)

    save(policy(seed=5), tokenizer(), files / "other")
    own, digits = f"model_name_or_path: {files / 'model'}\n", character_tokenizer("9876543210+-*=#\n")
    refused("is a run of method rft, which does not fit", f"method: rft\n{own}")
    refused("is a run of method dpo, which does not fit", f"method: dpo\nbeta: 0.1\n{own}")
    refused(
        "has another tokenizer than the policy: token 3 is '9'",
        f"beta: 0.1\n{own}",
        tok=digits,
    )
    refused("was trained against another reference .*other", f"beta: 0.1\nmodel_name_or_path: {files / 'other'}\n")
