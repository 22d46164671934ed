import math

import pytest
import torch

from dqo.objectives import DQO, DRO, TBRM
from dqo_kernels import TokenStats, soft_bellman
from tests.dqo.objectives.packed import differences, lbfgs, random_case
from tests.tabular import random_tree


def test_the_loss_of_one_response_by_hand():
    # V = 0.5 * (2.0 - 1.4) = 0.3; S = 0.2 + 0.3 = 0.5; R = 0.25 + 1: the residual is 0.3 + 0.25 - 1.25
    rows = {
        "ref_logprobs": torch.tensor([-1.2, -1.3]),
        "ref_lse": torch.tensor([1.4, 9.0]),
        "rewards": torch.tensor([0.25, 1.0]),
        "label": torch.ones(2),
    }
    logprobs, lse = torch.tensor([-1.0, -1.0], requires_grad=True), torch.tensor([2.0, 7.0], requires_grad=True)
    loss, metrics = TBRM(beta=0.5)(TokenStats(logprobs, lse, torch.zeros(2)), rows, torch.tensor([0, 2]))
    assert math.isclose(loss.item(), 0.7**2, rel_tol=1e-6)
    assert torch.allclose(metrics["td_error/abs_mean"], torch.tensor([0.7, 1.0]))
    loss.backward()
    assert torch.allclose(logprobs.grad, torch.tensor([-0.7, -0.7]))
    assert torch.allclose(lse.grad, torch.tensor([-0.7, 0.0]))  # of the first state alone


def test_an_untrained_policy_has_the_residual_of_its_reward():
    logits, make, rows, cu_seqlens = random_case([3, 1])
    stats = make(logits)
    rows |= {"ref_logprobs": stats.logprobs, "ref_lse": stats.lse}
    totals = torch.stack([piece.sum() for piece in rows["rewards"].split([3, 1])])
    assert torch.allclose(TBRM()(stats, rows, cu_seqlens)[0], totals.square().sum())


def gradient(loss_of, logits):
    leaf = logits.clone().requires_grad_()
    loss = loss_of(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


def test_on_responses_of_one_token_it_is_twice_dqo_with_soft_values_and_both_ends_trained():
    logits, make, rows, cu_seqlens = random_case([1] * 6)
    dqo = DQO(nll_coef=0.0, beta=0.3, value_model="none", target="residual", is_level="none")
    ours, theirs = (
        gradient(lambda x, objective=objective: objective(make(x), rows, cu_seqlens)[0], logits)
        for objective in (TBRM(beta=0.3), dqo)
    )
    assert all(torch.allclose(a, 2 * b, rtol=1e-12) for a, b in zip(ours, theirs))


def test_it_is_the_soft_bellman_residual_of_the_first_state():
    logits, make, rows, cu_seqlens = random_case([3, 1, 4])

    def first_residuals(logits):
        stats = make(logits)
        terms = soft_bellman(
            stats.logprobs, rows["ref_logprobs"], rows["rewards"], None, cu_seqlens, lse=stats.lse, ref_lse=rows["ref_lse"],
            beta=0.3, target="residual", is_level="none", reduction="none",
        )  # fmt: skip
        return 2 * terms.policy_loss[cu_seqlens[:-1]].sum()

    ours = gradient(lambda x: TBRM(beta=0.3)(make(x), rows, cu_seqlens)[0], logits)
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(ours, gradient(first_residuals, logits)))
    assert torch.allclose(
        ours[1], differences(lambda x: TBRM(beta=0.3)(make(x), rows, cu_seqlens)[0], logits), atol=1e-8
    )


def test_its_loss_is_that_of_dro_with_the_value_of_the_logits():
    logits, make, rows, cu_seqlens = random_case([3, 1, 4])
    stats = make(logits)
    rows["values"] = 0.3 * (stats.lse - rows["ref_lse"])
    ours, _ = TBRM(beta=0.3)(stats, rows, cu_seqlens)
    theirs, _ = DRO(beta=0.3, policy_scale=1.0, value_coef=1.0)(stats, rows, cu_seqlens)  # two halves
    assert torch.allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_tabular_optimum_is_reached(seed):
    tree = random_tree(seed)
    found = lbfgs(tree, TBRM(beta=tree.beta), list(range(len(tree.seqlens))))
    optimum = tree.optimum()
    assert (found.log_softmax(-1) - optimum.log_policy).abs().max() < 1e-6
    value = tree.beta * (found[0].logsumexp(-1) - tree.ref_logits[0].logsumexp(-1))
    assert abs(value - optimum.v[0]) < 1e-6


def test_options_out_of_range_are_named():
    assert [name for name, _ in TBRM(beta=0.0).problems()] == ["beta"]
    assert TBRM().problems() == []
