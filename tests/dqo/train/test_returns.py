"""Where a value model starts: the returns of the training data, and what the options make of them."""

import json

import numpy as np
import pytest
import torch

from dqo.config.options import Options, TrainConfig, load_options, options_of
from dqo.data.batches import collate
from dqo.errors import UserError
from dqo.models.critic import load_critic
from dqo.models.value_form import form_of
from dqo.objectives import DQO, DRO, OREO
from dqo.train.inputs import check_value_options
from dqo.train.learner import values_of
from dqo.train.returns import returns_of, value_start
from dqo.train.run import begin, train
from tests.dqo.helpers import arguments, episodes, policy


@pytest.mark.parametrize(
    "objective", [DQO(), DQO(gamma=0.5), DQO(gamma=0.5, discount="turns"), DRO(), OREO()], ids=lambda o: repr(o)[:30]
)
def test_returns_are_sums_of_what_is_paid_later(objective, monkeypatch):
    monkeypatch.setattr("dqo.train.returns._TOGETHER", 2)
    data = episodes(7)
    data[0].terminated = False  # not known to the end
    data[1].turn_ends = [0]
    found = []
    for e in data[1:]:
        value, own = 0.0, []
        for t in reversed(range(len(e.rewards))):
            here = getattr(objective, "discount", "tokens") == "tokens" or e.turn_end[t]
            value = float(e.rewards[t]) + (objective.discount_factor if here else 1.0) * value
            own.insert(0, value)
        found += own if objective.unit == "token" else own[:1]
    assert returns_of(objective, data) == pytest.approx((np.mean(found), min(found), max(found)), abs=1e-6)


def test_a_cross_entropy_of_equal_returns_is_refused():
    data = episodes(3)
    for e in data:
        e.rewards[:] = 0.0
    with pytest.raises(
        UserError, match="value_loss bce: every return of the training data is 0, .* --value_loss squared"
    ):
        value_start(options_of({"value_loss": "bce"}, "a test"), data, policy())


OPTIONS = {"value_loss": "hl_gauss", "value_init": "mean_return", "value_input": "ref_logprob", "reward_scale": 2.0}


@pytest.mark.parametrize("method, kind", [("dqo", "separate"), ("dro", "head")])
def test_a_run_starts_at_the_mean_return_learns_and_goes_on(files, capsys, method, kind):
    options = OPTIONS | {"method": method, "value_model": kind, "max_steps": 4, "save_steps": 2, "logging_steps": 2}
    trainer = begin(load_options(arguments(files, **options)))
    data, learner = trainer.prepared.episodes(), trainer.learner
    paid = np.concatenate([np.cumsum(e.rewards[::-1]) if method == "dqo" else [e.rewards.sum()] for e in data])
    said = f"value model: V starts at {paid.mean():.4g}, the mean return of the training data, V lies between 0 and 2"
    assert said in capsys.readouterr().out
    read = [e for e in data if e.ref_logprobs is not None]  # by the four steps
    values = values_of(learner, collate(read, 0))
    assert len(read) >= 32 and torch.allclose(values, torch.full_like(values, paid.mean()), atol=1e-3)
    trainer.run("a test")
    trainer.finish()
    form = form_of(learner.value_model)
    assert (form.loss, form.low, form.high, form.input) == ("hl_gauss", 0.0, 2.0, "ref_logprob")
    found = load_critic(files / "out" / "critic")
    assert form_of(found) == form
    rows = [json.loads(line) for line in (files / "out" / "metrics.jsonl").read_text().splitlines()]
    assert "eval_value/auc_end" in rows[-1] and rows[-2]["returns/clipped_frac"] >= 0
    later = {"output_dir": files / "later", "resume_from_checkpoint": files / "out" / "checkpoint-2"}
    train(load_options(arguments(files, **options | later)))
    again = load_critic(files / "later" / "critic").state_dict()
    assert all(torch.equal(again[name], value) for name, value in found.state_dict().items())


def test_another_form_is_another_run(files):
    first = {"max_steps": 1, "value_init": "mean_return", "value_model": "head"}
    train(load_options(arguments(files, **first)))
    for name, value in {"value_loss": "bce", "value_input": "ref_logprob", "value_init": "zero"}.items():
        with pytest.raises(UserError, match=f"belongs to another run:\n.*{name}"):
            begin(load_options(arguments(files, **first | {name: value})))


class Bare(DQO):
    """DQO without a reference, or with a value model of another kind."""

    needs_reference = False
    value_kind = "separate"


class Other(DQO):
    value_kind = "implicit"


@pytest.mark.parametrize(
    "objective, options, message",
    [
        (Bare(), {"value_input": "ref_logprob"}, "has no reference policy, which value_input ref_logprob reads"),
        (
            Other(),
            {"value_init": "mean_return"},
            "value_init mean_return is for value_model separate or head, not implicit",
        ),
        (
            Other(value_loss="bce"),
            {},
            "value_loss bce is for value_model separate or head, not implicit; leave one of them",
        ),
    ],
)
def test_what_a_value_model_cannot_do_is_refused(objective, options, message):
    with pytest.raises(UserError, match=message):
        check_value_options(Options(TrainConfig(**options), objective, {}))
