import math
from dataclasses import replace

import pytest
import torch

from dqo.data.selection import selected
from dqo.objectives import DQO, PPO, RTO
from tests.dqo.helpers import episodes
from tests.dqo.objectives.on_tree import alike, rows_of, trained
from tests.dqo.objectives.packed import random_case, stats_of
from tests.tabular import random_tree

FREE = {"whiten": False, "clip_range": None, "value_clip": None, "target_ema": None}


def gradients(objective, logits, make, rows, cu_seqlens):
    leaves = logits.clone().requires_grad_(), rows["values"].clone().requires_grad_()
    loss, _ = objective(make(leaves[0]), rows | {"values": leaves[1]}, cu_seqlens)
    loss.backward()
    return loss.detach(), leaves[0].grad, leaves[1].grad


def test_the_loss_of_two_tokens_by_hand():
    # log(pi_dpo/ref) = [0.4, -1.0] * 0.5, clipped to 0.3, and 2 * R: r = [0.2, -0.3 + 2]; delta = [0.2, -0.4], beta 0.1, lam 1
    # k = [0.18, 1.74]; A = [1.92 - 0.3, 1.74 - 0.6]; rho = e^0.5 and e^-0.1
    rows = {"ref_logprobs": [-1.2, -0.6], "rewards": [0.0, 1.0], "values": [0.3, 0.6], "label": [1.0, 1.0]}
    rows |= {"behavior_logprobs": [-1.5, -0.9], "dpo_model_logprobs": [-0.8, -1.6]}
    rows = {name: torch.tensor(column) for name, column in rows.items()}
    objective = RTO(beta=0.1, beta1=0.5, reward_coef=2.0, reward_clip=0.3, lam=1.0, value_coef=0.0, **FREE)
    loss, metrics = objective(stats_of(torch.tensor([-1.0, -1.0], requires_grad=True)), rows, torch.tensor([0, 2]))
    assert math.isclose(loss.item(), -1.62 * math.exp(0.5) - 1.14 * math.exp(-0.1), rel_tol=1e-5)
    assert metrics["rto/token_reward"].tolist() == pytest.approx([-0.1, 2.0])


@pytest.mark.parametrize("algorithm", ["ppo", "dqo"])
def test_it_is_its_algorithm_on_other_rewards(algorithm):
    logits, make, rows, cu_seqlens = random_case([3, 1, 4])
    paid = 0.5 * (rows["dpo_model_logprobs"] - rows["ref_logprobs"]) + 0.7 * rows["rewards"]
    ours = RTO(beta=0.2, beta1=0.5, reward_coef=0.7, algorithm=algorithm, lam=0.9, whiten=False)
    its = PPO(beta=0.2, lam=0.9, whiten=False)
    if algorithm == "dqo":
        its = DQO(nll_coef=0.0, beta=0.2, lam=0.9, is_level="none", target_ema=0.9, value_coef=0.1)
    expected = gradients(its, logits, make, rows | {"rewards": paid}, cu_seqlens)
    found = gradients(ours, logits, make, rows, cu_seqlens)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, expected))
    whitened = replace(ours, whiten=True)
    assert whitened.needs_step_sums == (algorithm == "ppo")
    sums = whitened.step_sums(make(logits), rows, cu_seqlens)
    theirs = replace(PPO(beta=0.2, lam=0.9)).step_sums(make(logits), rows | {"rewards": paid}, cu_seqlens)
    assert torch.equal(sums["advantage_mean"], theirs["advantage_mean"])


@pytest.mark.parametrize("algorithm", ["ppo", "dqo"])
def test_without_rewards_and_with_beta_as_beta1_the_dpo_model_beside_no_value_is_a_fixed_point(algorithm):
    logits, make, rows, cu_seqlens = random_case([3, 1, 4])
    rows |= {"dpo_model_logprobs": make(logits).logprobs, "values": torch.zeros_like(rows["values"])}
    objective = RTO(beta=0.3, beta1=0.3, reward_coef=0.0, algorithm=algorithm, **FREE)
    for gradient in gradients(objective, logits, make, rows, cu_seqlens):
        assert gradient.abs().max() < 1e-12


def test_without_rewards_the_tabular_optimum_is_the_dpo_model():
    tree = alike(random_tree(0, depth=3))
    dpo = torch.randn(tree.ref_logits.shape, generator=torch.Generator().manual_seed(3)).double().log_softmax(-1)
    objective = RTO(beta=tree.beta, beta1=tree.beta, reward_coef=0.0, algorithm="dqo", lam=1.0, value_coef=1.0, target_ema=None,
                    value_clip=None)  # fmt: skip
    column = {"dpo_model_logprobs": dpo[tree.states, tree.actions]}
    assert rows_of(tree)["rewards"].abs().max() > 0.1
    policy, values = trained(objective, tree, max_steps=120, **column)
    assert (policy - dpo).abs().max() < 1e-6 and values.abs().max() < 1e-6


def test_log_probabilities_of_the_sampler_are_read_by_ppo_alone():
    assert len(selected(RTO(algorithm="dqo"), episodes(4))) == 4
    with pytest.raises(Exception, match="0 of 4 responses have them"):
        selected(RTO(), episodes(4))


def test_options_out_of_range_are_named():
    wrong = RTO(beta1=0.0, reward_coef=-1.0, reward_clip=-1.0, beta=0.0).problems()
    assert [name for name, _ in wrong] == ["beta", "reward_coef", "reward_clip", "beta1"]
    assert RTO().problems() == []


def test_with_dqo_the_values_of_ppo_s_options_are_not_looked_at():
    assert not RTO(algorithm="dqo", target_ema=None).problems()
    assert [name for name, _ in RTO(target_ema=None).problems()] == ["value_clip"]
