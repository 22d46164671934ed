"""LoRA: adapters are all that is trained, and the policy without its adapter is the reference."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dqo.config.options import load_options
from dqo.data.batches import collate
from dqo.errors import UserError
from dqo.models.critic import make_value_model
from dqo.models.identity import model_identity
from dqo.models.named import load_config
from dqo.models.policy import disable_dropout, policy_stats
from dqo.objectives import DQO
from dqo.train.learner import Learner, objective_sums
from dqo.train.loop import Trainer
from dqo.train.run import train
from tests.dqo.helpers import arguments, episodes, policy
from tests.dqo.helpers import gpt2 as gpt2_with_dropout

peft = pytest.importorskip("peft")
from dqo.models.lora import adapter_off, add_adapter, has_adapter, lora_config, merged_state, save_adapter  # noqa: E402


def gpt2():
    return disable_dropout(gpt2_with_dropout())


def adapted(make=policy, config=None, seed=3):
    """A model whose adapter does something."""
    model = make()
    add_adapter(model, config or lora_config(4, 8.0, None))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("make", [policy, gpt2])
def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(make):
    model, batch = make(), collate(episodes(4), 0)
    before = policy_stats(model, batch).logprobs
    add_adapter(model, lora_config(4, 8.0, None))
    assert has_adapter(model)
    assert torch.equal(policy_stats(model, batch).logprobs, before)
    assert {name.rpartition("lora_")[1] for name, p in model.named_parameters() if p.requires_grad} == {"lora_"}


@pytest.mark.parametrize("make", [policy, gpt2])
def test_with_the_adapter_off_the_policy_is_the_model_it_was(make):
    model, batch = adapted(make), collate(episodes(4), 0)
    with adapter_off(model):
        without = policy_stats(model, batch).logprobs
    assert torch.equal(without, policy_stats(make(), batch).logprobs)
    assert not torch.allclose(policy_stats(model, batch).logprobs, without)


@pytest.mark.parametrize("make", [policy, gpt2])
def test_merged_weights_are_the_same_model_without_an_adapter(make):
    model, batch = adapted(make), collate(episodes(4), 0)
    plain = make()
    plain.load_state_dict(merged_state(model))
    assert torch.allclose(policy_stats(plain, batch).logprobs, policy_stats(model, batch).logprobs, atol=1e-5)


def test_named_layers_get_an_adapter_and_no_others():
    model = policy()
    add_adapter(model, lora_config(4, 8.0, ("q_proj", "v_proj")))
    assert {name.split(".")[4] for name, _ in model.named_parameters() if "lora_" in name} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    "names, message", [(("q_prj",), "no linear layer q_prj; there are .*q_proj"), (("lm_head",), "lm_head")]
)
def test_unknown_layers_and_the_head_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        add_adapter(policy(), lora_config(4, 8.0, names))


def test_dropout_is_refused():
    with pytest.raises(UserError, match="lora_dropout is 0.1"):
        add_adapter(policy(), peft.LoraConfig(r=2, lora_dropout=0.1))


def test_a_value_model_trains_its_adapter_and_its_score():
    value_model = make_value_model("separate", policy(), lora_config(2, 4.0, None))
    trained = {name for name, p in value_model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained and all("lora_" in name or name.startswith("score") for name in trained)


def test_the_reference_of_an_exact_kl_is_the_policy_with_its_adapter_off():
    batch = collate(episodes(6), 0)

    class WithKL(DQO):
        needs_kl = True

        def __call__(self, stats, rows, cu_seqlens):
            return stats.kl.sum(), {}

    objective = WithKL(value_model="none")
    toggled, _ = objective_sums(Learner(adapted()), objective, batch)
    beside, _ = objective_sums(Learner(adapted(), reference=policy()), objective, batch)
    nothing, _ = objective_sums(Learner(policy(), reference=policy()), objective, batch)
    assert toggled > 0.1
    assert torch.equal(toggled, beside)
    assert nothing == 0


@pytest.mark.parametrize("function", ["inject_adapter_in_model", "get_peft_model_state_dict"])
def test_versions_that_cannot_work_together_are_one_line_before_any_work(files, monkeypatch, function):
    def broken(*_, **__):
        raise ImportError("peft>=0.22.0 is required")

    monkeypatch.setattr(peft, function, broken)
    with pytest.raises(UserError) as error:
        train(load_options(flags(files)))
    assert str(error.value).startswith(f"peft {peft.__version__} beside transformers ")
    assert "cannot add adapters to Llama" in str(error.value) and "peft>=0.22.0 is required" in str(error.value)
    assert not (files / "out").exists()


def test_a_peft_that_cannot_be_imported_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # import raises
    with pytest.raises(UserError, match="peft .* beside transformers .* cannot be imported: .*constraints.txt"):
        lora_config(2, 4.0, None)


SETTINGS = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2, "value_model": "separate"}


def flags(files, **changes):
    found = arguments(files, **{k: v for k, v in (SETTINGS | changes).items() if v is not True})
    return [*found, *(f"--{k}" for k, v in (SETTINGS | changes).items() if v is True)]


def test_a_run_trains_the_adapter_and_peft_and_transformers_load_policy_and_critic(files, monkeypatch):
    from transformers import AutoModelForTokenClassification

    monkeypatch.chdir(files)  # what is saved holds elsewhere

    run = train(load_options(flags(files, model_name_or_path="model")))
    monkeypatch.chdir(files.parent)
    rows = [json.loads(line) for line in (files / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval_kl"] == pytest.approx(0.0, abs=1e-9)
    assert rows[-1]["eval_kl"] > 1e-5
    assert (files / "out" / "adapter_model.safetensors").exists() and not (files / "out" / "model.safetensors").exists()
    learner, batch = run.prepared.learner, collate(episodes(5), 0)
    plain = peft.AutoPeftModelForCausalLM.from_pretrained(files / "out").merge_and_unload()
    assert torch.allclose(policy_stats(plain, batch).logprobs, policy_stats(learner.policy, batch).logprobs, atol=1e-5)
    critic = AutoModelForTokenClassification.from_pretrained(files / "out" / "critic")
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.allclose(critic(ids).logits, learner.value_model(ids).logits, atol=1e-5)
    assert critic(ids).logits.abs().max() > 0


def test_names_of_layers_are_written_in_one_order(tmp_path):
    model = policy()
    add_adapter(model, lora_config(4, 8.0, None))
    save_adapter(model, model.state_dict(), tmp_path)
    named = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert named == sorted(named) and len(named) == 7


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "all weights"])
def test_a_finished_run_that_is_asked_for_again_is_the_same_model(files, adapters):
    def identity(hash_seed):
        given = [str(x) for x in flags(files)] if adapters else [str(x) for x in arguments(files)]
        code = "from dqo.commands.train import main; main()"
        environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
        subprocess.run([sys.executable, "-c", code, *given], check=True, env=environment)
        out = str(files / "out")
        return model_identity(out, load_config(out))

    assert identity(1) == identity(2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stopped_run_goes_on_bit_for_bit(files, monkeypatch, dtype):
    whole = train(load_options(flags(files, output_dir=files / "whole", save_steps=5, dtype=dtype)))
    original = Trainer.train_step

    def stop(self, step, groups):
        if step == 8:
            raise KeyboardInterrupt
        return original(self, step, groups)

    monkeypatch.setattr(Trainer, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(load_options(flags(files, save_steps=5, dtype=dtype)))
    monkeypatch.undo()
    train(load_options(flags(files, save_steps=5, dtype=dtype)))
    for name in ("adapter_model.safetensors", "critic/model.safetensors"):
        before, after = load_file(whole.output_dir / name), load_file(files / "out" / name)
        assert before.keys() == after.keys() and before
        assert all(torch.equal(before[key], after[key]) for key in before)
