import numpy as np
import pytest
import torch

from dqo.batches import collate
from dqo.errors import UserError
from dqo.models import policy_stats
from dqo.reference import add_reference, check_agreement, warn_about_behavior
from tests.dqo.helpers import episodes, policy


def test_every_episode_gets_its_own_log_probabilities_whatever_the_batch():
    members = episodes(9, reference=False)
    add_reference(members, policy(), 0, max_tokens=64, quiet=True)
    for e in members:
        stats = policy_stats(policy(), collate([e], 0))
        assert np.allclose(e.ref_logprobs, stats.logprobs.detach(), atol=1e-6)
        assert np.allclose(e.ref_lse, stats.lse.detach(), atol=1e-5)


def test_a_policy_that_is_not_its_reference_is_stopped_at_step_0():
    members = episodes(9, reference=False)
    model = policy()
    add_reference(members, model, 0, max_tokens=64, quiet=True)
    check_agreement(members, model, 0)
    with torch.no_grad():
        model.lm_head.weight[5] += 0.01
    with pytest.raises(UserError, match="differ from the initial policy's"):
        check_agreement(members, model, 0)


def test_stored_log_probabilities_of_another_distribution_are_noticed(caplog):
    members = episodes(9)
    for e in members:
        e.behavior_logprobs = e.ref_logprobs + np.float32(0.01)
    warn_about_behavior(members)
    assert not caplog.records
    for e in members:
        e.behavior_logprobs = e.ref_logprobs / np.float32(0.5)
    warn_about_behavior(members)
    assert "differ from the reference policy's by" in caplog.text
