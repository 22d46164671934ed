import math

import pytest
import torch

from dqo.objectives import DQO, DRO
from dqo.train import metrics as finished
from dqo_kernels import soft_bellman
from tests.dqo.objectives.on_tree import alike, loss_of
from tests.dqo.objectives.packed import differences, random_case, stats_of
from tests.tabular import random_tree


def call(objective, logprobs, ref_logprobs, rewards, values, cu_seqlens, **extra):
    rows = {
        "ref_logprobs": torch.tensor(ref_logprobs),
        "rewards": torch.tensor(rewards),
        "values": torch.tensor(values, requires_grad=True),
        "label": torch.ones(len(logprobs)),
        **extra,
    }
    stats = stats_of(torch.tensor(logprobs, requires_grad=True))
    loss, metrics = objective(stats, rows, torch.tensor(cu_seqlens))
    return loss, metrics, stats.logprobs, rows["values"]


# S = 0.2 - 0.4 = -0.2, R = 0.25 + 1 = 1.25, V(x) = 0.3
ARGUMENTS = ([-1.0, -1.0], [-1.2, -0.6], [0.25, 1.0], [0.3, 0.6], [0, 2])


def test_the_loss_of_one_response_by_hand():
    # e = R - V - beta*S = 1.25 - 0.3 + 0.1 = 1.05; policy part 1/beta * 1/2 e^2 = e^2, value part 1/2 e^2
    loss, metrics, logprobs, values = call(DRO(beta=0.5), *ARGUMENTS)
    assert math.isclose(loss.item(), 1.5 * 1.05**2, rel_tol=1e-6)
    loss.backward()
    assert torch.allclose(logprobs.grad, torch.tensor([-1.05, -1.05]))  # 1/beta * -beta * e
    assert torch.allclose(values.grad, torch.tensor([-1.05, 0.0]))  # only V of the prompt
    expected = {
        "loss/policy": 0.5 * 1.05**2,  # before its factor, as DQO's
        "loss/value": 0.5 * 1.05**2,
        "value/mean": 0.3,
        "returns/mean": 1.35,  # R - beta*S
        "advantages/mean": 0.95,  # R - V
        "td_error/abs_mean": 1.05,
        "rewards/chosen": -0.1,
        "logps/chosen": -2.0,
    }
    found = finished.finish(metrics)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_response_that_was_cut_is_paid_the_value_of_its_last_state():
    extra = {"bootstrap": torch.tensor([0.0, 0.7])}
    _, without, _, _ = call(DRO(), *ARGUMENTS)
    _, metrics, _, _ = call(DRO(), *ARGUMENTS, **extra)
    assert math.isclose((metrics["returns/mean"] - without["returns/mean"])[0].item(), 0.7, rel_tol=1e-6)


def test_with_values_of_all_states_the_loss_is_a_mean_over_them_by_hand():
    # e = R - V_t - beta*S = 1.05 and 0.75
    loss, metrics, logprobs, values = call(DRO(beta=0.5, value_states="all"), *ARGUMENTS)
    assert math.isclose(loss.item(), 1.5 * (1.05**2 + 0.75**2) / 2, rel_tol=1e-6)
    loss.backward()
    assert torch.allclose(logprobs.grad, torch.tensor([-0.9, -0.9]))  # the mean of the residuals
    assert torch.allclose(values.grad, torch.tensor([-1.05, -0.75]) / 2)
    assert metrics["value/mean"].tolist() == pytest.approx([0.9, 2.0])


@pytest.mark.parametrize("states", ["first", "all"])
def test_the_tabular_optimum_is_reached(states):
    """Both parts have one residual, so that their gradients add up to that of half of the loss."""
    tree = alike(random_tree(0, depth=3, num_actions=2))
    tables = tree.ref_logits.clone().requires_grad_(), torch.zeros(len(tree.children)).double().requires_grad_()
    optimizer = torch.optim.LBFGS(tables, max_iter=200, tolerance_grad=1e-11, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * loss_of(DRO(beta=tree.beta, policy_scale=1.0, value_states=states), tree, *tables)
        (2.0 * loss).backward()
        return loss

    optimizer.step(closure)
    optimum = tree.optimum()
    assert (tables[0].detach().log_softmax(-1) - optimum.log_policy).abs().max() < 1e-4
    assert (tables[1].detach() - optimum.v)[0].abs() < 1e-4
    if states == "all":  # every state has the value of the prompt then: one response earns what any other does
        assert (tables[1].detach() - optimum.v[0]).abs().max() < 1e-4


@pytest.mark.parametrize("change", [{"beta": 0.3}, {"policy_scale": 2.0}, {"value_coef": 0.5}, {"value_states": "all"}])
def test_every_option_changes_the_gradient(change):
    def gradient(objective):
        loss, _, logprobs, values = call(objective, *ARGUMENTS)
        loss.backward()
        return torch.cat([logprobs.grad, values.grad])

    assert not torch.allclose(gradient(DRO()), gradient(DRO(**change)))


@pytest.mark.parametrize("bootstrapped", [False, True])
def test_on_responses_of_one_token_it_is_dqo(bootstrapped):
    logits, make, rows, cu_seqlens = random_case([1] * 6)
    del rows["behavior_logprobs"]
    if bootstrapped:
        rows["bootstrap"] = torch.linspace(-1, 1, 6, dtype=torch.float64)

    def of(objective):
        leaves = logits.clone().requires_grad_(), rows["values"].clone().requires_grad_()
        loss, metrics = objective(make(leaves[0]), rows | {"values": leaves[1]}, cu_seqlens)
        loss.backward()
        return loss.detach(), *(leaf.grad for leaf in leaves), finished.finish(metrics)

    *ours, metrics = of(DRO(beta=0.3, policy_scale=1.0))
    *theirs, dqo_metrics = of(DQO(nll_coef=0.0, beta=0.3, is_level="none"))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours, theirs))
    assert {name: dqo_metrics[name] for name in metrics} == pytest.approx(metrics, rel=1e-9)


def test_the_gradient_agrees_with_differences():
    logits, make, rows, cu_seqlens = random_case([3, 1, 4])
    values = rows["values"]

    def loss(objective, logits, values):
        return objective(make(logits), rows | {"values": values}, cu_seqlens)[0]

    leaves = logits.clone().requires_grad_(), values.clone().requires_grad_()
    loss(DRO(beta=0.4), *leaves).backward()
    # each part holds the other's model fixed, so it is differentiated with the other left out
    of_policy = differences(lambda x: loss(DRO(beta=0.4, value_coef=0.0), x, values), logits)
    of_value = differences(lambda v: loss(DRO(beta=0.4, policy_scale=0.0), logits, v), values)
    assert torch.allclose(leaves[0].grad, of_policy, atol=1e-8)
    assert torch.allclose(leaves[1].grad, of_value, atol=1e-8)


def test_options_out_of_range_are_named():
    assert [name for name, _ in DRO(beta=0.0).problems()] == ["beta"]
    assert DRO().problems() == []


def test_the_value_that_the_live_policy_implies_is_no_baseline_of_its_own():
    """V(s_{t+1}) = V(s_t) + beta * delta_t - r_t makes each residual V(s_1) + beta * sum(delta) - R: the residual of the response
    as one action. So DQO with that V has the gradient of DRO, and a V that is to help comes from elsewhere."""
    logits, make, rows, cu_seqlens = random_case([3, 1, 4])
    starts, beta, lengths = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64), 0.4, cu_seqlens.diff()
    logits.requires_grad_()
    stats = make(logits)
    flow = (beta * (stats.logprobs - rows["ref_logprobs"]) - rows["rewards"]).detach()
    before = torch.cat([piece.cumsum(0) - piece for piece in flow.split(lengths.tolist())])
    values = starts.repeat_interleave(lengths) + before
    terms = soft_bellman(
        stats.logprobs,
        rows["ref_logprobs"],
        rows["rewards"],
        values,
        cu_seqlens,
        beta=beta,
        lam=1.0,
        is_level="none",
        reduction="none",
    )
    whole = starts + torch.stack([piece.sum() for piece in flow.split(lengths.tolist())])
    assert torch.allclose(values - terms.returns, whole.repeat_interleave(lengths))
    scaled_ratio = beta * (stats.logprobs - rows["ref_logprobs"]).detach()
    assert torch.allclose(scaled_ratio - terms.advantages, whole.repeat_interleave(lengths))
    rows = rows | {"values": values}
    both = [DQO(nll_coef=0.0, beta=beta, is_level="none"), DRO(beta=beta, policy_scale=1.0)]
    found = [torch.autograd.grad(objective(make(logits), rows, cu_seqlens)[0], logits)[0] for objective in both]
    assert torch.allclose(found[0], found[1]) and found[0].abs().max() > 1e-3
