import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqo.data.selection import selected
from dqo.objectives import DRO, REBEL
from dqo.objectives.sums import sequence_sums
from tests.dqo.helpers import episodes
from tests.dqo.objectives.packed import differences, lbfgs, random_case, stats_of
from tests.tabular import random_tree


def call(objective, logprobs, ref_logprobs, rewards, cu_seqlens):
    rows = {"ref_logprobs": torch.tensor(ref_logprobs), "rewards": torch.tensor(rewards)}
    rows["label"] = torch.ones(len(logprobs))
    stats = stats_of(torch.tensor(logprobs, requires_grad=True))
    loss, metrics = objective(stats, rows, torch.tensor(cu_seqlens))
    return loss, metrics, stats.logprobs


# S = 0.2 + 0.3 = 0.5 and -0.1; R = 0.25 + 1 = 1.25 and 0.5
ARGUMENTS = ([-1.0, -1.0, -1.0], [-1.2, -1.3, -0.9], [0.25, 1.0, 0.5], [0, 2, 3])


def test_the_loss_of_one_pair_by_hand():
    loss, metrics, logprobs = call(REBEL(beta=0.5), *ARGUMENTS)
    error = 0.5 * (0.5 + 0.1) - (1.25 - 0.5)  # 0.3 - 0.75
    assert math.isclose(loss.item(), error**2, rel_tol=1e-6)
    assert torch.allclose(metrics["rebel/error_abs_mean"], torch.tensor([0.45, 1.0]))
    assert torch.allclose(metrics["rewards/accuracies"], torch.tensor([1.0, 1.0]))
    loss.backward()
    slope = 2 * 0.5 * error
    assert torch.allclose(logprobs.grad, torch.tensor([slope, slope, -slope]))


def test_pairs_of_one_reward_have_a_loss_and_no_accuracy():
    loss, metrics, _ = call(REBEL(beta=0.5), *ARGUMENTS[:2], [0.0, 1.0, 1.0], [0, 2, 3])
    assert math.isclose(loss.item(), 0.3**2, rel_tol=1e-6)
    assert metrics["rewards/accuracies"].tolist() == [0.0, 0.0]


def test_it_is_the_paper_s_loss_and_the_gradient_agrees_with_differences():
    logits, make, rows, cu_seqlens = random_case([3, 1, 4, 2])

    def paper(logits):
        delta, total = make(logits).logprobs - rows["ref_logprobs"], 0.0
        bounds = cu_seqlens.tolist()
        for first in (0, 2):
            (a, b, c) = bounds[first : first + 3]
            log_ratios = delta[a:b].sum() - delta[b:c].sum()
            total = total + (0.7 * log_ratios - (rows["rewards"][a:b].sum() - rows["rewards"][b:c].sum())) ** 2
        return total

    leaf = logits.clone().requires_grad_()
    loss, _ = REBEL(beta=0.7)(make(leaf), rows, cu_seqlens)
    loss.backward()
    assert torch.allclose(loss, paper(logits), rtol=1e-12)
    assert torch.allclose(leaf.grad, differences(paper, logits), atol=1e-8)


def test_it_is_dro_whose_value_cancels():
    logits, make, rows, cu_seqlens = random_case([3, 4])
    rows["values"][cu_seqlens[:-1]] = 0.37  # one prompt
    dro = DRO(beta=0.7, policy_scale=1.0, value_coef=0.0)
    residuals = []  # R - V(x) - beta * S of each response, whose sign its loss has lost and its gradient in S has
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        logprobs = make(logits).logprobs[a:b].detach().requires_grad_()
        own = {name: x[a:b] for name, x in rows.items()}
        dro(stats_of(logprobs), own, torch.tensor([0, b - a]))[0].backward()
        residuals.append(-logprobs.grad[0] / 0.7)
    loss, _ = REBEL(beta=0.7)(make(logits), rows, cu_seqlens)
    assert torch.allclose(loss, (residuals[0] - residuals[1]).square(), rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_tabular_optimum_is_reached(seed):
    """A tree of states; each of its responses is paired with the next, and no value is known."""
    tree = random_tree(seed)
    count = len(tree.seqlens)
    order = [i for a in range(count) for i in (a, (a + 1) % count)]
    found = lbfgs(tree, REBEL(beta=tree.beta), order)
    assert (found.log_softmax(-1) - tree.optimum().log_policy).abs().max() < 1e-6


def test_every_option_changes_the_gradient():
    def gradient(objective):
        loss, _, logprobs = call(objective, *ARGUMENTS)
        loss.backward()
        return logprobs.grad

    assert not torch.allclose(gradient(REBEL()), gradient(REBEL(beta=0.3)))


def test_each_response_is_paired_with_the_next_of_its_prompt():
    members = episodes(7)
    for e, prompt in zip(members, (0, 1, 0, 2, 0, 1, 3)):
        e.prompt_index = prompt
    found = [[members.index(e) for e in pair] for pair in selected(REBEL(), members)]
    assert found == [[0, 2], [2, 4], [4, 0], [1, 5]]  # prompts 2 and 3 have one response
    assert selected(REBEL(), members[3:4]) == [] and selected(REBEL(), []) == []


@given(st.lists(st.integers(0, 3), max_size=12))
def test_all_pairs_of_any_number_of_responses(prompts):
    members = episodes(len(prompts))
    for e, prompt in zip(members, prompts):
        e.prompt_index = prompt
    found = [tuple(members.index(e) for e in pair) for pair in selected(REBEL(pairing="all"), members)]
    assert sorted(found) == [(a, b) for a, b in combinations(range(len(prompts)), 2) if prompts[a] == prompts[b]]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_all_pairs_are_the_spread_of_the_residuals(count):
    """sum over pairs of (e_i - e_j)^2 = K * sum e^2 - (sum e)^2, with e = beta * S - R: any constant V(x) cancels."""
    logits, make, rows, cu_seqlens = random_case([(3 * i) % 4 + 1 for i in range(count)])
    stats = make(logits)
    residuals = sequence_sums(0.7 * (stats.logprobs - rows["ref_logprobs"]) - rows["rewards"], cu_seqlens)
    bounds, total = cu_seqlens.tolist(), 0.0
    for a, b in combinations(range(count), 2):
        at = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in (a, b)])
        own = {name: x[at] for name, x in rows.items()}
        first = bounds[a + 1] - bounds[a]
        total += REBEL(beta=0.7)(stats_of(stats.logprobs[at]), own, torch.tensor([0, first, len(at)]))[0]
    expected = count * residuals.square().sum() - residuals.sum().square()
    assert torch.allclose(total, expected, rtol=1e-12)


def test_options_out_of_range_are_named():
    assert [name for name, _ in REBEL(beta=0.0).problems()] == ["beta"]
    assert REBEL().problems() == []
