import json
import math
from dataclasses import replace

import pytest
import torch

from dqo.config.options import load_options
from dqo.data.selection import selected
from dqo.errors import UserError
from dqo.objectives import DAPO, DQO
from dqo.train.inputs import load_rows
from dqo.train.phases import stretches
from dqo.train.returns import returns_of
from tests.dqo.helpers import episodes
from tests.dqo.objectives.on_tree import alike, loss_of
from tests.dqo.objectives.packed import random_case, stats_of
from tests.tabular import random_tree

# beta 0.5: delta = [0.2, -0.4, 0.5], steps [0, 0, 1]; V = [0.3, ., 0.6], P = [0.5, ., 0.25], R = 1
ROWS = {"ref_logprobs": [-1.2, -0.6, -1.5], "rewards": [9.0, 9.0, 9.0], "values": [0.3, 9.0, 0.6], "step": [0, 0, 1]}
ROWS |= {"label": [1.0] * 3, "pass_rate": [0.5, 9.0, 0.25], "outcome": [1.0] * 3, "cut": [0.0] * 3}


def call(objective, **extra):
    rows = {name: torch.tensor(column) for name, column in (ROWS | extra).items()}
    rows["values"].requires_grad_()
    logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    loss, metrics = objective(stats_of(logprobs), rows, torch.tensor([0, 3]))
    loss.backward()
    return loss.item(), metrics, logprobs.grad, rows["values"].grad


def test_the_loss_of_two_steps_by_hand():
    # A = 0.6 - 0.3 and 1 - 0.6; e = -0.2 - 0.3 / 0.5 = -0.8 and 0.5 - 0.4 / 0.5 = -0.3; V - P = -0.2 and 0.35
    loss, metrics, logprobs, values = call(DAPO(beta=0.5, value_loss="squared"))
    assert math.isclose(loss, 0.25 * (0.64 + 0.09) + 0.25 * (0.04 + 0.35**2), rel_tol=1e-5)
    assert torch.allclose(logprobs, torch.tensor([-0.8, -0.8, -0.3]) / 2)
    assert torch.allclose(values, torch.tensor([-0.2, 0.0, 0.35]) / 2)
    assert metrics["advantages/mean"].tolist() == pytest.approx([0.7, 2.0])


def test_a_response_that_was_cut_ends_with_the_value_of_its_last_state():
    cut = {"bootstrap": [0.0, 0.0, 0.7], "cut": [1.0] * 3}
    assert call(DAPO(), **cut)[1]["advantages/mean"].tolist() == pytest.approx([0.3 + 0.1, 2.0])
    others = {"bootstrap": [0.0, 0.0, 0.7]}  # another response of the batch was cut, not this one
    assert call(DAPO(), **others)[1]["advantages/mean"].tolist() == pytest.approx([0.7, 2.0])


def test_with_steps_of_one_token_it_is_one_step_dqo_with_a_frozen_value_over_beta_squared():
    logits, make, rows, cu_seqlens = random_case([4] * 3)
    rows["step"], rows["rewards"] = torch.arange(12) % 4, torch.zeros(12).double()
    rows["rewards"][3::4] = rows["outcome"][3::4] = torch.tensor([0.3, -0.2, 1.0]).double()
    del rows["behavior_logprobs"]

    def gradient(objective):
        leaf = logits.clone().requires_grad_()
        objective(make(leaf), rows, cu_seqlens)[0].backward()
        return leaf.grad

    dqo = DQO(nll_coef=0.0, beta=0.3, policy_target="one_step", is_level="none", value_coef=0.0)
    assert torch.allclose(4 * 0.3**2 * gradient(DAPO(beta=0.3, value_loss="squared")), gradient(dqo), rtol=1e-10)


def test_with_the_soft_value_of_an_outcome_the_tabular_optimum_is_reached():
    tree = alike(random_tree(0, depth=3))
    tree = replace(tree, step_rewards=tree.step_rewards * tree.terminal)
    optimum, n = tree.optimum(), len(tree.states)
    outcome = torch.zeros(len(tree.seqlens)).double().index_add(0, tree.sequences, tree.rewards)[tree.sequences]
    columns = {"outcome": outcome, "pass_rate": torch.zeros(n).double(), "cut": torch.zeros(n).double()}
    logits = tree.ref_logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=150, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(DAPO(beta=tree.beta, value_loss="squared"), tree, logits, optimum.v, **columns)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (logits.detach().log_softmax(-1) - optimum.log_policy).abs().max() < 1e-4


def test_the_critic_is_trained_first_and_then_stays_as_it_is():
    found = [[(s.begin, s.phase.trains) for s in stretches(DAPO(), warmup, 10)] for warmup in (0, 0.25, 4)]
    assert found == [[(0, ("critic",)), (begin, ("policy",))] for begin in (5, 3, 4)]
    assert [s.phase.trains for s in stretches(DAPO(), 0, 10, frozen=True)] == [("policy",)]


def members():
    found = episodes(4)  # prompts 0, 0, 1, 1; rewards 0, 1, 0, 1
    for e in found:
        e.prompt_ids, e.rewards = [1], e.rewards[:1].repeat(4)
        e.completion_ids, e.step_ends, e.step_rewards = [3, 4, 5, 6], [1, 2], [0.75, 0.25]
    found[0].prompt_value = 0.1
    return found


def test_every_state_has_the_pass_rate_of_the_file_and_the_prompt_its_mean_outcome_where_it_has_none():
    groups = selected(DAPO(), members())
    rates = [e.columns["pass_rate"].tolist() for (e,) in groups]
    assert rates[0] == pytest.approx([0.1, 0.1, 0.75, 0.25]) and rates[1] == pytest.approx([0.5, 0.5, 0.75, 0.25])
    assert groups[0][0].columns["step"].tolist() == [0, 0, 1, 1]  # the end token belongs to the last step
    mean, low, high = returns_of(DAPO(), [e for (e,) in groups])
    assert (low, high) == (0.0, 1.0) and mean == pytest.approx((1.2 + 3 * 2.0) / 16)


def test_steps_without_pass_rates_are_counted_and_refused():
    found = members()
    found[2].step_rewards = []
    with pytest.raises(
        UserError, match=r"and 3 of 4 responses have one for each step \(the first without: row 3\); `dqo score"
    ):
        selected(DAPO(), found)


def test_outcomes_that_are_no_pass_rates_are_counted_and_refused():
    found = members()
    found[1].reward = -1.0
    with pytest.raises(
        UserError, match=r"1 of 4 responses have another reward \(the first: row 2, -1\); bring them there"
    ):
        selected(DAPO(), found)


@pytest.mark.parametrize("flags", [[], ["--process_reward", "additive"]])
def test_step_rewards_in_another_sense_are_refused(flags, tmp_path):
    rows = [{"prompt": "a", "completion": "x", "reward": float(i)} for i in range(2)]
    if flags:
        rows = [row | {"steps": [[0, 1]], "step_rewards": [0.0]} for row in rows]
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = load_options(["--method", "dapo", "--dataset_name", str(path), "--eval_fraction", "0", *flags])
    told = r"it is None; 0 of 2 rows" if not flags else "it is additive; 2 of 2 rows"
    with pytest.raises(UserError, match=told + r" have them. `dqo score FILE --prefix_values 8` measures"):
        load_rows(options)


def test_options_out_of_range_are_named():
    assert [name for name, _ in DAPO(beta=0.0, value_model="implicit").problems()] == ["beta", "value_model"]
    assert DAPO().problems() == []
