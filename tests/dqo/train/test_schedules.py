"""Three schedules of this trainer, and all of transformers' that depend on the step alone."""

import json
import math
import typing

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from dqo.config.optimizer import Schedule, argument_values
from dqo.config.options import load_options, options_of
from dqo.errors import UserError
from dqo.train.inputs import check_options
from dqo.train.loop import Trainer
from dqo.train.run import begin, train
from dqo.train.schedules import OWN, critic_rate, factors, schedule
from tests.dqo.helpers import arguments

NEEDED = {
    "cosine_with_min_lr": ("min_lr_rate=0.1",),
    "cosine_warmup_with_min_lr": ("min_lr=1e-4", "warmup_lr_rate=0.2"),
    "warmup_stable_decay": ("num_decay_steps=5", "min_lr_ratio=0.1", "decay_type=linear"),
    "polynomial": ("lr_end=1e-5", "power=2.0"),
    "cosine_with_restarts": ("num_cycles=2",),
}


def test_warmup_rises_linearly_and_cosine_falls_to_zero():
    found = [schedule(step, 10, 2, "cosine") for step in range(10)]
    assert found[:3] == [0.5, 1.0, 1.0]
    assert found[6] == pytest.approx(0.5)
    assert found == sorted(found[:2]) + sorted(found[2:], reverse=True)
    assert 0 < found[-1] < 0.05


def test_linear_and_constant_schedules():
    assert schedule(5, 10, 0, "linear") == 0.5
    assert schedule(9, 10, 0, "constant") == 1.0


def test_every_name_of_transformers_is_there_but_for_those_that_follow_a_metric():
    names = set(typing.get_args(Schedule))
    assert {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"} <= names
    with pytest.raises(UserError, match="lr_scheduler_type must be .*got 'reduce_lr_on_plateau'"):
        options_of({"lr_scheduler_type": "reduce_lr_on_plateau"}, "DQOConfig")


@pytest.mark.parametrize("kind", sorted(set(typing.get_args(Schedule)) - set(OWN)))
def test_the_rates_are_those_that_transformers_gives_its_own_optimizer(kind):
    texts = NEEDED.get(kind, ())
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-3)
    theirs = get_scheduler(kind, optimizer, 4, 20, argument_values(texts))
    found, expected = factors(kind, texts, 3e-3, 4, 20), []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert [3e-3 * found(step) for step in range(20)] == pytest.approx(expected, rel=1e-12)


def test_steps_below_one_are_a_share_and_the_minimum_is_reached():
    found = factors("warmup_stable_decay", ("num_decay_steps=0.25", "min_lr_ratio=0.1"), 1.0, 2, 40)
    assert [found(step) for step in (2, 29, 30)] == [1.0, 1.0, 1.0] and 0.1 < found(39) < found(35) < 1.0
    assert math.isclose(factors("cosine_with_min_lr", ("min_lr=1e-5",), 1e-4, 0, 10)(10), 0.1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["cosine", "min_lr=1e-5"], "^lr_scheduler_kwargs: cosine has no arguments; remove min_lr=1e-5"),
        (
            ["cosine_with_min_lr"],
            "^lr_scheduler_kwargs: .*cosine_with_min_lr with no arguments: One of min_lr or min_lr_rate",
        ),
        (["cosine_with_restarts", "cycles=2"], "unexpected keyword argument 'cycles'"),
        (["polynomial", "lr_end=1"], "^lr_scheduler_kwargs: .*lr_end"),
        (["warmup_stable_decay", "num_decay_steps=30"], "num_decay_steps are more than the 12 steps"),
        (["cosine_with_min_lr", "min_lr_rate=nan"], "expected finite numbers"),
        (["inverse_sqrt", "timescale=none"], "^lr_scheduler_kwargs: "),
        (["linear", "fast"], "^lr_scheduler_kwargs must be name=value, got 'fast'"),
    ],
)
def test_arguments_that_no_schedule_has_are_refused_before_any_work(files, flags, message):
    kind, *texts = flags
    more = ["--lr_scheduler_type", kind, *(["--lr_scheduler_kwargs", *texts] if texts else [])]
    with pytest.raises(UserError, match=message) as caught:
        check_options(load_options([*arguments(files), *more]))
    assert "\n" not in str(caught.value)


def test_a_run_has_the_rates_of_its_schedules(files):
    options = options_of(
        {
            "dataset_name": str(files / "rollouts.jsonl"),
            "model_name_or_path": str(files / "model"),
            "output_dir": str(files / "out"),
            "max_steps": 10,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 4, "min_lr_ratio": 0.5},
            "critic_lr_scheduler_type": "constant",
        },
        "DQOConfig",
    )
    trainer: Trainer = begin(options)
    rates = {name: [trainer.schedules[name](step) for step in (0, 9)] for name in trainer.schedules}
    trainer.recorder.close()
    assert rates["critic"] == [1.0, 1.0] and rates["policy"][0] == 1.0 and 0.5 < rates["policy"][1] < 0.7


def test_a_value_model_has_the_rate_of_its_form_where_none_is_given(files):
    places = {"dataset_name": files / "rollouts.jsonl", "model_name_or_path": files / "model"}

    def options(form, **changes):
        named = {name: str(place) for name, place in places.items()} | {"output_dir": str(files / form), "max_steps": 1}
        return options_of(named | {"value_model": form} | changes, "here")

    rates = {"head": 1e-3, "separate": 1e-5}
    for form, rate in rates.items():
        train(options(form, logging_steps=1))
        rows = [json.loads(line) for line in (files / form / "metrics.jsonl").read_text().splitlines()]
        assert [row["critic/learning_rate"] for row in rows if "loss" in row] == [rate]
        assert critic_rate(options(str(files / form))) == rate
    assert critic_rate(options("implicit")) == critic_rate(options("separate", method="dro")) == 1e-5
    assert critic_rate(options("head", critic_learning_rate=0.5)) == 0.5
    with pytest.raises(UserError, match="critic_learning_rate must be positive or None, got 0.0"):
        options("head", critic_learning_rate=0.0)
