import math

import pytest
import torch

from dqo.data.selection import selected
from dqo.objectives import DPO
from dqo_kernels import TokenStats
from tests.dqo.helpers import episodes
from tests.dqo.objectives.packed import differences, lbfgs
from tests.tabular import random_tree


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


# chosen: 0.2 + 0.3 = 0.5, a mean of 0.25; rejected: -0.1; margins 0.5 * 0.6 = 0.3, and 0.5 * 0.35 = 0.175 of means
PAIR = ([-1.0, -1.0, -2.0], [-1.2, -1.3, -1.9], [0, 2, 3])


def sigmoid_loss(margin):
    return math.log(1 + math.exp(-margin))


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"label_smoothing": 0.2}, 0.8 * sigmoid_loss(0.3) + 0.2 * sigmoid_loss(-0.3)),
        ({"loss_type": "robust", "label_smoothing": 0.2}, (0.8 * sigmoid_loss(0.3) - 0.2 * sigmoid_loss(-0.3)) / 0.6),
        ({"loss_type": "ipo"}, (0.35 - 1.0) ** 2),  # 1 / (2 * 0.5)
        ({"length_normalized": True}, sigmoid_loss(0.175)),
        ({"rpo_alpha": 0.7}, sigmoid_loss(0.3) + 0.7 * 1.0),
        ({"loss_type": "ipo", "rpo_alpha": 0.7}, (0.35 - 1.0) ** 2 + 0.7 * 1.0),
    ],
    ids=str,
)
def test_each_variant_by_hand(options, expected):
    loss, metrics, logprobs = call(DPO(beta=0.5, **options), *PAIR)
    assert math.isclose(loss.item(), expected, rel_tol=1e-5)
    assert torch.allclose(metrics["rewards/margins"], torch.tensor([0.3, 1.0]))  # of all variants the same
    loss.backward()
    again = lambda x: call(DPO(beta=0.5, **options), x.tolist(), *PAIR[1:])[0].detach()  # noqa: E731
    exact = differences(again, logprobs.detach(), 1e-2)
    assert torch.allclose(logprobs.grad, exact, atol=2e-3)


def test_the_robust_loss_of_labels_a_share_of_which_is_wrong_is_that_of_clean_labels():
    margins = torch.linspace(-3, 3, 13, dtype=torch.float64)
    robust = DPO(loss_type="robust", label_smoothing=0.3)
    expected = 0.7 * robust.of_margins(margins) + 0.3 * robust.of_margins(-margins)
    assert torch.allclose(expected, DPO().of_margins(margins))
    for e in (DPO(loss_type="robust"), DPO(label_smoothing=0.0)):
        assert torch.equal(e.of_margins(margins), DPO().of_margins(margins))


@pytest.mark.parametrize(
    "options, step",
    [({"label_smoothing": 0.2}, math.log(0.8 / 0.2) / 0.5), ({"loss_type": "ipo"}, 1 / (2 * 0.5))],
    ids=["smoothed", "ipo"],
)
def test_the_optimum_of_a_chain_of_preferences_is_reached(options, step):
    """One state, whose actions are each preferred to the next: each step of the chain has the margin that minimises its pair's
    loss, so that the optimum is ref * exp(-step * place)."""
    tree = random_tree(0, depth=1, num_actions=5)
    chain = [i for a in range(4) for i in (a, a + 1)]
    found = lbfgs(tree, DPO(beta=0.5, **options), chain)
    places = torch.empty(5, dtype=torch.float64)
    places[tree.actions] = torch.arange(5.0, dtype=torch.float64)
    expected = (tree.ref_logits.log_softmax(-1) - step * places).log_softmax(-1)
    assert (found.log_softmax(-1) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    "options, named",
    [
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": float("nan")}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing"),
        ({"length_normalized": True, "loss_type": "ipo"}, "length_normalized"),
        ({"rpo_alpha": -1.0}, "rpo_alpha"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    assert [name for name, _ in DPO(**options).problems()] == [named]
    assert DPO().problems() == [] == DPO(loss_type="ipo").problems()
