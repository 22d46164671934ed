import json

import pytest
import torch

from dqo.data.batches import collate
from dqo.errors import UserError
from dqo.models.critic import load_critic, save_value_model
from dqo.models.policy import hidden_positions, policy_stats
from dqo.models.q_model import q_model_from
from tests.dqo.helpers import episodes, policy

BETA = 0.3


def batch_of(reference):
    members = episodes(3)
    batch = collate(members, 0)
    stats = policy_stats(reference, batch)
    batch.columns.update(ref_logprobs=stats.logprobs.detach(), ref_lse=stats.lse.detach())
    return batch


def logits_of(model, batch):
    return model(batch.input_ids).logits.flatten(0, 1)[batch.states].detach().double()


def test_q_and_values_are_those_of_the_definition_over_the_whole_vocabulary():
    pi, reference, own = policy(seed=0), policy(seed=1), policy(seed=2)
    batch = batch_of(reference)
    model = q_model_from(own, BETA, "hash")
    q, values = model.q_and_values(batch)
    l_pi, l_ref, l_q = (logits_of(m, batch) for m in (pi, reference, own))
    table = BETA * (l_q - l_ref)
    assert torch.allclose(q.double(), table.gather(-1, batch.actions[:, None])[:, 0], atol=1e-5)
    log_pi, log_ref = l_pi.log_softmax(-1), l_ref.log_softmax(-1)
    under = (log_pi.exp() * (table - BETA * (log_pi - log_ref))).sum(-1)
    found = model.values_under(pi, hidden_positions(pi, batch)[batch.states], batch)
    assert torch.allclose(found.double(), under, atol=1e-5) and not found.requires_grad
    best = table - BETA * (l_q.log_softmax(-1) - log_ref)  # of softmax(q), the same for every action
    assert torch.allclose(values.double()[:, None], best, atol=1e-5) and bool((values.double() >= under - 1e-5).all())
    q.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_one_that_is_the_reference_has_q_0():
    reference = policy(seed=1)
    q, values = q_model_from(reference, BETA, "hash").q_and_values(batch_of(reference))
    assert q.abs().max() < 1e-5 and values.abs().max() < 1e-5


def test_it_is_saved_and_loaded_and_a_damaged_one_is_refused(tmp_path):
    model = q_model_from(policy(seed=2), BETA, "hash")
    save_value_model(model, model.state_dict(), tmp_path)
    again = load_critic(tmp_path)
    assert again.beta == BETA and again.value_form == model.value_form
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    (tmp_path / "q_model.json").write_text(json.dumps({"beta": BETA}))
    with pytest.raises(UserError, match=r"has a damaged q_model.json \('reference'\); copy the directory again"):
        load_critic(tmp_path)


def test_responses_without_a_reference_are_refused():
    with pytest.raises(UserError, match="a Q-model is relative to the reference"):
        q_model_from(policy(), BETA, "hash").q_and_values(collate(episodes(2, reference=False), 0))
