import math

import torch

from dqo.data.selection import selected
from dqo.objectives import DPO
from dqo_kernels import TokenStats
from tests.dqo.helpers import episodes


def call(objective, logprobs, ref_logprobs, cu_seqlens):
    rows = {"ref_logprobs": torch.tensor(ref_logprobs), "label": torch.ones(len(logprobs))}
    stats = TokenStats(torch.tensor(logprobs, requires_grad=True), torch.zeros(0), torch.zeros(0))
    loss, metrics = objective(stats, rows, torch.tensor(cu_seqlens))
    return loss, metrics, stats.logprobs


def test_the_loss_of_one_pair_by_hand():
    # chosen: log-ratios 0.2 + 0.3 = 0.5; rejected: -0.1; margin 0.5 * (0.5 + 0.1) = 0.3
    loss, metrics, logprobs = call(DPO(beta=0.5), [-1.0, -1.0, -1.0], [-1.2, -1.3, -0.9], [0, 2, 3])
    assert math.isclose(loss.item(), math.log(1 + math.exp(-0.3)), rel_tol=1e-6)
    assert torch.allclose(metrics["rewards/margins"], torch.tensor([0.3, 1.0]))
    assert torch.allclose(
        metrics["rewards/rejected"], torch.tensor([-0.05, 1.0])
    )  # the worse of the pair, whatever its label
    assert torch.allclose(metrics["logps/rejected"], torch.tensor([-1.0, 1.0]))
    loss.backward()  # d loss / d log-ratio of chosen = -beta * sigmoid(-margin)
    slope = 0.5 / (1 + math.exp(0.3))
    assert torch.allclose(logprobs.grad, torch.tensor([-slope, -slope, slope]))


def test_a_policy_equal_to_its_reference_has_loss_log_2_a_pair():
    loss, _, _ = call(DPO(), [-1.0, -2.0, -0.5, -0.1], [-1.0, -2.0, -0.5, -0.1], [0, 1, 2, 3, 4])
    assert math.isclose(loss.item(), 2 * math.log(2), rel_tol=1e-6)


def test_pairs_have_one_prompt_and_the_better_response_first():
    members = episodes(12)
    for i, e in enumerate(members):
        e.prompt_index = i // 4
    paired = selected(DPO(), members)
    assert paired
    for chosen, rejected in paired:
        assert chosen.prompt_index == rejected.prompt_index
        assert chosen.reward > rejected.reward


def test_a_prompt_whose_responses_share_one_reward_gives_no_pair():
    members = episodes(4)
    for e in members:
        e.prompt_index, e.reward = 0, 1.0
    assert selected(DPO(), members) == []


def test_every_response_is_used_before_one_is_used_again():
    members = episodes(6)
    for i, e in enumerate(members):
        e.prompt_index, e.reward = 0, float(i < 2)  # 2 better, 4 worse
    paired = selected(DPO(max_pairs_per_prompt=4), members)
    assert {e.source for pair in paired for e in pair} == {e.source for e in members}
    assert len(paired) == 4
