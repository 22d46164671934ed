"""Options that change nothing in a run are named once, and those that do something are not."""

import dataclasses

import pytest

from dqo.config.effects import without_effect
from dqo.config.options import TrainConfig, load_options, options_of
from dqo.train.inputs import Given, load_rows
from tests.dqo.helpers import rollout_rows

# (what the run is, options that are idle in it, why, what gives them an effect)
CASES = [
    ({"method": "sft"}, {"critic_learning_rate": 1e-3}, "the method trains no value model", {"method": "oreo"}),
    ({"method": "kto"}, {"value_warmup_steps": 5}, "the method trains no value model", {"method": "dro"}),
    ({"value_model": "none"}, {"critic_learning_rate": 1e-3}, "the method trains no value model", {}),
    ({"method": "dpo"}, {"critic_max_grad_norm": 0.5}, "the method trains no value model", {"method": "dqo"}),
    ({"value_model": "none"}, {"critic_lr_scheduler_type": "linear"}, "the method trains no value model", {}),
    (
        {"value_model": "none"},
        {"value_init": "mean_return", "value_loss": "bce"},
        "the method trains no value model",
        {},
    ),
    ({"method": "kto"}, {"value_input": "ref_logprob"}, "the method trains no value model", {"method": "dro"}),
    ({"value_model": ".", "freeze_value_model": True}, {"value_coef": 3.0}, "the value model is frozen", {}),
    ({"value_model": "."}, {"implicit_beta": 0.9}, "no new value model is implicit", {"value_model": "implicit"}),
    ({"method": "rft"}, {"ref_cache_dir": "cache"}, "the method has no reference policy", {"method": "dpo"}),
    ({}, {"lora_r": 4, "lora_alpha": 3.0}, "no adapters are trained", {"use_peft": True}),
    ({}, {"lora_target_modules": ["q_proj"]}, "no adapters are trained", {"use_peft": True}),
    ({"eval_dataset_name": "x.jsonl"}, {"eval_fraction": 0.3}, "the evaluation rows are given", {}),
    ({}, {"max_completion_length": 9}, "eval_tasks is not given", {"eval_tasks": "x.jsonl", "verifier": "gsm8k"}),
    ({}, {"verifier": "gsm8k", "num_generations": 2}, "eval_tasks is not given", {"eval_tasks": "x.jsonl"}),
    ({"process_reward": "none"}, {"process_coef": 0.5}, "step rewards are not used", {"process_reward": "additive"}),
    ({}, {"run_name": "a", "project": "b"}, "report_to is none", {"report_to": "wandb"}),
    (
        {"method": "qrpo"},
        {"normalize_rewards": True},
        "the method does not read the size of rewards",
        {"method": "tbrm"},
    ),
    (
        {"method": "curry_dpo"},
        {"reward_shift": 1.0, "reward_scale": 2.0},
        "the method does not read the size of rewards",
        {"method": "rebel"},
    ),
    (
        {"method": "dpo"},
        {"loss_type": "robust"},
        "label_smoothing is 0, which makes it sigmoid",
        {"method": "dpo", "label_smoothing": 0.1},
    ),
    ({"method": "kto"}, {"reward_scale": -1.0}, "the method does not read the size of rewards", {"method": "dpo"}),
    (
        {"method": "rto", "dpo_model": ".", "algorithm": "dqo"},
        {"behavior": "reference", "clip_range": 0.5, "whiten": False, "value_clip": None},
        "algorithm is dqo",
        {"method": "rto", "dpo_model": ".", "algorithm": "ppo"},
    ),
]


def said(values):
    options = options_of(values, "DQOConfig")
    return without_effect(options, options.train.use_peft, options.train.eval_dataset_name is not None)


@pytest.mark.parametrize("run, idle, why, cure", CASES)
def test_an_idle_option_is_named_with_the_reason_and_an_effective_one_is_not(run, idle, why, cure):
    assert said(run | idle) == f"these options have no effect: {', '.join(idle)} ({why})"
    assert said(run) == ""
    assert said((cure or {}) | idle) == ""


def test_defaults_are_not_named_although_a_file_gives_them_all():
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)} | {"method": "sft"}
    del defaults["max_steps"]
    assert said(defaults) == ""


def test_all_are_one_line_of_the_log(tmp_path, caplog):
    options = load_options(["--method", "sft", "--critic_learning_rate", "1", "--lora_r", "4", "--project", "mine"])
    load_rows(options, Given(dataset=rollout_rows()))
    (line,) = [message for message in caplog.messages if "no effect" in message]
    assert line == (
        "these options have no effect: critic_learning_rate (the method trains no value model); lora_r (no adapters are "
        "trained); project (report_to is none)"
    )
