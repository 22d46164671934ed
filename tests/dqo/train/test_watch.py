import pytest

from dqo.config.options import load_options
from dqo.train.run import train
from dqo.train.watch import Watch
from tests.dqo.helpers import arguments


def said(rows, **known):
    watch = Watch(**known)
    return [warning for step, row in enumerate(rows, start=1) for warning in watch.warnings({"step": step, **row})]


def test_a_healthy_run_is_left_alone():
    assert said([{"loss": 1 / step, "value/explained_variance": 0.1, "kl": 0.01} for step in range(1, 20)]) == []


def test_a_loss_that_grows_is_called_diverging_once():
    (warning,) = said([{"loss": loss} for loss in (1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0)])
    assert "grown from 1 to 6 (step 5): it diverges" in warning


def test_one_bad_row_is_no_divergence():
    assert said([{"loss": loss} for loss in (1.0, 9.0, 1.0, 9.0, 1.0)]) == []


def test_a_value_model_that_explains_nothing_is_named_with_the_cure():
    (warning,) = said([{"loss": 1.0, "value/explained_variance": -0.2}] * 6)
    assert "explained variance -0.2 at step 3" in warning and "value_warmup_steps" in warning


def test_what_is_not_trained_gets_no_advice_on_its_training():
    (warning,) = said([{"loss": 1.0, "value/explained_variance": -0.2}] * 6, trains_values=False)
    assert "choose another --value_model" in warning and "critic_learning_rate" not in warning


def test_a_policy_far_from_its_reference_is_named():
    (warning,) = said([{"loss": 1.0, "kl": 2.5}] * 4)
    assert "2.5 nats a token away" in warning and "raise beta" in warning


def test_a_policy_that_leaves_its_reference_under_a_low_beta_is_told_to_raise_it():
    # of a run of the demonstration's model at 5e-4, beta 0.002 and without a cap, a row every 5 steps
    kl = [1.6034, 0.0871, 0.0738, 0.1221, 0.265, 173.7552, 1171.5279, 1169.436]
    (warning,) = said([{"loss": 0.3, "kl": x} for x in kl], beta=0.002, largest_reward=1.0)
    assert (
        "the policy is 1.17e+03 nats a token away from its reference (step 8): raise --beta (now 0.002, with" in warning
    )
    assert "rewards of 1 ask for 500 nats a response" in warning
    assert said([{"loss": 0.3, "kl": x} for x in kl[:5]], beta=0.002, largest_reward=1.0) == []
    (warning,) = said([{"loss": 0.3, "kl": x} for x in kl], beta=0.2, largest_reward=1.0)
    assert warning.endswith("(step 8): lower the learning rate or raise beta")


def test_implicit_rewards_far_beyond_the_rewards_are_named():
    row = {"loss": 0.1, "rewards/chosen": -0.4, "rewards/rejected": -3.2, "completions/mean_length": 100.0}
    (warning,) = said([row] * 5, beta=0.2, largest_reward=1.0)
    assert "is -3.2 on average, and rewards are at most 1 (step 3)" in warning and "Lower --learning_rate" in warning
    assert said([row] * 5, beta=0.2, largest_reward=100.0) == []  # such rewards ask for it
    assert said([row] * 5, beta=0.2) == []  # a method that does not fit them


def test_right_responses_that_become_unlikely_are_named():
    row = {"loss": 0.1, "rewards/chosen": -3.0, "rewards/rejected": -4.0, "completions/mean_length": 50.0}
    (warning,) = said([row] * 5, beta=0.2)  # 15 nats, 0.3 a token
    assert "right responses have become less likely, by 0.3 nats a token (step 3)" in warning
    assert warning.endswith("raise --beta")
    assert said([row] * 5, beta=0.2, likelihood="nll_coef")[0].endswith("or keep them likely by --nll_coef")
    assert said([row | {"completions/mean_length": 500.0}] * 5, beta=0.2) == []


def test_a_policy_that_stays_where_it_began_is_told_at_the_end():
    def ending(*kl, **known):
        watch = Watch(**known)
        for step, nats in enumerate(kl, start=1):
            watch.warnings({"step": step, "loss": 1.0} | ({} if nats is None else {"kl": nats}))
        return watch.at_end()

    (warning,) = ending(*[0.0] * 10, 2e-7)
    assert "hardly moved" in warning and "2e-07 nats a token" in warning and "--learning_rate" in warning
    assert (
        ending(*[0.0] * 12, policy_from=2) and ending(*[0.0] * 12, policy_from=3) == []
    )  # the value model alone before
    assert ending(*[0.0] * 10, 1e-4) == ending(*[0.0] * 3) == ending(*[None] * 12) == Watch().at_end() == []


@pytest.mark.parametrize("rate, warmup, told", [(1e-9, 2, True), (1e-9, 12, False), (1e-2, 2, False)])
def test_a_run_says_that_its_policy_has_hardly_moved_where_it_was_trained(rate, warmup, told, files, capsys):
    given = {"learning_rate": rate, "max_steps": 12, "value_warmup_steps": warmup, "eval_fraction": 0.0}
    train(load_options(arguments(files, **given)))
    assert ("hardly moved" in capsys.readouterr().out) == told
