import math

import pytest
import torch

from dqo.objectives import DQO, ETPO
from dqo_kernels import TokenStats, token_stats
from tests.dqo.objectives.on_tree import alike, rows_of
from tests.dqo.objectives.packed import random_case
from tests.tabular import random_tree

# Q = [0.4, 0.7, -0.2], V_bar under pi = [9, 0.5, 0.8], r = [0.1, 1, 2]; the first turn ends with the second token
ROWS = {
    "q": [0.4, 0.7, -0.2],
    "target_values": [9.0, 0.5, 0.8],
    "rewards": [0.1, 1.0, 2.0],
    "turn_end": [0.0, 1.0, 1.0],
}
ROWS |= {"ref_logprobs": [-1.0, -1.0, -1.0], "label": [1.0, 1.0, 1.0]}


def call(objective):
    rows = {name: torch.tensor(column) for name, column in ROWS.items()}
    rows["q"].requires_grad_()
    kl = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    loss, metrics = objective(TokenStats(*torch.zeros(3, 3), kl=kl), rows, torch.tensor([0, 3]))
    loss.backward()
    return loss.item(), metrics, rows["q"].grad, kl.grad


def test_the_loss_of_two_turns_by_hand():
    # targets: 0.1 + 0.5 inside of the turn; 1 + gamma * 0.8 behind it; 2 at the end. Errors -0.2, -0.7, -2.2
    loss, metrics, q, kl = call(ETPO(gamma=0.5, value_coef=0.1))
    assert math.isclose(loss, 0.6 + 0.1 * 0.5 * (0.04 + 0.49 + 4.84), rel_tol=1e-5)
    assert torch.allclose(q, 0.1 * torch.tensor([-0.2, -0.7, -2.2])) and kl.tolist() == [1.0, 1.0, 1.0]
    assert metrics["td_error/abs_mean"].tolist() == pytest.approx([3.1, 3.0])


def q_rows(q_logits, logits, ref_logits, actions, beta):
    """q and target_values by the definition, over the whole vocabulary."""
    table = beta * (q_logits - ref_logits)
    log_policy = logits.log_softmax(-1)
    expected = (log_policy.exp() * (table - beta * (log_policy - ref_logits.log_softmax(-1)))).sum(-1)
    shift = beta * ref_logits.logsumexp(-1)  # Q is relative to ref's probabilities where its logits are normalised
    return table.gather(-1, actions[:, None])[:, 0], expected.detach(), shift


def test_tied_to_the_policy_it_is_one_step_dqo():
    logits, make, rows, cu_seqlens = random_case([3, 1, 4])
    beta = 0.3
    leaf = logits.clone().requires_grad_()
    stats = make(leaf)
    values = beta * (stats.lse - rows["ref_lse"])
    q = beta * (stats.logprobs - rows["ref_logprobs"]) + values
    tied = rows | {"q": q, "target_values": values.detach()}
    ETPO(beta=beta)(stats._replace(kl=torch.zeros_like(q)), tied, cu_seqlens)[0].backward()
    other = logits.clone().requires_grad_()
    dqo = DQO(nll_coef=0.0, beta=beta, value_model="none", lam=0.0, policy_target="one_step", is_level="none")
    dqo(make(other), rows, cu_seqlens)[0].backward()
    assert torch.allclose(leaf.grad, other.grad, rtol=1e-9) and leaf.grad.abs().max() > 1e-3


def test_the_tabular_optimum_is_reached():
    """Q's table at the rate that fits it at once, the policy by natural gradients: both alternate."""
    tree = alike(random_tree(0, depth=3))
    ref = tree.ref_logits.log_softmax(-1)
    q_logits, logits = ref.clone(), ref.clone()
    counts = tree.behavior_logits.exp()  # how often the responses take each action
    objective = ETPO(beta=tree.beta)
    for _ in range(30):
        tables = q_logits.requires_grad_(), logits.requires_grad_()
        own = [table[tree.states] for table in tables]
        q, target_values, _ = q_rows(*own, ref[tree.states], tree.actions, tree.beta)
        stats = token_stats(own[1], tree.actions, own[0].detach(), backend="reference")
        rows = rows_of(tree) | {"q": q, "target_values": target_values}
        of_q, of_policy = torch.autograd.grad(objective(stats, rows, tree.cu_seqlens)[0], tables)
        q_logits = q_logits.detach() - of_q / (counts * tree.beta**2)
        policy = logits.detach().softmax(-1)
        logits = logits.detach() - of_policy / (counts.sum(-1, keepdim=True) * policy)
    optimum = tree.optimum()
    assert (logits.log_softmax(-1) - optimum.log_policy).abs().max() < 1e-6
    assert (tree.beta * q_logits - optimum.q).abs().max() < 1e-6  # that of the tree has beta * log ref in it


@pytest.mark.parametrize("change", [{"gamma": 0.5}, {"value_coef": 0.5}])
def test_every_option_of_the_loss_changes_the_gradient(change):
    found = [torch.cat(call(objective)[2:]) for objective in (ETPO(), ETPO(**change))]
    assert not torch.allclose(*found)


def test_options_out_of_range_are_named():
    assert [n for n, _ in ETPO(beta=0.0, gamma=2.0, target_ema=1.0).problems()] == ["beta", "gamma", "target_ema"]
    assert ETPO().problems() == []
