"""Value models of every form: what they read, what their outputs mean, and that a file brings them back."""

import dataclasses
from functools import partial

import pytest
import torch

from benchmarks.trainer.small_models import small_model
from dqo.data.batches import collate
from dqo.errors import UserError
from dqo.models.critic import (
    DIRECTION,
    ValueHead,
    load_critic,
    make_value_model,
    save_value_model,
    score_of,
    value_rows,
)
from dqo.models.lora import lora_config, merged_state
from dqo.models.policy import hidden_positions, ready
from dqo.models.value_form import ValueForm, form_of
from dqo.objectives import DQO
from dqo.train.learner import Learner, objective_sums, update_target
from tests.dqo.helpers import episodes, gpt2, policy

FORMS = [
    ValueForm("bce", -0.5, 2.0),
    ValueForm("hl_gauss", -0.5, 2.0),
    ValueForm(input="ref_logprob", reference="abc"),
    ValueForm("hl_gauss", 0.0, 1.0, "ref_logprob"),
]
READING = ValueForm(input="ref_logprob")
every_kind = pytest.mark.parametrize("kind", ["separate", "head"])
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.loss} {f.input}")


def rows_of(value_model, model, batch):
    return value_rows(value_model, batch, hidden_positions(model, batch))


def disturbed(value_model):
    """The parameters that are zero in a new one get numbers."""
    torch.manual_seed(3)
    last = value_model.outer if isinstance(value_model, ValueHead) else score_of(value_model)
    torch.nn.init.normal_(last.weight)
    for name, parameter in value_model.named_parameters():
        if name == DIRECTION:
            torch.nn.init.normal_(parameter)
    return value_model


@every_kind
@every_form
def test_it_starts_where_it_is_told_and_comes_back_from_its_files(kind, form, tmp_path):
    model, batch = policy(), collate(episodes(4), 0)
    start = make_value_model(kind, model, form=form, start=0.8)
    for values in rows_of(start, model, batch):
        assert torch.allclose(values, torch.full_like(values, 0.8), atol=1e-4)
    zero = rows_of(make_value_model(kind, model, form=form), model, batch)[0]
    assert torch.allclose(zero, torch.full_like(zero, (form.low + form.high) / 2), atol=1e-6)
    critic = disturbed(make_value_model(kind, model, form=form))
    save_value_model(critic, critic.state_dict(), tmp_path)
    again = load_critic(tmp_path)
    assert form_of(again) == form and again.state_dict().keys() == critic.state_dict().keys()
    for one, two in zip(rows_of(again, model, batch), rows_of(critic, model, batch)):
        assert torch.equal(one, two) and one.std() > 0


@pytest.mark.parametrize("make", [policy, gpt2, partial(small_model, "gemma3_text")])
@pytest.mark.parametrize("packed", [False, True])
def test_a_value_knows_how_likely_each_earlier_token_was_and_no_later_one(make, packed):
    model, its_episodes = ready(make(), "cpu"), episodes(4, seed=1)
    if packed and make is not policy:
        pytest.skip("only packing attention packs several responses")
    its_episodes = its_episodes[:1] if packed else its_episodes
    whole = collate(its_episodes, 0, packed=packed)
    for kind in ("separate", "head"):
        critic = disturbed(make_value_model(kind, model, form=READING))
        before = torch.cat(rows_of(critic, model, whole))
        for changed in (0, 3, len(whole.states) - 1):
            columns = dict(whole.columns)
            columns["ref_logprobs"] = columns["ref_logprobs"].index_fill(0, torch.tensor([changed]), -3.0)
            after = torch.cat(rows_of(critic, model, dataclasses.replace(whole, columns=columns)))
            # s_{t+1} of row t is the next row, or the end of the response
            own = [e for e in range(len(its_episodes)) if whole.cu_seqlens[e] <= changed < whole.cu_seqlens[e + 1]][0]
            later = [*range(changed + 1, int(whole.cu_seqlens[own + 1])), len(whole.states) + own]
            others = [i for i in range(len(before)) if i not in later]
            assert (before[later] != after[later]).all() and torch.equal(before[others], after[others])


def test_a_new_direction_changes_nothing_and_learns():
    model, batch = policy(), collate(episodes(4), 0)
    plain, reading = make_value_model("separate", model), make_value_model("separate", model, form=READING)
    assert torch.equal(hidden_positions(plain, batch), hidden_positions(reading, batch))
    torch.nn.init.ones_(score_of(reading).weight)
    value_rows(reading, batch)[0].sum().backward()
    assert reading.get_parameter(DIRECTION).grad.any()


@every_kind
def test_responses_without_the_references_word_are_refused(kind):
    model, batch = policy(), collate(episodes(2, reference=False), 0)
    with pytest.raises(UserError, match="reads the reference's log-probabilities .value_input ref_logprob., and these"):
        rows_of(make_value_model(kind, model, form=READING), model, batch)


@every_kind
@pytest.mark.parametrize("loss", ["bce", "hl_gauss"])
def test_a_fit_recovers_the_returns(kind, loss):
    """Of a policy that is its reference: returns are rewards to go, here 0 or 1 a response."""
    model, its_episodes = policy(), episodes(8)
    for e in its_episodes:
        e.ref_logprobs = e.ref_lse = None
        e.rewards[:] = 0.0
        e.rewards[-1] = e.reward
    batch = collate(its_episodes, 0)
    batch.columns["ref_logprobs"] = torch.zeros(len(batch.states))
    objective = DQO(beta=1e-6, value_loss=loss, is_level="none")
    learner = Learner(model, make_value_model(kind, model, form=ValueForm(loss, 0.0, 1.0)))
    optimizer = torch.optim.Adam(learner.value_model.parameters(), 2e-2)
    for _ in range(80):
        optimizer.zero_grad()
        sums, metrics = objective_sums(learner, objective, batch, trains=("critic",))
        sums.backward()
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    values, wanted = rows_of(learner.value_model, model, batch)[0], batch.columns["label"]
    assert (values - wanted).abs().mean() < 0.15  # from a half


@every_kind
def test_every_parameter_gets_a_gradient_in_bf16_and_with_adapters_too(kind):
    form, batch = FORMS[3], collate(episodes(6), 0)
    objective = DQO(value_model=kind, value_loss="hl_gauss", target_ema=0.5, lam=0.5)
    for bf16, config in ((False, None), (True, lora_config(2, 4.0, None))):
        model = policy()
        critic = disturbed(make_value_model(kind, model, config, form, 0.3))
        target = disturbed(make_value_model(kind, model, config, form, 0.6))
        learner = Learner(model, critic, target=target, bf16=bf16)
        loss, _ = objective_sums(learner, objective, batch)
        loss.backward()
        trained = {name for name, p in critic.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in critic.named_parameters() if p.grad is not None}
        if kind == "separate":
            assert DIRECTION in trained and critic.get_parameter(DIRECTION).grad.any()
            assert DIRECTION in merged_state(critic)
        before = [p.clone() for p in target.parameters()]
        update_target(learner, 0.5)
        assert any(not torch.equal(a, b) for a, b in zip(before, target.parameters()))
