"""DQOTrainer: TRL's argument names around the same loop as the command line's."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from dqo import DQOConfig, DQOTrainer
from dqo.api import ABSENT
from dqo.config.options import load_options
from dqo.data.rows import read_rows
from dqo.errors import UserError
from dqo.train.run import train
from tests.dqo.helpers import arguments, policy, rollout_rows, tokenizer

SHORT = {"max_steps": 4, "logging_steps": 2, "learning_rate": 1e-3, "critic_learning_rate": 1e-2, "eval_fraction": 0.2}


def config(files, name="out", **changes):
    return DQOConfig(output_dir=str(files / name), per_device_train_batch_size=8, **(SHORT | changes))


@pytest.mark.slow
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


@pytest.mark.slow
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


def unseen(files, prompts=5, seed=1):
    seen = {json.loads(line)["prompt"] for line in (files / "rollouts.jsonl").read_text().splitlines()}
    return [row for row in rollout_rows(prompts=prompts, seed=seed) if row["prompt"] not in seen]


@pytest.mark.slow
def test_other_rows_are_evaluated_as_if_they_had_been_held_out(files):
    other = unseen(files)
    given = DQOTrainer(str(files / "model"), config(files, "given"), str(files / "rollouts.jsonl"), other)
    expected = given.train().metrics
    later = DQOTrainer(str(files / "model"), config(files, "later", eval_fraction=0.0), str(files / "rollouts.jsonl"))
    assert later.train().metrics == {}
    assert later.evaluate(other) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["dqo", "dpo", "sft"])
def test_predict_gives_what_the_models_say_of_each_row(files, method):
    from dqo.data.batches import collate
    from dqo.models.policy import policy_stats

    other = unseen(files)
    trainer = DQOTrainer(
        str(files / "model"),
        config(files, method=method, max_steps=2)
        if method != "sft"
        else DQOConfig(method="sft", output_dir=str(files / "out"), max_steps=2, eval_fraction=0.2),
        str(files / "rollouts.jsonl"),
    )
    trainer.train()
    found, rewards, metrics = trainer.predict(other)
    assert rewards.tolist() == [row["reward"] for row in other]
    assert found["length"].tolist() == [len(row["completion"]) + 1 for row in other]
    assert metrics["test_loss"] == trainer.evaluate(other)["eval_loss"]
    episodes = trainer._begin().prepared.tokenized(read_rows(other))
    for i, episode in enumerate(episodes):
        batch = collate([episode], trainer.processing_class.pad_token_id)
        stats = policy_stats(trainer.model, batch)
        assert found["logps"][i] == pytest.approx(stats.logprobs.sum().item(), rel=1e-4)
    assert ("ref_logps" in found) == (method != "sft")
    assert ("value_end" in found) == (method == "dqo")
    if method == "dqo":
        base = AutoModelForCausalLM.from_pretrained(files / "model")
        stats = policy_stats(base, collate([episodes[0]], trainer.processing_class.pad_token_id))
        assert found["ref_logps"][0] == pytest.approx(stats.logprobs.sum().item(), rel=1e-4)


def test_rows_whose_prompts_are_trained_on_are_refused_with_the_cure(files):
    rows = [json.loads(line) for line in (files / "rollouts.jsonl").read_text().splitlines()]
    cure = "take their rows out of one of the two, or give no evaluation rows: eval_fraction holds prompts out"
    with pytest.raises(UserError, match=f"12 prompts of eval_dataset are in .*rollouts.jsonl too .*{cure}"):
        DQOTrainer(str(files / "model"), config(files), str(files / "rollouts.jsonl"), rows).evaluate()
    trainer = DQOTrainer(str(files / "model"), config(files, "other"), str(files / "rollouts.jsonl"))
    with pytest.raises(UserError, match=f"1 prompts of eval_dataset are in the rows that are trained on .*{cure}"):
        trained = {row.prompt for row in trainer._begin().train_rows}
        shared = next(row for row in rows if row["prompt"] in trained)
        trainer.evaluate([shared, *unseen(files)])
    trainer.predict(rows)  # what the models say of rows that are trained on may be asked


def test_the_reference_of_a_model_object_is_gone_and_said_to_be(files):
    trainer = DQOTrainer(policy(), config(files), str(files / "rollouts.jsonl"), processing_class=tokenizer())
    with pytest.raises(UserError, match="trained in place: give ref_model, or give the rows to the constructor"):
        trainer.evaluate(unseen(files))
    again = DQOTrainer(
        policy(), config(files, "r"), str(files / "rollouts.jsonl"), processing_class=tokenizer(), ref_model=policy()
    )
    assert again.evaluate(unseen(files))["eval_loss"] > 0


@pytest.mark.slow
def test_compute_metrics_gets_predictions_and_its_numbers_are_logged(files):
    def accuracy(given):
        assert given.predictions["logps"].shape == given.label_ids.shape
        return {"mean_logp": given.predictions["logps"].mean(), "eval_paid": float(given.label_ids.mean())}

    trainer = DQOTrainer(
        str(files / "model"),
        config(files, eval_steps=2, metric_for_best_model="mean_logp"),
        str(files / "rollouts.jsonl"),
        compute_metrics=accuracy,
    )
    output = trainer.train()
    rows = [row for row in trainer.log_history if "eval_loss" in row]
    assert len({row["eval_mean_logp"] for row in rows}) == 3 and rows[-1]["eval_paid"] == output.metrics["eval_paid"]
    assert trainer.state.best_metric == max(row["eval_mean_logp"] for row in rows[1:])


@pytest.mark.slow
@pytest.mark.parametrize("as_object", [False, True])
def test_tasks_are_answered_and_reported_as_by_the_command(files, as_object, capsys):
    import sys

    from dqo.commands.train import train_command

    tasks = [{"prompt": row["prompt"], "answer": row["completion"][-1]} for row in unseen(files)[:3]]
    (files / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    options = {"eval_tasks": str(files / "tasks.jsonl"), "verifier": "gsm8k", "max_completion_length": 4}
    options |= {"num_generations": 2, "max_steps": 4}
    model = policy() if as_object else str(files / "model")
    given = {"processing_class": tokenizer()} if as_object else {}
    DQOTrainer(model, config(files, "python", **options), str(files / "rollouts.jsonl"), **given).train()
    printed = capsys.readouterr().out
    train_command(arguments(files, logging_steps=2, **options))
    expected = capsys.readouterr().out
    ours, theirs = ((files / name / "report.html").read_text() for name in ("python", "out"))
    for text in ("base", "greedy", "sampling"):
        assert text in ours and text in theirs and text in printed
    table = [line for line in expected.splitlines() if line.lstrip().startswith(("base", "dqo "))]
    assert table and all(line in printed for line in table)
    assert sys.argv


def test_the_last_log_history_rows_are_the_files(files):
    trainer = DQOTrainer(str(files / "model"), config(files), str(files / "rollouts.jsonl"))
    trainer._begin()
    trainer.log({"mine": 1.5})
    assert trainer.log_history == [{"step": 0, "mine": 1.5}] == trainer.state.log_history
    trainer.train()
    with pytest.raises(UserError, match="the run is finished"):
        trainer.log({"mine": 2.0})
    trainer.save_state()
    saved = json.loads((files / "out" / "trainer_state.json").read_text())
    assert saved["log_history"] == trainer.log_history and saved["global_step"] == 4


@pytest.mark.parametrize("begun", [False, True])
def test_callbacks_are_added_and_taken_out(files, begun):
    trainer = DQOTrainer(str(files / "model"), config(files), str(files / "rollouts.jsonl"))
    if begun:
        trainer._begin()
    stop, other = Stop(), Stop()
    trainer.add_callback(stop)
    trainer.add_callback(other)
    assert trainer.pop_callback(other) is other
    trainer.add_callback(Stop)
    added = trainer.pop_callback(Stop)
    assert added is stop and trainer.pop_callback(TrainerCallback) is not None and trainer.pop_callback(Stop) is None
    trainer.add_callback(stop)
    assert trainer.train().global_step == 3
    trainer.remove_callback(stop)
    with pytest.raises(UserError, match="EarlyStoppingCallback needs eval_steps"):
        trainer.add_callback(EarlyStoppingCallback)


def test_the_model_card_and_the_upload(files, monkeypatch):
    sent = {}

    class Hub:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            sent.update(repo_id=repo_id, private=private)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, allow_patterns, ignore_patterns, **others):
            files_there = [str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()]
            wanted = huggingface_hub.utils.filter_repo_objects
            sent["files"] = set(wanted(files_there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    trainer = DQOTrainer(str(files / "model"), config(files, value_model="separate"), str(files / "rollouts.jsonl"))
    trainer.train()
    assert trainer.push_to_hub(private=True, token="t") == "https://hub/me/out"
    assert (sent["repo_id"], sent["private"], sent["token"]) == ("out", True, "t")
    assert sent["files"] >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "critic/model.safetensors",
        "tokenizer.json",
    }
    assert not any(name.startswith(("checkpoint-", "ref_cache", "metrics", "config.yaml")) for name in sent["files"])
    card = huggingface_hub.ModelCard.load(files / "out" / "README.md")
    assert card.data.tags == ["dqo", "dqo"] or card.data.tags == ["dqo"]
    assert "eval_loss" in card.text and "beta: 0.1" in card.text


def test_what_other_trainers_have_and_this_one_has_not_is_said(files):
    trainer = DQOTrainer(str(files / "model"), config(files), str(files / "rollouts.jsonl"))
    for name in ABSENT:
        with pytest.raises(AttributeError, match=f"DQOTrainer has no {name}: "):
            getattr(trainer, name)
    public = {name for name in dir(transformers.Trainer) if not name.startswith("_")}
    for name in public:
        try:
            getattr(type(trainer), name)
        except AttributeError:
            with pytest.raises(AttributeError, match=f"DQOTrainer has no {name}[:,] "):
                getattr(trainer, name)
    with pytest.raises(AttributeError, match="DQOTrainer has no 'evaluat'. Did you mean 'evaluate'"):
        _ = trainer.evaluat
    assert not hasattr(trainer, "nothing")


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
        (lambda: DQOTrainer("model", DQOConfig(dry_run=True)), "dry_run is an option of the command line"),
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
    with pytest.raises(AttributeError, match="DQOConfig with method dpo has no option 'lam'"):
        _ = made.lam


@pytest.mark.slow
def test_the_package_names_the_trainer_and_nothing_else_is_imported_for_it():
    import subprocess
    import sys

    code = (
        "import sys, dqo; assert 'torch' not in sys.modules; dqo.DQOTrainer; assert 'torch' in sys.modules; dqo.nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'dqo' has no attribute 'nothing'" in done.stderr
