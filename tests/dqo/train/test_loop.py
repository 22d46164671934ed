"""Training end to end on tiny models: losses fall, and a killed run goes on exactly where it was."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dqo.config.options import load_options
from dqo.errors import UserError
from dqo.models.new import save
from dqo.objectives import OBJECTIVES
from dqo.train import optim
from dqo.train.checkpoint import checkpoints
from dqo.train.engine import Planned
from dqo.train.run import train
from tests.dqo.helpers import arguments, policy, rollout_rows, tokenizer


def run(files, **changes):
    return train(load_options(arguments(files, **changes)))


def logged(directory, key="loss"):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def weights(directory):
    files = ["model.safetensors", *(["critic/model.safetensors"] if (directory / "critic").exists() else [])]
    return {f"{file}/{name}": tensor for file in files for name, tensor in load_file(directory / file).items()}


def test_the_value_model_has_a_schedule_and_a_bound_of_its_own(files, monkeypatch):
    bounds = []
    clip = optim.clip
    monkeypatch.setattr(optim, "clip", lambda model, norm: bounds.append(norm) or clip(model, norm))
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 2, "max_steps": 3, "logging_steps": 1}
    run(files, **options, critic_lr_scheduler_type="linear", critic_max_grad_norm=0.5)
    assert logged(files / "out", "learning_rate") == [1e-3] * 3
    assert logged(files / "out", "critic/learning_rate") == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    assert bounds == [2, 0.5] * 3
    run(files, **options, output_dir=files / "same")  # without them it has those of the policy
    assert logged(files / "same", "critic/learning_rate") == [1e-2] * 3 and bounds[6:] == [2, 2] * 3


READ_MORE = {"ppo", "dapo", "rto", "etpo"}  # than this file has; see test_frozen_models.py
ALIKE = {"curry_dpo": {"stages": 1}, "xpo": {"reference_rows": "all"}}  # one reference from the first step to the last


@pytest.mark.parametrize("method", sorted(OBJECTIVES.keys() - READ_MORE))
def test_the_loss_falls(files, method):
    finished = run(files, method=method, max_steps=40, eval_fraction=0, **ALIKE.get(method, {}))
    losses = logged(files / "out")
    if method == "rank_dpo":  # whose weights follow the policy's ranks: its loss does not compare between steps
        losses = [-margin for margin in logged(files / "out", "rewards/margins")]
    assert sum(losses[-3:]) < sum(losses[:3])  # of several steps, whose responses differ
    assert finished.steps == 40


@pytest.mark.slow
def test_the_value_model_learns_what_the_reward_depends_on(files):
    # the reward is readable in the last state (its digit is above 4) and not at half of the response
    rows = [row | {"reward": float(row["completion"][-1] > "4")} for row in rollout_rows(prompts=300, samples=2)]
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    finished = run(files, per_device_train_batch_size=64, max_steps=100, learning_rate=1e-5)
    assert finished.held_out["eval_value/auc_end"] > 0.95
    assert finished.held_out["eval_value/auc_half"] < 0.75


def test_at_step_0_the_policy_is_its_reference(files):
    run(files, max_steps=1)
    first = json.loads((files / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    assert abs(first["eval_kl"]) < 1e-9
    assert first["eval_sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    # V = 0, delta = 0, lambda = 1: G_t is the outcome, so both losses are 1/2 E[R^2] over tokens
    assert first["eval_loss/policy"] == pytest.approx(0.5 * first["eval_returns/mean"], rel=1e-5)
    assert first["eval_loss/value"] == pytest.approx(first["eval_loss/policy"], rel=1e-5)


def test_accumulation_does_not_change_the_run(files):
    run(files, output_dir=files / "whole", per_device_train_batch_size=8)
    run(files, output_dir=files / "split", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert logged(files / "whole") == pytest.approx(logged(files / "split"), rel=1e-4)


@pytest.mark.parametrize("options", [{"max_batch_tokens": 40}, {"padding_free": True}], ids=lambda o: next(iter(o)))
@pytest.mark.parametrize("method", ["dqo", "dpo"])
def test_neither_the_budget_nor_the_packing_changes_the_run(files, monkeypatch, method, options):
    shapes, planned = [], Planned.__iter__

    def watched(self):
        for batch, *more in planned(self):
            shapes.append(batch.input_ids.shape)
            yield batch, *more

    monkeypatch.setattr(Planned, "__iter__", watched)
    run(files, method=method, output_dir=files / "plain")
    plain = list(shapes)
    shapes.clear()
    run(files, method=method, output_dir=files / "other", **options)
    if "padding_free" in options:
        assert all(rows == 1 for rows, _ in shapes) and not any(rows == 1 for rows, _ in plain)
    else:
        assert all(rows * length <= 40 or rows == (2 if method == "dpo" else 1) for rows, length in shapes)
        assert len(shapes) > len(plain)
    assert logged(files / "plain") == pytest.approx(logged(files / "other"), rel=1e-4)
    assert logged(files / "plain", "eval_loss") == pytest.approx(logged(files / "other", "eval_loss"), rel=1e-4)


@pytest.mark.parametrize("method", ["dqo", "dpo"])
def test_packing_does_not_change_a_run_of_adapters(files, method):
    for name, packed in {"plain": False, "packed": True}.items():
        options = arguments(files, method=method, lora_r=2, padding_free=packed, output_dir=files / name)
        train(load_options([*options, "--use_peft"]))
    for key in ("loss", "eval_loss"):
        assert logged(files / "plain", key) == pytest.approx(logged(files / "packed", key), rel=1e-4)


@pytest.mark.parametrize("padding_free", [None, True])
def test_a_run_stopped_between_checkpoints_goes_on_bit_for_bit(files, monkeypatch, padding_free):
    options = {"save_steps": 5, "padding_free": padding_free, "value_model": "separate"}
    whole = run(files, output_dir=files / "whole", **options)

    from dqo.train.loop import Trainer

    original = Trainer.train_step

    def stop(self, step, groups):
        if step == 8:  # after the checkpoint at 5, in the middle of a logging window
            raise KeyboardInterrupt
        return original(self, step, groups)

    monkeypatch.setattr(Trainer, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(files, **options)
    monkeypatch.undo()
    resumed = run(files, **options)
    before, after = weights(whole.output_dir), weights(resumed.output_dir)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics_without_speed(whole.output_dir) == metrics_without_speed(resumed.output_dir)


def metrics_without_speed(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]


@pytest.mark.parametrize(
    "change, message",
    [({"beta": 0.2}, "option beta: 0.1 then, 0.2 now"), ({"max_steps": 13}, "option max_steps: 12 then, 13 now")],
)
def test_other_options_are_not_continued(files, change, message):
    run(files)
    with pytest.raises(UserError, match=message):
        run(files, **change)


def test_other_data_is_not_continued(files):
    run(files)
    rows = (files / "rollouts.jsonl").read_text().splitlines()
    (files / "rollouts.jsonl").write_text("\n".join(rows[:-4]))
    with pytest.raises(UserError, match="data: .* then, .* now"):
        run(files)


def test_another_model_is_not_continued(files):
    run(files)
    for path in (files / "model").iterdir():
        path.unlink()
    save(policy(seed=1), tokenizer(), files / "model")
    with pytest.raises(UserError, match="model: .* then, .* now"):
        run(files)


def test_a_used_directory_is_refused(files):
    (files / "out").mkdir()
    (files / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        run(files)
    run(files, output_dir=files / "fresh", max_steps=1)
    with pytest.raises(UserError, match="is in use"):
        run(files, output_dir=files / "fresh", max_steps=1, resume_from_checkpoint="never")


def test_step_rewards_need_a_decision(files):
    rows = [row | {"steps": [[0, len(row["completion"])]], "step_rewards": [0.5]} for row in rollout_rows()]
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="has step_rewards; choose .*--process_reward additive"):
        run(files)
    run(files, process_reward="additive", max_steps=1)


def test_potentials_reach_the_tokens_with_their_coefficient_and_the_objectives_discount(files):
    rows = [
        row | {"steps": [[0, 1], [1, len(row["completion"])]], "step_rewards": [0.5, 1.0]} for row in rollout_rows()
    ]
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"process_reward": "potential", "process_coef": 2.0, "gamma": 0.5, "max_steps": 1, "eval_fraction": 0}
    episode = run(files, **options).prepared.episodes()[0]
    # Phi is 2 * 0.5 after the first token and 2 * 1 before EOS: 0.5 * 1 - 0, then 0.5 * 1 - 1 ..., at last R - 2
    assert episode.rewards[:2].tolist() == [0.5, -0.5]
    assert episode.rewards[-1] == episode.reward - 2.0


def test_methods_that_find_nothing_to_train_on_say_so(files):
    rows = [row | {"prompt": f"{i % 10}+{i // 10}="} for i, row in enumerate(rollout_rows(prompts=4, samples=4))]
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        UserError, match="0 pairs. There are 16 responses, .* to 16 prompts, 0 of them with several; `dqo sample"
    ):
        run(files, method="dpo", eval_fraction=0)


def test_the_saved_policy_and_critic_are_plain_transformers_models(files):
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    finished = run(files, value_model="separate")
    plain = AutoModelForCausalLM.from_pretrained(finished.output_dir)
    assert torch.equal(plain.lm_head.weight, finished.prepared.learner.policy.lm_head.weight)
    assert AutoModelForTokenClassification.from_pretrained(finished.output_dir / "critic").config.num_labels == 1


def test_a_loss_that_is_not_finite_is_named_with_its_step_and_rows(files, monkeypatch):
    from dqo.data.episode import paid

    def broken(*arguments):
        e = paid(*arguments)
        e.rewards[:] = float("nan") if e.source.endswith(":3") else e.rewards
        return e

    monkeypatch.setattr("dqo.data.episodes.paid", broken)
    with pytest.raises(UserError, match=r"step (\d+): the loss is nan on a batch with rows rollouts.jsonl:") as caught:
        run(files, eval_fraction=0)
    path = files / "out" / "bad_batch.pt"
    assert str(caught.value).endswith(
        f"Lower the learning rate or raise beta, leave out bf16, and look for rewards or stored "
        f"logprobs that are far too large. The batch is in {path}"
    )
    kept = torch.load(path)
    assert kept["stopped"].startswith("step ") and "rollouts.jsonl:3" in {row["source"] for row in kept["rows"]}
    assert any(row["rewards"].isnan().all() and row["ref_logprobs"].isfinite().all() for row in kept["rows"])


def test_a_gradient_that_is_not_finite_is_named_with_its_parameter_and_kept(files, monkeypatch):
    from dqo.train import loop

    accumulate = loop.accumulate

    def broken(engine, *arguments):
        found = accumulate(engine, *arguments)
        engine.learner.policy.model.norm.weight.grad[0] = float("inf")
        return found

    monkeypatch.setattr(loop, "accumulate", broken)
    with pytest.raises(UserError) as caught:
        run(files, eval_fraction=0)
    said = r"step 1: the gradient norm of the policy is inf \(1 of \d+ parameters: model.norm.weight\), on rows rollouts.jsonl:"
    assert re.match(said, str(caught.value)) and "The batch is in" in str(caught.value), caught.value
    assert len(torch.load(files / "out" / "bad_batch.pt")["rows"]) == 8


def test_a_batch_that_cannot_be_kept_does_not_hide_why_the_run_stopped(files, monkeypatch):
    from dqo.train import loop

    def broken(*arguments):
        raise loop.NotFinite("the loss is nan on a batch with rows a.jsonl:1", [])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loop, "accumulate", broken)
    monkeypatch.setattr("dqo.train.not_finite.torch.save", full)
    with pytest.raises(
        UserError, match="step 1: the loss is nan .*The batch is not kept: .*bad_batch.pt: cannot be written: No"
    ):
        run(files, eval_fraction=0)


def test_an_attention_whose_package_is_missing_is_refused(files):
    with pytest.raises(UserError, match="cannot be loaded .*[Ff]lash"):
        run(files, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("change", [{"attn_implementation": "eager"}, {"gradient_checkpointing": True}], ids=str)
def test_memory_options_change_speed_not_the_run(files, change):
    flag = [f"--{name}" for name, value in change.items() if value is True]
    plain = {name: value for name, value in change.items() if value is not True}
    run(files, output_dir=files / "plain")
    train(load_options([*arguments(files, output_dir=files / "other", **plain), *flag]))
    assert logged(files / "plain") == pytest.approx(logged(files / "other"), rel=1e-4)


def test_a_run_in_bf16_is_near_one_in_float32(files):
    run(files, output_dir=files / "plain", value_model="separate")
    train(load_options([*arguments(files, output_dir=files / "half", value_model="separate"), "--bf16"]))
    assert logged(files / "plain") == pytest.approx(logged(files / "half"), rel=0.1)
    assert logged(files / "plain") != logged(files / "half")
    assert all(tensor.dtype == torch.float32 for tensor in weights(files / "half").values())


def test_the_moving_average_is_saved_and_taken_up_again(files):
    averaged = {"target_ema": 0.9, "lam": 0.5, "save_steps": 5, "value_model": "separate"}
    whole = run(files, output_dir=files / "whole", **averaged)
    shutil.copytree(files / "whole", files / "out")
    for name in ("checkpoint-12", "model.safetensors"):
        path = files / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = run(files, **averaged)
    assert weights(whole.output_dir).keys() == weights(resumed.output_dir).keys()
    assert all(torch.equal(a, weights(resumed.output_dir)[n]) for n, a in weights(whole.output_dir).items())
    one, two = (load_file(d / "checkpoint-12" / "target.safetensors") for d in (files / "whole", files / "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_named_checkpoint_is_gone_on_from_and_anything_else_is_refused(files, capsys):
    run(files, save_steps=5, save_total_limit=5)
    with pytest.raises(UserError, match="model is no checkpoint .*give a checkpoint-N directory"):
        run(files, resume_from_checkpoint=files / "model")
    whole = metrics_without_speed(files / "out")
    resumed = run(files, save_steps=5, save_total_limit=5, resume_from_checkpoint=files / "out" / "checkpoint-5")
    assert "step 5 of 12" in capsys.readouterr().out
    assert metrics_without_speed(resumed.output_dir) == whole


def run_epochs(files, epochs, **changes):
    plain = arguments(files, **changes)
    at = plain.index("--max_steps")
    return train(load_options([*plain[:at], *plain[at + 2 :], "--num_train_epochs", str(epochs)]))


@pytest.mark.parametrize("epochs, steps", [(0.625, 4), (1e-9, 1), (1.5, 9), (0.5, 3)])
def test_epochs_are_whole_steps_rounded_up(files, epochs, steps):
    """Six steps an epoch: 44 responses, 8 a step."""
    finished = run_epochs(files, epochs)
    assert finished.steps == steps
    assert json.loads((files / "out" / f"checkpoint-{steps}" / "dqo_state.json").read_text())["steps"] == steps


def test_a_checkpoint_of_the_former_rounding_goes_on_with_its_steps(files):
    """Checkpoints did not tell the number of steps when 1.2 epochs of 6 steps were 7, and not 8."""
    options = {"save_steps": 4, "save_total_limit": 5}
    assert run_epochs(files, 1.2, **options).steps == 8
    shutil.rmtree(files / "out" / "checkpoint-8")
    state_file = files / "out" / "checkpoint-4" / "dqo_state.json"
    state = json.loads(state_file.read_text())
    for name in ("steps", "callbacks", "files", "crc32"):  # nor checksums
        del state[name]
    del state["counters"]["skipped"]
    state_file.write_text(json.dumps(state))
    assert run_epochs(files, 1.2, **options).steps == 7
    assert [path.name for path in checkpoints(files / "out")] == ["checkpoint-4", "checkpoint-7"]


def test_how_much_is_trained_on_and_held_out_is_printed(files, capsys):
    rows = [json.loads(line) for line in (files / "rollouts.jsonl").read_text().splitlines()]
    finished = run(files, max_steps=1)
    printed = capsys.readouterr().out.splitlines()
    held_out = {e.source for group in finished.prepared.held_out for e in group}
    counts = {"training on": [], "held out": []}
    for i, row in enumerate(rows):
        counts["held out" if f"rollouts.jsonl:{i + 1}" in held_out else "training on"].append(row)
    for name, members in counts.items():
        tokens = sum(len(row["prompt"]) + len(row["completion"]) + 1 for row in members)
        prompts = len({row["prompt"] for row in members})
        (line,) = [line for line in printed if line.startswith(f"{name}: ")]
        assert line.startswith(f"{name}: {len(members)} responses to {prompts} prompts, {tokens:,} tokens")
        assert line.endswith("(eval_fraction 0.2 is a share of the prompts)") == (name == "held out")


def test_what_marks_of_steps_leave_of_the_rows_is_printed(files, capsys):
    rows = [json.loads(line) | {"label": False} for line in (files / "rollouts.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"steps": [[0, 3], [3, len(row["completion"])]], "step_rewards": [-float(i % 4 == 0), -float(i % 4 < 3)]}
    (files / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(files, method="rft", imitate="steps", process_reward="none", max_steps=1, eval_fraction=0.0)
    printed = capsys.readouterr().out
    kept = len({(r["prompt"], r["completion"]) for r in rows if r["step_rewards"] == [0.0, -1.0]})
    assert f"training on: {kept} of {len(rows)} responses" in printed
    assert (
        f"imitate steps: {3 * kept} of their " in printed and f"0 responses whole, {kept} up to their first" in printed
    )


def test_a_long_evaluation_shows_a_bar_and_a_short_one_none(files, capsys, monkeypatch):
    run(files, max_steps=1)
    assert "held-out loss" not in capsys.readouterr().err
    monkeypatch.setattr("dqo.train.held_out.BAR_DELAY", 0.0)
    run(files, max_steps=1, output_dir=files / "slow")
    assert "held-out loss" in capsys.readouterr().err
