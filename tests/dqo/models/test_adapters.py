"""An adapter's directory stands for its base with the adapter merged."""

import json
import shutil

import pytest
import torch

from dqo import DQOConfig, DQOTrainer
from dqo.config.options import load_options
from dqo.errors import UserError
from dqo.models.adapters import adapter_base
from dqo.models.named import load_config, load_tokenizer
from dqo.models.policy import load_policy
from dqo.train.run import train
from tests.dqo.helpers import arguments, policy, rollout_rows, tokenizer

peft = pytest.importorskip("peft")
IDS = torch.tensor([[3, 4, 5, 6, 7]])


def run(files, output_dir, **changes):
    settings = {"lora_r": 2, "learning_rate": 1e-2, "max_steps": 4, "method": "sft", "output_dir": files / output_dir}
    return train(load_options([*arguments(files, **(settings | changes)), "--use_peft"]))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_a_model_is_no_adapter(files):
    assert adapter_base(str(files / "model")) is None
    assert adapter_base(str(files / "nowhere")) is None


def test_our_adapter_is_the_next_runs_model_and_reference(files, caplog):
    first = run(files, "first")
    policy_1 = first.prepared.learner.policy
    assert torch.allclose(logits(load_policy(str(files / "first"))), logits(policy_1), atol=1e-5)
    assert f"{files / 'first'} is an adapter of {files / 'model'}: it is merged into it" in caplog.text
    assert load_config(str(files / "first")).vocab_size == load_config(str(files / "model")).vocab_size

    names = {"model_name_or_path": files / "first", "ref_model_name_or_path": files / "first"}
    second = run(files, "second", method="dqo", value_model="none", **names)
    rows = [json.loads(line) for line in (files / "second" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval_kl"] == pytest.approx(0.0, abs=1e-9)  # policy and reference are the merged model
    trained = logits(second.prepared.learner.policy)
    assert (trained - logits(policy_1)).abs().max() > 1e-3
    # both adapters are in what a reader gets: by peft alone, and by the trainer
    assert torch.allclose(logits(peft.AutoPeftModelForCausalLM.from_pretrained(files / "second")), trained, atol=1e-5)
    assert torch.allclose(logits(load_policy(str(files / "second"))), trained, atol=1e-5)
    whole = train(load_options(arguments(files, model_name_or_path=files / "second", output_dir=files / "third")))
    assert (files / "third" / "model.safetensors").exists() and whole.steps == 12


def test_the_adapter_of_a_model_made_in_python_has_its_base_beside_it(files):
    given = policy(seed=5)
    args = DQOConfig(output_dir=str(files / "out"), method="sft", max_steps=2, learning_rate=1e-2)
    trainer = DQOTrainer(
        given,
        args,
        rollout_rows(),
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(r=2, init_lora_weights=True),
    )
    trainer.train()
    assert torch.equal(logits(load_policy(str(files / "out" / "base_model"))), logits(policy(seed=5)))
    reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(files / "out")
    assert torch.allclose(logits(reloaded), logits(trainer.model), atol=1e-6)


@pytest.fixture
def adapter(files):
    run(files, "out", max_steps=1)
    return files / "out"


def test_an_adapter_without_tokenizer_has_its_bases(adapter):
    for path in adapter.glob("token*"):
        path.unlink()
    assert load_tokenizer(str(adapter)).get_vocab() == tokenizer().get_vocab()


def test_a_missing_base_is_one_line_that_names_both(files, adapter):
    shutil.rmtree(files / "model")
    with pytest.raises(UserError) as error:
        load_config(str(adapter))
    assert f"'{adapter}' is an adapter of '{files / 'model'}', which cannot be loaded" in str(error.value)


@pytest.mark.parametrize(
    "content", ["{}", '{"base_model_name_or_path": null}', "[]", "{", '{"base_model_name_or_path": 3}']
)
def test_an_adapter_without_a_base_is_refused(adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match="an adapter whose base is unknown"):
        load_policy(str(adapter))


def test_a_directory_with_both_is_refused(files, adapter):
    shutil.copy(files / "model" / "config.json", adapter)
    with pytest.raises(UserError, match="holds both a model .* and an adapter"):
        load_policy(str(adapter))


def test_an_adapter_that_lacks_tensors_or_fits_another_model_is_refused(files, adapter):
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"the adapter {adapter} cannot be merged into its base .*missing"):
        load_policy(str(adapter))
    save_file({name: tensor.repeat(2, 2) for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="cannot be merged into its base"):
        load_policy(str(adapter))
