"""What step rewards do to the rewards of tokens, by hand and against the closed-form optimum of a tree MDP."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dqo.data.episode import begin_of, shaping
from dqo.data.episodes import make_episodes
from dqo.data.rows import read_rows
from dqo.data.together import check_process_reward
from dqo.errors import UserError
from tests.dqo.helpers import tokenizer
from tests.tabular import random_tree

TOKENIZER = tokenizer()
STEPS = {"steps": [[0, 6], [6, 8]], "step_rewards": [0.75, 0.5]}  # "1+2=3\n" ends at token 5, "#3" at token 7; then EOS


def made(row=None, **options):
    rows = [{"prompt": "1+2=", "completion": "1+2=3\n#3", "reward": 1.0, **STEPS} | (row or {})]
    settings = {"vocab_size": len(TOKENIZER), "max_length": 64, "process_reward": "potential"} | options
    (episode,) = make_episodes(read_rows(rows), TOKENIZER, **settings)
    return episode


def test_a_potential_pays_its_differences_and_is_0_after_eos():
    assert made().rewards.tolist() == [0, 0, 0, 0, 0, 0.75, 0, 0.5 - 0.75, 1.0 - 0.5]


def test_the_prompt_has_its_own_potential_and_the_end_has_none_whatever_is_stored():
    # the first step earns its difference alone, and the sum of all is the outcome less the prompt's potential
    paid = made({"prompt_value": 0.25}).rewards
    assert paid.tolist() == [0, 0, 0, 0, 0, 0.75 - 0.25, 0, 0.5 - 0.75, 1.0 - 0.5]
    assert made({"prompt_value": 0.25, "finish_reason": "length", "step_rewards": [0.75, 9.0]}).rewards.sum() == 0.75


def test_a_row_without_steps_is_paid_against_the_potential_of_its_prompt():
    plain = {"steps": None, "step_rewards": None, "prompt_value": 0.25}
    assert made(plain).rewards.tolist() == [0] * 8 + [0.75]
    assert made({"steps": None, "step_rewards": None}).rewards.tolist() == [0] * 8 + [1.0]


def test_with_a_discount_every_token_after_the_first_step_is_paid():
    # gamma 0.5: between step ends Phi stays 0.75, and 0.5 * 0.75 - 0.75 is paid
    expected = [0, 0, 0, 0, 0, 0.375, -0.375, 0.25 - 0.75, 1.0 - 0.5]
    np.testing.assert_allclose(made(gamma=0.5).rewards, expected)


def test_a_bootstrapped_response_keeps_the_potential_of_its_last_state():
    cut = {"finish_reason": "length"}
    kept = made(cut, truncation="bootstrap", gamma=0.5)
    np.testing.assert_allclose(kept.rewards, [0, 0, 0, 0, 0, 0.375, -0.375, 0.25 - 0.75])
    assert not kept.terminated
    # taken for an end, the same response falls to Phi = 0, and is paid its outcome
    np.testing.assert_allclose(made(cut).rewards, [0, 0, 0, 0, 0, 0.75, 0, 1.0 - 0.75])


@pytest.mark.parametrize("process_reward, expected", [("potential", [1.5, -0.5, -1.0]), ("additive", [1.5, 1.0, 0.0])])
def test_the_coefficient_scales_step_rewards_and_not_the_outcome(process_reward, expected):
    rewards = made({"reward": 0.0}, process_reward=process_reward, process_coef=2.0, reward_scale=3.0).rewards
    assert rewards[[5, 7, 8]].tolist() == expected


def test_steps_beyond_an_allowed_cut_have_no_potential():
    cut = made(max_length=11, allow_truncation=True)  # 7 response tokens: the second step ends beyond them
    assert cut.rewards.tolist() == [0, 0, 0, 0, 0, 0.75, 1.0 - 0.75]


def test_two_steps_that_end_on_one_token_have_the_potential_of_the_later():
    assert shaping([1, 1], [0.25, 1.0], 3, gamma=1.0, terminated=True).tolist() == [0, 1.0, -1.0]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("terminated", [True, False])
def test_discounted_differences_telescope(gamma, terminated):
    rng = np.random.default_rng(0)
    ends, potentials = [2, 3, 9, 17], rng.normal(size=4)
    paid = shaping(ends, potentials.tolist(), 20, gamma, terminated)
    left = 0.0 if terminated else gamma**20 * potentials[-1]
    assert (paid * gamma ** np.arange(20)).sum() == pytest.approx(left)
    paid = shaping(ends, potentials.tolist(), 20, gamma, terminated, initial=0.4)
    assert (paid * gamma ** np.arange(20)).sum() == pytest.approx(left - 0.4)


def episode_rewards(tree, step_rewards, process_reward, prompt_value):
    """(N,) rewards of the tree's trajectories as episodes: a character is an action, a line a step. `step_rewards` (N,)."""
    rows, position = [], 0
    for length in tree.seqlens.tolist():
        here = slice(position, position + length)
        rows.append(
            {
                "prompt": "1",
                "completion": "2" * length,
                "reward": 0.0,
                "steps": [[i, i + 1] for i in range(length)],
                "step_rewards": step_rewards[here].tolist(),
                "prompt_value": prompt_value,
                "finish_reason": "length",  # no EOS: the last action ends the response
            }
        )
        position += length
    options = {"vocab_size": len(TOKENIZER), "max_length": 64, "process_reward": process_reward}
    return torch.tensor(np.concatenate([e.rewards for e in make_episodes(read_rows(rows), TOKENIZER, **options)]))


@pytest.mark.parametrize("prompt_value", [None, 0.0, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_potentials_leave_the_optimal_policy_where_it_is_and_added_rewards_move_it(seed, prompt_value):
    tree = random_tree(seed)
    rng = torch.Generator().manual_seed(seed)
    potential = torch.randn(len(tree.children), generator=rng, dtype=torch.float64)
    potential[0] = prompt_value or 0.0
    after = torch.where(
        tree.terminal, 7.0, potential[tree.children.clamp(min=0)]
    )  # 7: what stands at an end counts nothing
    step_rewards = after[tree.states, tree.actions]

    def optimum(process_reward):
        paid = torch.zeros_like(tree.step_rewards)  # a row's state and action give its reward, in every trajectory
        paid[tree.states, tree.actions] = episode_rewards(tree, step_rewards, process_reward, prompt_value).double()
        return replace(tree, step_rewards=tree.step_rewards + paid).optimum()

    base, shaped = tree.optimum(), optimum("potential")
    assert (shaped.log_policy - base.log_policy).abs().max() < 1e-5  # rewards are float32
    torch.testing.assert_close(shaped.v, base.v - potential, atol=1e-5, rtol=0)
    assert (optimum("additive").log_policy - base.log_policy).abs().max() > 0.1


def test_step_rewards_need_a_choice_and_a_choice_needs_step_rewards():
    rows = read_rows([{"prompt": "1", "completion": "12", "reward": 1.0, "step_rewards": [1.0]}])
    with pytest.raises(UserError, match="f.jsonl has step_rewards; .* additive .* potential .* none"):
        check_process_reward(rows, "f.jsonl", None)
    check_process_reward(rows, "f.jsonl", "none")
    plain = read_rows([{"prompt": "1", "completion": "12", "reward": 1.0}])
    with pytest.raises(UserError, match="f.jsonl has no step_rewards, so --process_reward potential would do nothing"):
        check_process_reward(plain, "f.jsonl", "potential")
    check_process_reward(plain, "f.jsonl", "none")


def test_rows_of_one_prompt_have_one_potential():
    def rows(*values):
        given = [{"prompt": "1", "completion": "12", "reward": 1.0} for _ in values]
        return read_rows([row if value is None else row | {"prompt_value": value} for row, value in zip(given, values)])

    check_process_reward(rows(0.5, 0.5), "f.jsonl", "potential")
    check_process_reward(rows(0.5, 0.75), "f.jsonl", "none")
    for second in (0.75, None):
        with pytest.raises(
            UserError, match=f"row 2: prompt_value is {second}, and row 1 of the same prompt has 0.5; as pot"
        ):
            check_process_reward(rows(0.5, second), "f.jsonl", "potential")
    with pytest.raises(UserError, match='prompt_value is "high", a string; expected a number'):
        rows("high")


def right_length(row, **options):
    return made(row, **options).right_length


@pytest.mark.parametrize("label, whole", [(True, 9), (False, 0)])
@pytest.mark.parametrize("process_reward", ["none", "additive", "potential"])
def test_tokens_before_the_first_wrong_step_are_right_whatever_is_paid(label, whole, process_reward):
    of = {"label": label, "process_reward": process_reward}  # two steps of 6 and 2 tokens, and EOS
    paid = {"process_reward": of.pop("process_reward")}
    assert right_length({"step_rewards": [1.0, -1.0]} | of, **paid) == 6
    assert right_length({"step_rewards": [1.0, 0.0]} | of, **paid) == 6  # labels of 1 and 0, or pass rates
    assert right_length({"step_rewards": [-1.0, 1.0]} | of, **paid) == 0
    for untold in ({"step_rewards": [1.0, 1.0]}, {"steps": None, "step_rewards": None}):
        assert right_length(untold | of, **paid) == whole


def test_a_response_that_was_cut_before_its_wrong_step_is_right_as_far_as_it_goes():
    row = {"step_rewards": [1.0, -1.0], "label": False}
    assert right_length(row, max_length=10, allow_truncation=True) == 6  # all of it; four tokens are the prompt's
    assert right_length(row, max_length=11, allow_truncation=True) == 6
    assert right_length(row, max_length=8, allow_truncation=True) == 4


def test_a_token_of_two_steps_is_wrong_where_one_of_them_is():
    steps = {"steps": [[0, 6], [6, 7], [7, 8]], "step_rewards": [1.0, -1.0, 1.0]}
    assert right_length(steps) == 6
    assert begin_of(1, [5, 5, 7], 9) == 5 and begin_of(2, [5, 5, 7], 9) == 6


def test_turns_with_a_penalty_say_nothing_of_those_before_them():
    turns = {"steps": None, "step_rewards": None, "turn_spans": [[0, 6], [6, 8]], "turn_rewards": [0.5, -1.0]}
    assert right_length(turns | {"label": False}) == 0 and right_length(turns | {"label": True}) == 9
