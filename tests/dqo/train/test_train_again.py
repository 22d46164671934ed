"""A DQOTrainer whose training was interrupted, stopped or finished, and is called again; what it is given wrongly."""

import os
import signal

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from dqo import DQOConfig, DQOTrainer
from dqo.errors import UserError
from tests.dqo.helpers import policy, rollout_rows, tokenizer
from tests.dqo.train.test_callbacks import BEST, Scores, rows, trainer, weights_at


class Once(TrainerCallback):
    """Does something at the end of one step, the first time."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **others):
        if state.global_step == self.step and self.action is not None:
            action, self.action = self.action, None
            action(control)


def stop(control):
    control.should_training_stop = True


def interrupt(control):
    os.kill(os.getpid(), signal.SIGINT)


def plain(files, name):
    return [{n: v for n, v in row.items() if not n.startswith("perf/")} for row in rows(files, name)]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 5])
def test_an_interrupted_training_goes_on_in_the_same_object(files, step):
    options = {"save_steps": 2, "save_total_limit": 9}
    trainer(files, name="whole", **options).train()
    made = trainer(files, [Once(step, interrupt)], **options)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert made.train().global_step == 6
    assert plain(files, "out") == plain(files, "whole")
    found, expected = weights_at(files, 6), weights_at(files, 6, "whole")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_a_stopped_training_goes_on_unless_its_models_are_the_best_ones(files):
    made = trainer(files, [Once(3, stop)])
    assert (made.train().global_step, made.train().global_step) == (3, 6)
    assert [row["step"] for row in rows(files) if "loss" in row] == [2, 4, 6]
    scores = [Scores([0, 9, 1, 1, 1, 1, 1]), EarlyStoppingCallback(2)]
    made = trainer(files, scores, "best", **BEST, load_best_model_at_end=True)
    assert made.train().global_step == 3
    with pytest.raises(UserError, match="those of the best evaluation.*make another DQOTrainer"):
        made.train()


@pytest.mark.slow
def test_a_checkpoint_that_is_named_too_late_is_refused(files):
    trainer(files, save_steps=2, save_total_limit=9).train()
    made = trainer(files)
    assert (made.state.global_step, made.state.max_steps) == (6, 6)  # before train is called
    for value in (str(files / "out" / "checkpoint-2"), False):
        with pytest.raises(UserError, match=f"resume_from_checkpoint {value or 'never'} comes too late"):
            made.train(resume_from_checkpoint=value)
    assert made.train(resume_from_checkpoint=True).global_step == 6


@pytest.mark.parametrize("name", ["learning_rate", "nothing_known", "options"])
def test_a_config_does_not_change(name):
    made = DQOConfig(learning_rate=0.5)
    with pytest.raises(AttributeError, match=f"DQOConfig does not change: make another, with {name}="):
        setattr(made, name, 0.1)
    assert made.learning_rate == 0.5


@pytest.mark.parametrize(
    "option, arguments",
    [
        ("model_name_or_path", {"model": "b"}),
        ("ref_model_name_or_path", {"ref_model": "b"}),
        ("ref_model_name_or_path", {"ref_model": policy()}),
        ("dataset_name", {"train_dataset": "b"}),
        ("dataset_name", {"train_dataset": rollout_rows(prompts=2, samples=2)}),
        ("eval_dataset_name", {"eval_dataset": "b"}),
        ("eval_dataset_name", {"eval_dataset": []}),
    ],
)
def test_what_is_given_twice_is_refused(option, arguments):
    (argument,) = arguments
    with pytest.raises(UserError, match=rf"{argument} and {option}='a' \(from DQOConfig\) are both given"):
        DQOTrainer(args=DQOConfig(**{option: "a"}), **arguments)
    if isinstance(arguments[argument], str):
        DQOTrainer(args=DQOConfig(**{option: "b"}), **arguments)  # the same twice
    DQOTrainer(policy(), DQOConfig(model_name_or_path="a"), processing_class=tokenizer())


@pytest.mark.parametrize(
    "found, message",
    [
        (None, "compute_metrics returned a NoneType; expected a dict of numbers"),
        (0.5, "compute_metrics returned a float; expected a dict"),
        ({"a": "b"}, "compute_metrics returned 'a' as a str; expected numbers"),
        ({"a": None}, "compute_metrics returned 'a' as a NoneType; expected numbers"),
        ({"a": torch.ones(2)}, "compute_metrics returned 'a' as a Tensor; expected numbers"),
        ({1: 0.5}, "compute_metrics returned 1 as a float; expected numbers by name"),
    ],
)
def test_compute_metrics_that_returns_no_numbers_is_named(files, found, message):
    config = DQOConfig(output_dir=str(files / "out"), max_steps=1, eval_fraction=0.2)
    made = DQOTrainer(str(files / "model"), config, str(files / "rollouts.jsonl"), compute_metrics=lambda given: found)
    with pytest.raises(UserError, match=message):
        made.evaluate()


@pytest.mark.parametrize("value", ["good", None])
def test_a_string_among_the_metrics_is_shown_and_is_no_best(files, value, capsys):
    trainer(files, [Scores([value] * 7)]).train()
    assert f"eval_made_up  {value}" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"metric_for_best_model 'made_up' is {value!r}; expected a number"):
        trainer(files, [Scores([value] * 7)], "best", **BEST).train()
