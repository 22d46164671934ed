import math

import numpy as np
import pytest
import torch

from dqo.data.selection import selected
from dqo.errors import UserError
from dqo.objectives import KTO
from tests.dqo.helpers import episodes
from tests.dqo.objectives.packed import differences, random_case, stats_of


def call(objective, logprobs, ref_logprobs, labels, companion_mean, cu_seqlens):
    rows = {
        "ref_logprobs": torch.tensor(ref_logprobs),
        "label": torch.tensor(labels),
        "companion_mean": torch.full((len(logprobs),), companion_mean),
    }
    stats = stats_of(torch.tensor(logprobs, requires_grad=True))
    loss, metrics = objective(stats, rows, torch.tensor(cu_seqlens))
    return loss, metrics, stats.logprobs


# desirable: S = 0.2 + 0.3 = 0.5; undesirable: S = -0.1
ARGUMENTS = ([-1.0, -1.0, -1.0], [-1.2, -1.3, -0.9], [1.0, 1.0, 0.0])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_loss_of_a_good_and_a_bad_response_by_hand():
    loss, metrics, logprobs = call(KTO(beta=0.5), *ARGUMENTS, 0.2, [0, 2, 3])
    good, bad = 0.5 * (0.5 - 0.2), 0.5 * (0.2 + 0.1)  # beta * (S - z0), beta * (z0 - S)
    assert math.isclose(loss.item(), (1 - sigmoid(good)) + (1 - sigmoid(bad)), rel_tol=1e-6)
    assert torch.allclose(metrics["kto/z0"], torch.tensor([0.4, 2.0]))
    assert torch.allclose(metrics["rewards/chosen"], torch.tensor([0.25, 1.0]))
    assert torch.allclose(metrics["rewards/rejected"], torch.tensor([-0.05, 1.0]))
    assert torch.allclose(metrics["logps/chosen"], torch.tensor([-2.0, 1.0]))
    loss.backward()
    slopes = [-0.5 * sigmoid(good) * sigmoid(-good), 0.5 * sigmoid(bad) * sigmoid(-bad)]
    assert torch.allclose(logprobs.grad, torch.tensor([slopes[0], slopes[0], slopes[1]]))


def test_a_negative_mean_over_companions_counts_as_0():
    below, metrics, _ = call(KTO(), *ARGUMENTS, -3.0, [0, 2, 3])
    at_zero, _, _ = call(KTO(), *ARGUMENTS, 0.0, [0, 2, 3])
    assert below == at_zero and metrics["kto/z0"][0] == 0


def test_at_the_reference_every_response_costs_half():
    loss, _, _ = call(KTO(), [-1.0, -2.0], [-1.0, -2.0], [1.0, 0.0], 0.0, [0, 1, 2])
    assert loss.item() == 1.0


@pytest.mark.parametrize("change", [{"beta": 0.2}, {"desirable_weight": 2.0}, {"undesirable_weight": 2.0}])
def test_every_option_changes_the_gradient(change):
    def gradient(objective):
        loss, _, logprobs = call(objective, *ARGUMENTS, 0.2, [0, 2, 3])
        loss.backward()
        return logprobs.grad

    assert not torch.allclose(gradient(KTO()), gradient(KTO(**change)))


def test_the_weights_are_those_of_their_label():
    plain, _, _ = call(KTO(), *ARGUMENTS, 0.2, [0, 2, 3])
    good, _, _ = call(KTO(undesirable_weight=0.0), *ARGUMENTS, 0.2, [0, 2, 3])
    bad, _, _ = call(KTO(desirable_weight=0.0), *ARGUMENTS, 0.2, [0, 2, 3])
    alone, _, _ = call(KTO(), *(x[:2] for x in ARGUMENTS), 0.2, [0, 2])
    assert math.isclose(good.item(), alone.item(), rel_tol=1e-6)
    assert math.isclose((good + bad).item(), plain.item(), rel_tol=1e-6)


def test_the_gradient_agrees_with_differences():
    logits, make, rows, cu_seqlens = random_case([3, 1, 4, 2])
    objective = KTO(beta=0.7, desirable_weight=1.3, undesirable_weight=0.6)
    leaf = logits.clone().requires_grad_()
    objective(make(leaf), rows, cu_seqlens)[0].backward()
    expected = differences(lambda x: objective(make(x), rows, cu_seqlens)[0], logits)
    assert torch.allclose(leaf.grad, expected, atol=1e-8)


def test_companions_are_summed_as_log_ratios_of_whole_responses():
    rows = {"ref_logprobs": torch.tensor([-1.2, -1.3, -0.9])}
    found = KTO().companion_sums(stats_of(torch.tensor([-1.0, -1.0, -1.0])), rows, torch.tensor([0, 2, 3]))
    assert torch.allclose(found, torch.tensor([0.5 - 0.1, 2.0]))


def test_a_companion_is_the_prompt_with_a_completion_of_another_prompt():
    members = episodes(12)
    for i, e in enumerate(members):
        e.completion_ids = [4 + i]
    assert selected(KTO(), members) == [[e] for e in members]
    for e in members:
        assert e.companion.prompt_ids == e.prompt_ids
        assert members[e.companion.completion_ids[0] - 4].prompt_index != e.prompt_index
        assert len(e.companion.rewards) == len(e.companion.completion_ids) and not e.companion.rewards.any()
        assert e.companion.ref_logprobs is None and e.companion.companion is None
        assert e.source in e.companion.source


def test_where_every_prompt_has_one_response_the_next_completion_is_taken():
    members = episodes(5)
    for i, e in enumerate(members):
        e.prompt_index, e.prompt_ids, e.completion_ids = i, [3], [4 + i]
    selected(KTO(), members)
    assert [e.companion.completion_ids for e in members] == [[5], [6], [7], [8], [4]]


def test_every_completion_is_a_companion_where_prompts_have_equally_many():
    members = episodes(12)
    for i, e in enumerate(members):
        e.prompt_index, e.prompt_ids, e.completion_ids = i // 4, [3], [4 + i]
    selected(KTO(), members)
    assert sorted(e.companion.completion_ids[0] for e in members) == list(range(4, 16))


def test_no_companion_is_longer_than_the_longest_response():
    members = episodes(2)
    members[0].prompt_ids, members[0].completion_ids, members[0].prompt_index = [3] * 9, [4], 0
    members[1].prompt_ids, members[1].completion_ids, members[1].prompt_index = [3], [5] * 4, 1
    selected(KTO(), members)
    assert members[0].companion.completion_ids == [5]  # 9 + 1 tokens, as its own
    assert members[1].companion.completion_ids == [4]


def test_companions_are_the_same_whenever_they_are_asked_for():
    members = episodes(4)
    selected(KTO(), members)
    before = [e.companion.source for e in members]
    selected(KTO(), members)
    assert [e.companion.source for e in members] == before


def test_one_prompt_alone_is_refused():
    members = episodes(4)
    for e in members:
        e.prompt_index = 0
    with pytest.raises(UserError, match="kto needs responses of at least two prompts"):
        selected(KTO(), members)
    assert selected(KTO(), []) == []


def test_one_label_alone_is_said():
    assert KTO().advice([True, False], np.zeros(0)) == KTO().advice([], np.zeros(0)) == []
    assert "every response is labelled correct" in KTO().advice([True, True], np.zeros(0))[0]
    assert "every response is labelled wrong" in KTO().advice([False, False], np.zeros(0))[0]


def test_options_out_of_range_are_named():
    assert [name for name, _ in KTO(beta=0.0, desirable_weight=-1.0, undesirable_weight=-1.0).problems()] == [
        "beta",
        "desirable_weight",
        "undesirable_weight",
    ]
    assert KTO().problems() == []


@pytest.mark.parametrize(
    ("weights", "told"),
    [((1.0, 1.0), "weigh 0.25 to 1"), ((1.0, 0.5), "weigh 0.5 to 1"), ((4.0, 1.0), None), ((1.0, 0.0), None)],
)
def test_labels_that_weigh_far_from_equal_are_told_with_the_weight_that_is_advised(weights, told):
    desirable, undesirable = weights
    objective = KTO(desirable_weight=desirable, undesirable_weight=undesirable)
    said = objective.advice([True] * 4 + [False] * 16, np.zeros(0))
    if told is None:
        assert said == []
    else:
        assert told in said[0] and "4 good and 16 bad" in said[0]
        assert f"--desirable_weight {4 * undesirable:.3g} to" in said[0]
