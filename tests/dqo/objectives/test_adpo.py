import math

import pytest
import torch

from dqo.objectives import ADPO, DPO
from tests.dqo.objectives.packed import differences, random_case, stats_of


def call(objective, known=(0.0, 0.0, 0.0)):
    """Three pairs of single tokens with margins 0.5 * (0.6, -2.4, 3.0) = 0.3, -1.2 and 1.5."""
    ratios = torch.tensor([0.5, -0.1, -2.0, 0.4, 1.0, -2.0])
    ref = -torch.ones(6)
    rows = {"ref_logprobs": ref, "label": torch.ones(6), "known": torch.tensor(known).repeat_interleave(2)}
    logprobs = (ref + ratios).requires_grad_()
    stats, cu_seqlens = stats_of(logprobs), torch.arange(7)
    loss, metrics = objective(stats, rows, cu_seqlens)
    loss.backward()
    return loss.item(), metrics, logprobs.grad, objective.asked(stats, rows, cu_seqlens).tolist()


def logistic(*margins):
    return sum(math.log(1 + math.exp(-m)) for m in margins)


def test_unsure_pairs_are_asked_and_sure_ones_labelled_by_the_policy_by_hand():
    loss, metrics, gradient, asked = call(ADPO(beta=0.5, threshold=1.0))
    assert asked == [True, False, False]
    assert math.isclose(loss, logistic(0.3, 1.2, 1.5), rel_tol=1e-6)  # it believes of the second pair what is wrong
    slope = 0.5 / (1 + math.exp(1.2))
    assert gradient[2:4].tolist() == pytest.approx([slope, -slope])  # the worse response becomes likelier
    told = {name: metrics[f"labels/{name}"].tolist() for name in ("asked", "pseudo", "pseudo_accuracy")}
    assert told == {"asked": [1.0, 3.0], "pseudo": [2.0, 3.0], "pseudo_accuracy": [1.0, 2.0]}
    assert metrics["rewards/accuracies"].tolist() == [2.0, 3.0]  # by the file, as of DPO


def test_a_known_label_is_used_however_sure_the_policy_is():
    loss, metrics, _, asked = call(ADPO(beta=0.5, threshold=1.0), (1.0, 1.0, 0.0))
    assert asked == [True, False, False]
    assert math.isclose(loss, logistic(0.3, -1.2, 1.5), rel_tol=1e-6)
    assert metrics["labels/asked"].tolist() == [0.0, 3.0]  # the first was asked before
    assert metrics["labels/pseudo"].tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    "options", [{}, {"loss_type": "ipo", "rpo_alpha": 0.4}, {"loss_type": "robust", "label_smoothing": 0.1}], ids=str
)
def test_it_is_dpo_where_all_is_asked_and_sure_of_itself_where_nothing_is(options):
    logits, make, rows, cu_seqlens = random_case([3, 1, 4, 2])
    rows = rows | {"known": torch.zeros_like(rows["known"])}

    def loss(objective, x, its_rows=rows):
        return objective(make(x), its_rows, cu_seqlens)[0]

    plain = DPO(**options)
    assert loss(ADPO(threshold=math.inf, **options), logits) == loss(plain, logits)
    margin = plain.implicit_rewards(make(logits), rows, cu_seqlens)
    wrong = (margin[0::2] < margin[1::2]).tolist()
    assert wrong == [True, True]  # so that DPO of the exchanged responses is what it thinks
    swap = torch.cat([torch.arange(3, 4), torch.arange(0, 3), torch.arange(8, 10), torch.arange(4, 8)])
    turned = {name: x[swap] for name, x in rows.items()}
    stats = make(logits)
    expected = plain(type(stats)(*(x[swap] for x in stats)), turned, torch.tensor([0, 1, 4, 6, 10]))[0]
    assert torch.isclose(loss(ADPO(threshold=0.0, **options), logits), expected)
    between = ADPO(threshold=float((margin[0::2] - margin[1::2]).abs().mean()), **options)  # one pair on each side
    assert sorted(between.asked(make(logits), rows, cu_seqlens).tolist()) == [False, True]
    leaf = logits.clone().requires_grad_()
    loss(between, leaf).backward()
    assert torch.allclose(leaf.grad, differences(lambda x: loss(between, x), logits), atol=1e-8)
    held_out = between.evaluation(make(logits), {n: x for n, x in rows.items() if n != "known"}, cu_seqlens)[0]
    assert held_out == loss(plain, logits)


@pytest.mark.parametrize("start, known, sign", [(0.0, 0.0, 1), (-1.0, 0.0, 1), (-3.0, 0.0, -1), (-3.0, 1.0, 1)])
def test_the_optimum_of_two_actions_is_dpo_s_or_that_of_what_the_policy_was_sure_of(start, known, sign):
    """With a share e of wrong labels DPO's margin is log((1 - e) / e). A policy that begins surely wrong ends there with the
    other sign, unless it asked once."""
    share, objective = 0.1, ADPO(beta=1.0, threshold=2.0, label_smoothing=0.1)
    logits = torch.tensor([start, 0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.full((2,), math.log(0.5), dtype=torch.float64)
    rows = {"ref_logprobs": ref, "label": torch.ones(2), "known": torch.full((2,), known)}
    for _ in range(400):
        loss, _ = objective(stats_of(logits.log_softmax(-1)), rows, torch.arange(3))
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 2.0 * gradient).detach().requires_grad_()
    assert (logits[0] - logits[1]).item() == pytest.approx(sign * math.log((1 - share) / share), abs=1e-8)


def test_options_out_of_range_are_named():
    assert [name for name, _ in ADPO(threshold=-1.0).problems()] == ["threshold"]
    assert [name for name, _ in ADPO(beta=0.0).problems()] == ["beta"]
    assert ADPO().problems() == []


def test_a_pair_without_a_label_has_no_likelihood_term():
    ratios = torch.zeros(2).requires_grad_()  # m is 0, and nothing is asked
    rows = {name: torch.zeros(2) for name in ("ref_logprobs", "label", "known")}
    ADPO(threshold=0.0, rpo_alpha=1.0)(stats_of(ratios), rows, torch.arange(3))[0].backward()
    assert ratios.grad.tolist() == [0.0, 0.0]
