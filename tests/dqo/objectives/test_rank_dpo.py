import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqo.data.selection import selected
from dqo.errors import UserError
from dqo.objectives import DPO
from dqo.objectives.rank_dpo import TIED, RankDPO, exchange
from tests.dqo.helpers import episodes
from tests.dqo.objectives.packed import differences, random_case, stats_of
from tests.tabular import random_tree


def call(objective, scores, gains, groups=None):
    """Of responses of one token each, whose log-ratios are the scores."""
    n = len(scores)
    rows = {
        "ref_logprobs": torch.zeros(n, dtype=torch.float64),
        "gain": torch.tensor(gains, dtype=torch.float64),
        "label": torch.ones(n),
        "group": torch.tensor(groups or [0] * n),
    }
    logprobs = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    loss, metrics = objective(stats_of(logprobs), rows, torch.arange(n + 1))
    return loss, metrics, logprobs


def by_loops(objective, scores, gains):
    """Eqs. 5 to 7, for scores of which no two are tied."""
    rank = {i: place + 1 for place, i in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]))}
    total = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if gains[i] > gains[j]:
                weight = (gains[i] - gains[j]) * abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                total += weight * math.log(1 + math.exp(-objective.beta * (scores[i] - scores[j])))
    return total


def test_the_loss_of_one_list_by_hand():
    # ranks 2, 1, 3; the pairs (0, 1) and (0, 2) have gains 1 and 0, the third pair is tied in its reward
    loss, metrics, logprobs = call(RankDPO(beta=0.5), [0.1, 0.5, -0.3], [1.0, 0.0, 0.0])
    first, second = 1 / math.log(2) - 1 / math.log(3), 1 / math.log(3) - 1 / math.log(4)
    assert math.isclose(loss.item(), first * math.log(1 + math.exp(0.2)) + second * math.log(1 + math.exp(-0.2)))
    assert metrics["rewards/accuracies"].tolist() == [1.0, 2.0]
    assert metrics["rewards/margins"].tolist() == pytest.approx([-0.2 + 0.2, 2.0])
    loss.backward()
    slopes = [-0.5 * first / (1 + math.exp(-0.2)), -0.5 * second / (1 + math.exp(0.2))]  # weights have no gradient
    assert logprobs.grad.tolist() == pytest.approx([sum(slopes), -slopes[0], -slopes[1]])


places = st.lists(st.integers(-8, 8), min_size=1, max_size=6, unique=True)


@given(places, st.data())
def test_any_list_is_the_equations_whatever_the_order_of_its_responses(scores, data):
    scores = [score / 4 for score in scores]
    gains = data.draw(st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=len(scores), max_size=len(scores)))
    loss, _, _ = call(RankDPO(beta=0.7), scores, gains)
    assert loss.item() == pytest.approx(by_loops(RankDPO(beta=0.7), scores, gains), abs=1e-12)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_tied_scores_have_the_mean_over_all_their_orders(scores):
    scores = sorted((float(score) for score in scores), reverse=True)
    found = exchange(torch.tensor(scores, dtype=torch.float64), torch.zeros(len(scores), dtype=torch.int64))
    orders = [o for o in permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in zip(o, o[1:]))]
    expected = torch.zeros_like(found)
    for order in orders:
        discount = {i: 1 / math.log(2 + place) for place, i in enumerate(order)}
        for i, j in combinations(range(len(scores)), 2):
            expected[i, j] += abs(discount[i] - discount[j]) / len(orders)
    upper = torch.triu(torch.ones_like(found, dtype=torch.bool), diagonal=1)
    assert torch.allclose(found[upper], expected[upper]) and torch.allclose(found, found.T)


def test_lists_know_nothing_of_each_other():
    scores, gains = [0.3, -0.2, 0.1, 0.7, 0.0], [1.0, 0.0, 0.3, 0.0, 1.0]
    whole, _, _ = call(RankDPO(), scores, gains, [0, 0, 1, 1, 1])
    parts = call(RankDPO(), scores[:2], gains[:2])[0] + call(RankDPO(), scores[2:], gains[2:])[0]
    assert whole.item() == pytest.approx(parts.item(), abs=1e-12)


def test_rounding_decides_no_order():
    scores, gains = [0.0, 0.2 * TIED, -0.3 * TIED], [0.0, 1.0, 0.5]
    loss, _, _ = call(RankDPO(), scores, gains)
    exact, _, _ = call(RankDPO(), [0.0, 0.0, 0.0], gains)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3) and exact > 0.1


def test_of_two_responses_it_is_dpo_times_a_constant():
    logits, make, rows, cu_seqlens = random_case([3, 1, 4, 2])
    rows["gain"] = torch.tensor([1.0, 0.0, 1.0, 0.0]).double().repeat_interleave(cu_seqlens.diff())
    constant = 1 / math.log(2) - 1 / math.log(3)
    gradients = []
    for objective, scale in ((RankDPO(beta=0.3), 1.0), (DPO(beta=0.3), constant)):
        leaf = logits.clone().requires_grad_()
        loss = scale * objective(make(leaf), rows, cu_seqlens)[0]
        loss.backward()
        gradients.append((loss.detach(), leaf.grad))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*gradients))


def test_the_gradient_agrees_with_differences():
    logits, make, rows, cu_seqlens = random_case([3, 1, 4, 2, 2])
    rows["gain"] = torch.tensor([1.0, 0.3, 0.0, 0.3, 0.0]).double().repeat_interleave(cu_seqlens.diff())
    rows["group"] = torch.tensor([0, 0, 0, 1, 1]).repeat_interleave(cu_seqlens.diff())
    leaf = logits.clone().requires_grad_()
    RankDPO(beta=0.7)(make(leaf), rows, cu_seqlens)[0].backward()
    exact = differences(lambda x: RankDPO(beta=0.7)(make(x), rows, cu_seqlens)[0], logits)
    assert torch.allclose(leaf.grad, exact, atol=1e-8)


def test_on_the_tabular_tree_responses_come_into_the_order_of_their_rewards():
    """log sigmoid has no finite optimum; of one list of all responses the scores end in the order of the rewards."""
    tree = random_tree(0, depth=2, num_actions=2)
    bounds = tree.cu_seqlens
    rewards = torch.zeros(len(tree.seqlens), dtype=torch.float64).index_add(0, tree.sequences, tree.rewards)
    reference = tree.ref_logits.log_softmax(-1)[tree.states, tree.actions]
    rows = {
        "ref_logprobs": reference,
        "label": torch.ones(len(reference)),
        "group": torch.zeros(len(reference), dtype=int),
    }
    rows["gain"] = rewards.argsort().argsort().double()[tree.sequences]
    logits = tree.ref_logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        logprobs = logits.log_softmax(-1)[tree.states, tree.actions]
        RankDPO(beta=1.0)(stats_of(logprobs), rows, bounds)[0].backward()
        optimizer.step()
    logprobs = logits.detach().log_softmax(-1)[tree.states, tree.actions] - reference
    scores = torch.zeros_like(rewards).index_add(0, tree.sequences, logprobs)
    assert len(rewards) > 2 and torch.equal(scores.argsort(), rewards.argsort())


def test_a_list_is_all_responses_of_a_prompt_whose_rewards_differ():
    members = episodes(7)
    for e, prompt, reward in zip(members, (0, 1, 0, 1, 0, 2, 1), (1.0, 0.5, 1.0, 0.5, 0.25, 1.0, 0.5)):
        e.prompt_index, e.reward = prompt, reward
    (found,) = selected(RankDPO(), members)
    assert [members.index(e) for e in found] == [0, 2, 4]
    assert np.allclose(found[2].columns["gain"], 2**0.25 - 1)
    members[3].reward = 70.0
    with pytest.raises(UserError, match="row 4 has the reward 70; bring rewards between 0 and 1 with --reward_scale"):
        selected(RankDPO(), members)


def test_options_out_of_range_are_named():
    assert [name for name, _ in RankDPO(beta=0.0).problems()] == ["beta"]
    assert RankDPO().problems() == []
