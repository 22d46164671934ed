import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dqo.data.selection import selected
from dqo.errors import UserError
from dqo.objectives import DQO, PPO
from tests.dqo.helpers import episodes
from tests.dqo.objectives.on_tree import alike, loss_of
from tests.dqo.objectives.packed import random_case, stats_of
from tests.tabular import random_tree

# beta 0.5: delta = [0.2, -0.4], r = [0, 1]; the old values 0.3 and 0.6; rho = e^0.5 and e^-0.1
ROWS = {"ref_logprobs": [-1.2, -0.6], "rewards": [0.0, 1.0], "values": [0.2, 1.0], "target_values": [0.3, 0.6]}
ROWS |= {"behavior_logprobs": [-1.5, -0.9], "label": [1.0, 1.0]}
PLAIN = {"whiten": False, "clip_range": None, "value_clip": None, "target_ema": None, "value_coef": 1.0}


def call(objective, **changes):
    rows = {name: torch.tensor(column, dtype=torch.float64) for name, column in (ROWS | changes).items()}
    rows["values"].requires_grad_()
    logprobs = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    loss, metrics = objective(stats_of(logprobs), rows, torch.tensor([0, 2]))
    loss.backward()
    return loss.item(), metrics, logprobs.grad, rows["values"].grad


def test_the_loss_of_two_tokens_by_hand():
    # k = [-0.1, 1.2]; G_2 = 1.2, A_2 = 0.6;  G_1 = -0.1 + 0.5 * 0.6 + 0.5 * 1.2 = 0.8, A_1 = 0.5
    # rho_1 A_1 = 0.5 e^0.5 is above its clip 0.5 * 1.2 and gets no gradient; rho_2 A_2 = 0.6 e^-0.1 is within
    # V_1: 0.2 within 0.3 +- 0.2, (0.2 - 0.8)^2;  V_2: 1.0 beyond 0.8, where (0.8 - 1.2)^2 is larger than (1.0 - 1.2)^2
    loss, metrics, logprobs, values = call(PPO(beta=0.5, lam=0.5, whiten=False, value_coef=0.5))
    policy_loss, value_loss = -0.6 - 0.6 * math.exp(-0.1), 0.5 * (0.36 + 0.16)
    assert math.isclose(loss, policy_loss + 0.5 * value_loss, rel_tol=1e-12)
    assert torch.allclose(logprobs, torch.tensor([0.0, -0.6 * math.exp(-0.1)]).double())
    assert torch.allclose(values, torch.tensor([0.5 * (0.2 - 0.8), 0.0]).double())
    assert metrics["ppo/clipped_frac"].tolist() == [1.0, 2.0] and metrics["ppo/values_clipped_frac"].tolist() == [1, 2]


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_whole_step():
    # A = [0.5, 0.6] as above: mean 0.55, standard deviation 0.05; the first ratio is clipped from below, as A' = -1 is negative
    objective = PPO(beta=0.5, lam=0.5, value_coef=0.0)
    rows = {name: torch.tensor(column, dtype=torch.float64) for name, column in ROWS.items()}
    sums = objective.step_sums(stats_of(torch.tensor([-1.0, -1.0]).double()), rows, torch.tensor([0, 2]))
    means = {name: (total / count).item() for name, (total, count) in sums.items()}
    assert means == pytest.approx({"advantage_mean": 0.55, "advantage_square": 0.305})
    loss, *_ = call(objective, **{name: [mean, mean] for name, mean in means.items()})
    assert math.isclose(loss, math.exp(0.5) - math.exp(-0.1), rel_tol=1e-4)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_where_the_policy_wrote_the_data_it_is_dqo_over_beta(lam):
    logits, make, rows, cu_seqlens = random_case([3, 1, 4])
    rows["behavior_logprobs"] = make(logits).logprobs

    def gradients(objective):
        leaves = logits.clone().requires_grad_(), rows["values"].clone().requires_grad_()
        objective(make(leaves[0]), rows | {"values": leaves[1]}, cu_seqlens)[0].backward()
        return leaves[0].grad, leaves[1].grad

    ours = gradients(PPO(beta=0.3, lam=lam, **PLAIN))
    theirs = gradients(DQO(nll_coef=0.0, beta=0.3, lam=lam, policy_target="td", is_level="none"))
    assert torch.allclose(0.3 * ours[0], theirs[0], rtol=1e-10) and torch.allclose(ours[1], theirs[1], rtol=1e-10)


def soft_policy_iteration(objective, tree, steps):
    """Natural gradients of the policy's table, and the values' at the rate that fits them at once."""
    logits, values = tree.ref_logits.clone(), torch.zeros(len(tree.children), dtype=torch.float64)
    visits = torch.zeros_like(values).index_add(0, tree.states, torch.ones(len(tree.states), dtype=torch.float64))
    for _ in range(steps):
        tables = logits.requires_grad_(), values.requires_grad_()
        of_logits, of_values = torch.autograd.grad(loss_of(objective, tree, *tables), tables)
        policy = logits.detach().softmax(-1)
        logits = logits.detach() - of_logits / (tree.beta * visits[:, None] * policy)
        values = values.detach() - of_values / visits
    return logits.log_softmax(-1), values


@pytest.mark.parametrize("lam", [0.0, 0.9])
def test_without_clipping_the_tabular_optimum_is_reached(lam):
    tree = alike(random_tree(0, beta=1.0, depth=3))
    policy, values = soft_policy_iteration(PPO(beta=1.0, lam=lam, **PLAIN), tree, 40)
    assert (policy - tree.optimum().log_policy).abs().max() < 1e-6 and (values - tree.optimum().v).abs().max() < 1e-6


def test_the_clip_keeps_the_policy_near_the_data():
    tree = alike(random_tree(0, beta=1.0, depth=3))
    start = tree.ref_logits.log_softmax(-1)
    tree = replace(tree, behavior_logits=start)  # on the data's side of the clip at first
    objective = PPO(beta=1.0, lam=0.9, **PLAIN | {"clip_range": 0.1})
    steps = [replace(objective, clip_range=clip) for clip in (0.1, None)]
    clipped, free = ((soft_policy_iteration(o, tree, 20)[0] - start).abs().max() for o in steps)
    assert clipped < 0.6 * free


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 0.1}, {"gamma": 0.9}, {"lam": 0.2}, {"behavior": "reference"}, {"clip_range": 0.7}, {"clip_range": None},
        {"value_clip": 0.7}, {"value_clip": None}, {"target_ema": None, "value_clip": None}, {"value_coef": 0.5},
        {"whiten": False}, {"gamma": 0.9, "discount": "turns"},
    ],
)  # fmt: skip
def test_every_option_changes_the_gradient(change):
    rest = {"advantage_mean": [0.2, 0.2], "advantage_square": [0.3, 0.3], "turn_end": [0.0, 0.0]}
    base = PPO(gamma=0.9) if "discount" in change else PPO()
    found = [torch.cat(call(objective, **rest)[2:]) for objective in (base, replace(base, **change))]
    assert not torch.allclose(*found)


def test_a_ratio_beyond_all_bounds_stays_finite():
    loss, _, logprobs, _ = call(PPO(**PLAIN), behavior_logprobs=[-1e4, 1e4])
    assert math.isfinite(loss) and torch.isfinite(logprobs).all()


def test_responses_without_stored_log_probabilities_are_counted_and_refused():
    members = episodes(6)
    for e in members[1:]:
        e.behavior_logprobs = np.zeros(e.action_count, np.float32)
    with pytest.raises(
        UserError, match=r"and 5 of 6 responses have them \(the first without: row 1\); `dqo sample` stores"
    ):
        selected(PPO(), members)
    assert len(selected(PPO(behavior="reference"), members)) == 6 and len(selected(PPO(), members[1:])) == 5


def test_options_out_of_range_are_named():
    wrong = PPO(beta=0.0, lam=1.5, clip_range=-1.0, target_ema=None, value_model="implicit").problems()
    assert [name for name, _ in wrong] == ["beta", "clip_range", "lam", "value_clip", "value_model"]
    assert PPO().problems() == []
