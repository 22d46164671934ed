"""The final models have the dtype of the model's files, or that of save_dtype; checkpoints stay exact."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dqo import DQOConfig, DQOTrainer
from dqo.config.options import load_options
from dqo.train.run import train
from tests.dqo.helpers import arguments, policy, rollout_rows, tokenizer


@pytest.fixture
def in_bfloat16(files):
    policy().to(torch.bfloat16).save_pretrained(files / "model")
    return files


def dtypes(path):
    return {tensor.dtype for tensor in load_file(path / "model.safetensors").values()}


def told(path):
    return json.loads((path / "config.json").read_text())["dtype"]


@pytest.mark.parametrize("option, expected", [(None, "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_final_models_have_it_and_checkpoints_are_exact(in_bfloat16, option, expected):
    out = in_bfloat16 / "out"
    named = {"value_model": "separate"} | ({} if option is None else {"save_dtype": option})
    run = train(load_options(arguments(in_bfloat16, max_steps=3, **named)))
    dtype = getattr(torch, expected)
    for part in (out, out / "critic"):
        assert dtypes(part) == {dtype} and told(part) == expected
    assert dtypes(out / "checkpoint-3") == {torch.float32} and told(out / "checkpoint-3") == "float32"
    exact, final = load_file(out / "checkpoint-3" / "model.safetensors"), load_file(out / "model.safetensors")
    assert exact.keys() == final.keys()
    assert all(torch.equal(exact[name].to(dtype), final[name]) for name in exact)
    assert any(not torch.equal(exact[name].bfloat16().float(), exact[name]) for name in exact)
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert reloaded.dtype == dtype and reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert run.prepared.learner.policy.dtype == torch.float32


def test_a_model_of_float32_stays_so(files):
    train(load_options(arguments(files, max_steps=1, value_model="separate")))
    assert dtypes(files / "out") == dtypes(files / "out" / "critic") == {torch.float32}


def test_the_dtype_may_change_when_a_run_goes_on(in_bfloat16):
    train(load_options(arguments(in_bfloat16, max_steps=2)))
    train(load_options(arguments(in_bfloat16, max_steps=2, save_dtype="float32")))
    final, exact = (load_file(in_bfloat16 / "out" / name / "model.safetensors") for name in (".", "checkpoint-2"))
    assert all(torch.equal(final[name], exact[name]) for name in exact)


def test_a_model_object_in_bfloat16_is_trained_in_float32_and_saved_in_bfloat16(tmp_path):
    args = DQOConfig(output_dir=str(tmp_path / "out"), max_steps=2, learning_rate=1e-5)
    given = policy().to(torch.bfloat16)
    trainer = DQOTrainer(given, args, rollout_rows(), processing_class=tokenizer())
    trainer.train()
    assert given.dtype == torch.float32 and trainer.model is given
    before = policy().to(torch.bfloat16).float().state_dict()
    moved = [(given.state_dict()[name] - tensor).abs().max().item() for name, tensor in before.items()]
    assert 0 < max(moved) < 1e-3
    trainer.save_model(tmp_path / "saved")
    assert dtypes(tmp_path / "out") == dtypes(tmp_path / "saved") == {torch.bfloat16}


@pytest.mark.parametrize("option, expected", [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_an_adapter_is_saved_as_it_was_trained_unless_told(in_bfloat16, option, expected):
    pytest.importorskip("peft")
    named = {} if option is None else {"save_dtype": option}
    settings = arguments(in_bfloat16, max_steps=1, dtype="bfloat16", lora_r=2, **named)
    train(load_options([*settings, "--use_peft"]))
    tensors = load_file(in_bfloat16 / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
