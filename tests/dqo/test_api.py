"""DQOTrainer: TRL's argument names around the same loop as the command line's."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from dqo import DQOConfig, DQOTrainer
from dqo.config import load_options
from dqo.errors import UserError
from dqo.rows import read_rows
from dqo.train import train
from tests.dqo.helpers import arguments, policy, rollout_rows, tokenizer

SHORT = {"max_steps": 4, "logging_steps": 2, "learning_rate": 1e-3, "critic_learning_rate": 1e-2, "eval_fraction": 0.2}


def config(files, name="out", **changes):
    return DQOConfig(output_dir=str(files / name), per_device_train_batch_size=8, **(SHORT | changes))


def test_it_trains_as_the_command_line_does_bit_for_bit(files):
    trainer = DQOTrainer(
        model=str(files / "model"), args=config(files, "python"), train_dataset=str(files / "rollouts.jsonl")
    )
    output = trainer.train()
    expected = train(load_options(arguments(files, max_steps=4, logging_steps=2)))
    assert output.global_step == 4
    assert output.metrics == expected.held_out == trainer.evaluate()
    one, two = (load_file(directory / "model.safetensors") for directory in (files / "python", files / "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def sources(files):
    rows = [json.loads(line) for line in (files / "rollouts.jsonl").read_text().splitlines()]
    yield rows
    yield read_rows(files / "rollouts.jsonl")
    datasets = pytest.importorskip("datasets")
    yield datasets.Dataset.from_list(rows)


def test_models_and_data_may_be_objects(files):
    paths = DQOTrainer(str(files / "model"), config(files, "paths"), str(files / "rollouts.jsonl"))
    expected = paths.train().metrics
    for i, rows in enumerate(sources(files)):
        model = policy()
        before = model.lm_head.weight.clone()
        trainer = DQOTrainer(model, config(files, f"objects{i}"), rows, processing_class=tokenizer())
        assert trainer.train().metrics == expected
        assert trainer.model is model and not torch.equal(model.lm_head.weight, before)
    trainer.save_model(files / "saved")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(files / "saved").lm_head.weight, model.lm_head.weight)


def test_an_evaluation_set_may_be_given(files):
    seen = {json.loads(line)["prompt"] for line in (files / "rollouts.jsonl").read_text().splitlines()}
    other = [row for row in rollout_rows(prompts=5, seed=1) if row["prompt"] not in seen]
    trainer = DQOTrainer(policy(), config(files), str(files / "rollouts.jsonl"), other, tokenizer())
    assert trainer.evaluate()["eval_completions/mean_length"] > 1
    assert len(trainer._begin().prepared.held_out) == len(other)


class Stop(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **others):
        self.seen.append(("begin", state.max_steps, args.beta, type(model).__name__))

    def on_log(self, args, state, control, logs=None, **others):
        self.seen.append(("log", state.global_step, sorted(logs)[0]))

    def on_save(self, args, state, control, **others):
        self.seen.append(("save", state.global_step))

    def on_step_end(self, args, state, control, **others):
        control.should_training_stop = state.global_step == 3

    def on_train_end(self, args, state, control, **others):
        self.seen.append(("end", state.global_step))


def test_callbacks_of_transformers_are_called_and_may_stop(files):
    stop = Stop()
    trainer = DQOTrainer(str(files / "model"), config(files), str(files / "rollouts.jsonl"), callbacks=[stop])
    assert trainer.train().global_step == 3
    assert stop.seen[0] == ("begin", 4, 0.1, "LlamaForCausalLM")
    assert [event for event in stop.seen if event[0] == "save"] == [("save", 3)]
    assert [event[1] for event in stop.seen if event[0] == "log"] == [0, 2, 3]
    assert stop.seen[-1] == ("end", 3)
    assert [row["step"] for row in trainer.log_history] == [0, 2, 3]


def test_a_stopped_run_goes_on_or_is_refused(files):
    def trainer():
        return DQOTrainer(str(files / "model"), config(files), str(files / "rollouts.jsonl"))

    DQOTrainer(str(files / "model"), config(files), str(files / "rollouts.jsonl"), callbacks=[Stop()]).train()
    with pytest.raises(UserError, match="is in use"):
        trainer().train(resume_from_checkpoint=False)
    assert trainer().train(resume_from_checkpoint=str(files / "out" / "checkpoint-3")).global_step == 4


def test_a_peft_config_trains_an_adapter(files):
    peft = pytest.importorskip("peft")
    trainer = DQOTrainer(
        str(files / "model"),
        config(files),
        str(files / "rollouts.jsonl"),
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer.train()
    assert (files / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DQOConfig(lerning_rate=1.0), "DQOConfig: unknown option 'lerning_rate'. Did you mean 'learning_rate'"),
        (lambda: DQOConfig(beta="high"), "DQOConfig: beta must be float, got 'high'"),
        (lambda: DQOConfig(lam=1.5), r"lam must be in \[0, 1\], got 1.5 \(from DQOConfig\)"),
        (lambda: DQOConfig(method="dpo", lam=0.5), "unknown option 'lam'"),
        (lambda: DQOConfig(method="dpoo"), "Did you mean 'dpo'"),
        (lambda: DQOTrainer(args={"beta": 0.1}), "args is a dict; expected a DQOConfig"),
        (lambda: DQOTrainer("model", DQOConfig()).train(), "--dataset_name is missing"),
        (lambda: DQOTrainer(None, DQOConfig(), []).train(), "--model_name_or_path is missing"),
        (lambda: DQOTrainer(policy(), DQOConfig(), [{}]).train(), "needs its tokenizer: processing_class"),
    ],
)
def test_mistakes_are_named(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        call()


def test_options_can_be_read_by_name():
    made = DQOConfig(method="dpo", beta=0.3, seed=7)
    assert (made.method, made.beta, made.seed, made.max_pairs_per_prompt) == ("dpo", 0.3, 7, 4)
    assert "beta=0.3" in repr(made)
    with pytest.raises(AttributeError):
        _ = made.lam


def test_the_package_names_the_trainer_and_nothing_else_is_imported_for_it():
    import subprocess
    import sys

    code = (
        "import sys, dqo; assert 'torch' not in sys.modules; dqo.DQOTrainer; assert 'torch' in sys.modules; dqo.nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'dqo' has no attribute 'nothing'" in done.stderr
