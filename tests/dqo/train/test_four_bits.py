"""QLoRA and 8-bit AdamW, where bitsandbytes is installed; without it they are refused in one line."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dqo.config.options import load_options
from dqo.errors import UserError
from dqo.models.critic import load_critic
from dqo.models.lora import adapter_off, in_four_bits
from dqo.models.new import save
from dqo.train.inputs import check_options
from dqo.train.run import begin, train
from tests.dqo.helpers import arguments, policy, rollout_rows, tokenizer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install 'dqo[bitsandbytes]')"
)


@pytest.fixture
def wide(tmp_path):
    """A model whose layers are wide enough for 8-bit states and blocks of 64 weights."""
    save(policy(hidden_size=64), tokenizer(), tmp_path / "model")
    lines = [json.dumps(row) for row in rollout_rows(prompts=12, samples=4)]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--optim", "adamw_8bit"],
            r"^optim adamw_8bit needs the package bitsandbytes: pip install 'dqo\[bitsandbytes\]'$",
        ),
        (["--load_in_4bit", "--use_peft"], r"^load_in_4bit needs the package bitsandbytes: pip install"),
        (["--load_in_4bit"], "^load_in_4bit needs the package bitsandbytes"),
    ],
)
def test_a_missing_package_is_one_line(files, monkeypatch, flags, message):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    monkeypatch.setattr("dqo.train.inputs.check_packages", lambda extras: None)
    with pytest.raises(UserError, match=message):
        check_options(load_options([*arguments(files), *flags]))


def test_four_bits_without_adapters_and_shards_of_8_or_4_bits_are_refused(files, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("dqo.train.inputs.check_packages", lambda extras: None)
    with pytest.raises(UserError, match="^load_in_4bit: weights of 4 bits cannot be trained.*add --use_peft"):
        check_options(load_options([*arguments(files), "--load_in_4bit"]))
    with pytest.raises(UserError, match="^optim must be adamw with fsdp"):
        load_options([*arguments(files), "--fsdp", "--optim", "adamw_8bit"])
    with pytest.raises(UserError, match="^load_in_4bit must be False with fsdp"):
        load_options([*arguments(files), "--fsdp", "--use_peft", "--load_in_4bit"])


@needs_bitsandbytes
def test_averages_of_8_bits_train_as_float32_ones_do_and_go_on_exactly(wide):
    settings = {"max_steps": 8, "save_steps": 4, "save_total_limit": 5, "learning_rate": 3e-4, "optim": "adamw_8bit"}
    whole = train(load_options(arguments(wide, output_dir=wide / "whole", **settings)))
    exact = train(load_options(arguments(wide, output_dir=wide / "exact", **settings | {"optim": "adamw"})))
    assert whole.held_out["eval_loss"] == pytest.approx(exact.held_out["eval_loss"], rel=0.02)
    state = load_file(wide / "whole" / "checkpoint-4" / "optimizer.safetensors")
    assert torch.uint8 in {tensor.dtype for tensor in state.values()}
    shutil.rmtree(wide / "whole" / "checkpoint-8")
    (wide / "whole" / "model.safetensors").rename(wide / "unbroken.safetensors")
    train(load_options(arguments(wide, output_dir=wide / "whole", **settings)))
    one, two = load_file(wide / "unbroken.safetensors"), load_file(wide / "whole" / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


@needs_bitsandbytes
@pytest.mark.parametrize("value_model", ["separate", "head", "implicit"])
def test_adapters_on_weights_of_4_bits_are_trained_beside_their_reference(wide, value_model):
    flags = [
        *arguments(wide, max_steps=6, save_steps=3, lora_r=4, value_model=value_model),
        "--use_peft",
        "--load_in_4bit",
    ]
    trainer = begin(load_options(flags))
    policy_model, critic = trainer.learner.policy, trainer.learner.value_model
    assert any(map(in_four_bits, policy_model.modules()))
    base = {n: p.detach().clone() for n, p in policy_model.named_parameters() if "lora_" not in n}
    ids = torch.tensor([[3, 4, 5, 6]])
    with adapter_off(policy_model), torch.no_grad():
        before = policy_model(ids).logits
    first = trainer.held_out()
    assert first["eval_kl"] == pytest.approx(0.0, abs=1e-6)  # the reference is the quantised model itself
    trainer.run("run")
    trainer.finish()
    assert all(torch.equal(p, base[n]) for n, p in policy_model.named_parameters() if n in base)
    assert any(p.grad is not None or p.abs().sum() > 0 for n, p in policy_model.named_parameters() if "lora_B" in n)
    with adapter_off(policy_model), torch.no_grad():
        assert torch.equal(policy_model(ids).logits, before)
    with torch.no_grad():
        assert not torch.allclose(policy_model(ids).logits, before)
    if value_model == "separate":
        shared = {id(p) for p in policy_model.parameters()} & {id(p) for p in critic.parameters()}
        assert shared
        saved = load_critic(wide / "out" / "critic")
        assert not any(map(in_four_bits, saved.modules()))
    shutil.rmtree(wide / "out" / "checkpoint-6")
    one = load_file(wide / "out" / "adapter_model.safetensors")
    train(load_options(flags))
    two = load_file(wide / "out" / "adapter_model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)
