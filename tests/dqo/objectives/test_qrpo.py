import math

import numpy as np
import pytest
import torch

from dqo.data.selection import selected
from dqo.errors import UserError
from dqo.objectives import QRPO
from tests.dqo.helpers import episodes
from tests.dqo.objectives.packed import differences, lbfgs, random_case, stats_of
from tests.tabular import random_tree


def of_one_prompt(rewards, objective):
    """The targets of responses with these rewards."""
    members = episodes(len(rewards))
    for e, reward in zip(members, rewards):
        e.prompt_index, e.reward = 0, reward
    groups = selected(objective, members)
    assert [group[0] for group in groups] == members and all(len(group) == 1 for group in groups)
    assert all((e.columns["quantile_target"] == e.columns["quantile_target"][0]).all() for e in members)
    return [float(e.columns["quantile_target"][0]) for e in members]


def test_the_loss_of_one_response_by_hand():
    rows = {
        "ref_logprobs": torch.tensor([-1.2, -1.3]),
        "quantile_target": torch.tensor([0.7, 0.7]),
        "label": torch.ones(2),
    }
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss, metrics = QRPO(beta=0.5)(stats_of(logprobs), rows, torch.tensor([0, 2]))
    error = 0.7 - 0.5 * 0.5  # S = 0.2 + 0.3
    assert math.isclose(loss.item(), error**2, rel_tol=1e-6)
    assert torch.allclose(metrics["qrpo/error_abs_mean"], torch.tensor([error, 1.0]))
    loss.backward()
    assert torch.allclose(logprobs.grad, torch.tensor([-2 * 0.5 * error] * 2))


def test_targets_of_right_and_wrong_responses_by_hand():
    # a quarter is right: quantiles 0.75 of the wrong and 1 of the right; Z = 3/4 exp(0.75 / 0.5) + 1/4 exp(1 / 0.5)
    scaled = 0.5 * math.log(0.75 * math.exp(1.5) + 0.25 * math.exp(2.0))
    found = of_one_prompt([0.0, 1.0, 0.0, 0.0], QRPO(beta=0.5))
    assert found == pytest.approx([0.75 - scaled, 1 - scaled, 0.75 - scaled, 0.75 - scaled])
    assert of_one_prompt([1.0, 1.0, 1.0], QRPO(beta=0.5)) == pytest.approx([0.0] * 3, abs=1e-7)
    tiny = of_one_prompt([0.0, 1.0], QRPO(beta=1e-4))  # exp(1 / beta) is no number
    assert tiny == pytest.approx([-0.5 + 1e-4 * math.log(2), 1e-4 * math.log(2)], abs=1e-7)


def test_many_rewards_of_which_no_two_are_equal_have_the_closed_form():
    rewards = np.random.default_rng(0).normal(size=400).tolist()
    for beta in (1.0, 0.2):
        exact, closed = (of_one_prompt(rewards, QRPO(beta=beta, partition=kind)) for kind in ("atoms", "continuous"))
        assert closed == pytest.approx(exact, abs=0.01)
        quantile = np.argsort(np.argsort(rewards)) / 400 + 1 / 400
        formula = quantile - beta * math.log(beta * (math.exp(1 / beta) - 1))
        assert closed == pytest.approx(formula.tolist(), abs=1e-6)
    ties = [0.0, 1.0, 0.0, 0.0]
    assert abs(of_one_prompt(ties, QRPO(beta=0.5))[0] - of_one_prompt(ties, QRPO(0.5, "continuous"))[0]) > 0.1


@pytest.mark.parametrize("rewards", [(0.0, 1.0, 0.0, 1.0), (0.3, -2.0, 5.0, 0.3), (1.0, 1.0, 1.0, 1.0)], ids=str)
def test_the_optimum_of_a_tabular_prompt_is_reached(rewards):
    """One state with four actions, which the reference takes in 1, 2, 2 and 3 of 8 samples: the quantiles and Z are exact, and
    the policy arrives at ref * exp(Q / beta) / Z."""
    beta, counts = 0.4, [1, 2, 2, 3]
    tree = random_tree(0, depth=1, num_actions=4)
    tree.ref_logits[0] = torch.tensor(counts, dtype=torch.float64).log()
    place = torch.empty(4, dtype=torch.int64)
    place[tree.actions] = torch.arange(4)  # the trajectory of each action
    sampled = [action for action, count in enumerate(counts) for _ in range(count)]
    target = torch.tensor(of_one_prompt([rewards[action] for action in sampled], QRPO(beta=beta))).double()
    order = [int(place[action]) for action in sampled]
    found = lbfgs(tree, QRPO(beta=beta), order, {"quantile_target": target})
    share = torch.tensor(counts).double() / 8
    quantile = torch.tensor([sum(s for s, r in zip(share.tolist(), rewards) if r <= own) for own in rewards]).double()
    partition = (share * (quantile / beta).exp()).sum()
    assert torch.allclose(found.softmax(-1)[0], share * (quantile / beta).exp() / partition, atol=1e-6)


def test_it_is_the_paper_s_loss_and_the_gradient_agrees_with_differences():
    logits, make, rows, cu_seqlens = random_case([3, 1, 4, 2])
    targets = torch.tensor([0.3, -0.2, 0.9, 0.1]).double()
    rows["quantile_target"] = targets.repeat_interleave(cu_seqlens.diff())

    def paper(logits):
        delta = make(logits).logprobs - rows["ref_logprobs"]
        return sum((t - 0.7 * piece.sum()) ** 2 for t, piece in zip(targets, delta.split(cu_seqlens.diff().tolist())))

    leaf = logits.clone().requires_grad_()
    loss, _ = QRPO(beta=0.7)(make(leaf), rows, cu_seqlens)
    loss.backward()
    assert torch.allclose(loss, paper(logits), rtol=1e-12)
    assert torch.allclose(leaf.grad, differences(paper, logits), atol=1e-8)


def test_prompts_with_one_response_each_are_refused_with_their_number():
    members = episodes(3)
    for i, e in enumerate(members):
        e.prompt_index = i
    with pytest.raises(UserError, match="each of the 3 prompts has one response; `dqo sample --num_generations 8`"):
        selected(QRPO(), members)
    assert selected(QRPO(), []) == []


def test_options_out_of_range_are_named():
    assert [name for name, _ in QRPO(beta=0.0).problems()] == ["beta"]
    assert QRPO().problems() == []
