import math

import pytest
import torch

from dqo.objectives import DQO
from dqo_kernels import TokenStats


def call(objective, logprobs, ref_logprobs, rewards, values, cu_seqlens, **extra):
    stats = TokenStats(
        torch.tensor(logprobs, requires_grad=True), torch.zeros(len(logprobs)), torch.zeros(len(logprobs))
    )
    rows = {
        "ref_logprobs": torch.tensor(ref_logprobs),
        "rewards": torch.tensor(rewards),
        "values": torch.tensor(values, requires_grad=True),
        "label": torch.ones(len(logprobs)),
        **extra,
    }
    loss, metrics = objective(stats, rows, torch.tensor(cu_seqlens))
    return loss, metrics, stats.logprobs, rows["values"]


def test_the_loss_of_two_tokens_by_hand():
    # beta 0.5, lambda 1, no weights. delta = [0.2, -0.4], r = [0, 1], V = [0.3, 0.6]
    # k = r - beta*delta = [-0.1, 1.2];  G_2 = 1.2, G_1 = -0.1 + 1.2 = 1.1
    # policy: t=1: 0.1 - (0 + 1.2 - 0.3) = -0.8;  t=2: -0.2 - (1 - 0.6) = -0.6  -> 1/2 (0.64 + 0.36) = 0.5
    # value: 1/2 ((1.1 - 0.3)^2 + (1.2 - 0.6)^2) = 1/2 (0.64 + 0.36) = 0.5
    objective = DQO(beta=0.5, is_level="none")
    loss, metrics, logprobs, values = call(objective, [-1.0, -1.0], [-1.2, -0.6], [0.0, 1.0], [0.3, 0.6], [0, 2])
    assert math.isclose(loss.item(), 1.0, rel_tol=1e-6)
    assert torch.allclose(metrics["loss/policy"], torch.tensor([0.5, 2.0]))
    loss.backward()
    assert torch.allclose(logprobs.grad, torch.tensor([0.5 * -0.8, 0.5 * -0.6]))  # beta * e_t
    assert torch.allclose(values.grad, torch.tensor([0.3 - 1.1, 0.6 - 1.2]))  # V_t - G_t


def test_trajectory_weights_scale_the_loss_of_their_response():
    plain, _, _, _ = call(DQO(is_level="none"), [-1.0, -1.0], [-1.2, -1.3], [0.0, 1.0], [0.0, 0.0], [0, 2])
    weighted, metrics, _, _ = call(DQO(), [-1.0, -1.0], [-1.2, -1.3], [0.0, 1.0], [0.0, 0.0], [0, 2])
    assert math.isclose(weighted.item(), math.exp(0.5) * plain.item(), rel_tol=1e-5)
    assert metrics["importance_weight/clipped_frac"][0] == 0


def test_a_capped_weight_is_counted_as_clipped():
    _, metrics, _, _ = call(DQO(is_cap=0.3), [-1.0, -1.0], [-1.2, -1.3], [0.0, 1.0], [0.0, 0.0], [0, 2])
    assert metrics["importance_weight/clipped_frac"][0] == 2


def test_the_bootstrap_on_the_last_row_enters_the_return():
    extra = {"bootstrap": torch.tensor([0.0, 0.7])}
    _, without, _, _ = call(DQO(is_level="none"), [-1.0, -1.0], [-1.0, -1.0], [0.0, 1.0], [0.0, 0.0], [0, 2])
    _, metrics, _, _ = call(DQO(is_level="none"), [-1.0, -1.0], [-1.0, -1.0], [0.0, 1.0], [0.0, 0.0], [0, 2], **extra)
    assert math.isclose((metrics["returns/mean"] - without["returns/mean"])[0].item(), 1.4, rel_tol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 0.3},
        {"gamma": 0.9},
        {"lam": 0.5},
        {"policy_target": "one_step"},
        {"target": "residual"},
        {"is_level": "token"},
        {"is_cap": 0.1},
        {"is_level": "token", "is_floor": 0.15},
        {"policy_scale": 2.0},
        {"value_coef": 0.5},
    ],
)
def test_every_option_changes_the_gradient(change):
    arguments = ([-1.0, -1.1, -0.7], [-1.2, -1.3, -0.8], [0.1, 0.2, 1.0], [0.3, 0.2, 0.1], [0, 3])

    def gradient(objective):
        loss, _, logprobs, values = call(objective, *arguments)
        loss.backward()
        return torch.cat([logprobs.grad, values.grad])

    assert not torch.allclose(gradient(DQO()), gradient(DQO(**change)))


def test_soft_values_come_from_the_logsumexps():
    stats = TokenStats(torch.tensor([-1.0]), torch.tensor([2.0], requires_grad=True), torch.zeros(1))
    rows = {
        name: torch.tensor([x])
        for name, x in {"ref_logprobs": -1.0, "ref_lse": 1.0, "rewards": 1.0, "label": 1.0}.items()
    }
    loss, metrics = DQO(beta=0.5, value_model="none")(stats, rows, torch.tensor([0, 1]))
    assert metrics["value/mean"][0] == 0.5  # beta * (2 - 1)
    loss.backward()
    assert stats.lse.grad.item() == pytest.approx(0.5 * (0.5 - 1.0))  # beta * (V - G)
