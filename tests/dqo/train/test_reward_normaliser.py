import numpy as np
import pytest

from dqo.config.options import load_options
from dqo.data.rows import Row
from dqo.errors import UserError
from dqo.train.reward_normaliser import with_normalised_rewards
from dqo.train.run import begin, train
from tests.dqo.helpers import arguments

ROWS = [Row(prompt="1=", completion="1", reward=reward, label=True) for reward in (0.0, 0.0, 1.0, 3.0)]


def test_scale_and_shift_give_mean_0_and_variance_1():
    options, said = with_normalised_rewards(load_options(["--normalize_rewards"]), ROWS)
    paid = [options.train.reward_scale * row.reward + options.train.reward_shift for row in ROWS]
    assert np.mean(paid) == pytest.approx(0.0, abs=1e-12) and np.var(paid) == pytest.approx(1.0)
    assert not options.train.normalize_rewards and "reward_scale 0.816497, reward_shift -0.816497" in said
    assert with_normalised_rewards(load_options([]), ROWS) == (load_options([]), "")


@pytest.mark.parametrize(
    "flags, rows, message",
    [
        (
            ["--reward_scale", "2"],
            ROWS,
            r"normalize_rewards and reward_scale are both given \(--reward_scale\); remove one",
        ),
        ([], ROWS[:2], "every reward is 0, which no factor gives variance 1"),
    ],
)
def test_what_cannot_be_normalised_is_refused(flags, rows, message):
    with pytest.raises(UserError, match=message):
        with_normalised_rewards(load_options(["--normalize_rewards", *flags]), rows)


def test_a_run_is_trained_on_them_says_so_and_goes_on_with_them(files, capsys):
    flags = [*arguments(files, method="sft", max_steps=2), "--normalize_rewards"]
    trainer = begin(load_options(flags))
    paid = [e.rewards.sum() for e in trainer.prepared.episodes()]
    assert np.mean(paid) == pytest.approx(0.0, abs=1e-6) and np.var(paid) == pytest.approx(1.0, rel=1e-5)
    assert "normalize_rewards: reward_scale" in capsys.readouterr().out
    train(load_options(flags))
    assert "normalize_rewards: false" in (files / "out" / "config.yaml").read_text()
    train(load_options(flags))  # finished: it goes on there
    again = [*arguments(files, method="sft", max_steps=2)]
    assert train(load_options(again)).prepared.episodes()[0].rewards.sum() == pytest.approx(paid[0])
