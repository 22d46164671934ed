"""Models from Python that cannot be trained are refused before any work, in one line."""

import json

import pytest
import torch

from dqo import DQOConfig, DQOTrainer
from dqo.config.options import load_options
from dqo.errors import UserError
from dqo.models.objects import check_model_object, check_objects
from dqo.train.run import train
from tests.dqo.helpers import arguments, policy, rollout_rows, tokenizer


def quantised_by_flag(model):
    model.is_quantized, model.quantization_method = True, "bitsandbytes"


def quantised_by_config(model):
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def quantised_by_weights(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("argument", ["model", "ref_model"])
@pytest.mark.parametrize("quantise", [quantised_by_flag, quantised_by_config, quantised_by_weights])
def test_a_quantised_model_is_refused(tmp_path, argument, quantise):
    models = {"model": policy(), "ref_model": policy()}
    quantise(models[argument])
    trainer = DQOTrainer(
        args=DQOConfig(output_dir=str(tmp_path / "out")),
        train_dataset=rollout_rows(),
        processing_class=tokenizer(),
        **models,
    )
    with pytest.raises(UserError, match=f"^{argument} is quantised.*load it without quantization_config") as error:
        trainer.train()
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_model_of_any_floating_dtype_passes():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_model_object("model", policy().to(dtype))


def frozen():
    model = policy().requires_grad_(False)
    return {"model": model}


def shared():
    model = policy()
    return {"model": model, "ref_model": model}


class Processor:
    tokenizer = tokenizer()


@pytest.mark.parametrize(
    "make, message",
    [
        (frozen, "no parameter of model requires a gradient"),
        (shared, "ref_model has parameters of model"),
        (lambda: {"processing_class": "gpt2"}, r"processing_class is a str; give a tokenizer: AutoTokenizer"),
        (lambda: {"processing_class": Processor()}, r"is a Processor; give a tokenizer: processing_class\.tokenizer"),
    ],
)
def test_objects_that_cannot_be_trained_together_are_refused_with_the_cure(tmp_path, make, message):
    given = {"model": policy(), "processing_class": tokenizer()} | make()
    args = DQOConfig(output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=message):
        DQOTrainer(args=args, train_dataset=rollout_rows(), **given).train()
    assert not (tmp_path / "out").exists()


def test_a_frozen_model_takes_adapters():
    pytest.importorskip("peft")
    check_objects(policy().requires_grad_(False), None, tokenizer(), adapters=True)


def test_a_given_tokenizer_without_a_pad_token_pads_by_its_end(tmp_path):
    bare = tokenizer()
    bare.pad_token = None
    args = DQOConfig(output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, use_cpu=True)
    trainer = DQOTrainer(policy(), args, rollout_rows(), processing_class=bare)
    assert trainer.train().global_step == 1
    assert trainer.processing_class.pad_token_id == trainer.processing_class.eos_token_id


@pytest.mark.parametrize("role", ["model_name_or_path", "ref_model_name_or_path"])
def test_a_path_whose_config_is_quantised_is_refused(files, role):
    import shutil

    shutil.copytree(files / "model", files / "quantised")
    path = files / "quantised" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantised' is quantised \(gptq\)"):
        train(load_options(arguments(files, **{role: files / "quantised"})))
    assert not (files / "out").exists()


def test_a_model_in_pefts_wrapper_or_with_adapters_is_refused():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(policy(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"model is a PeftModel.*model.merge_and_unload\(\)"):
        check_model_object("model", wrapped)
    with pytest.raises(UserError, match="ref_model has adapters already"):
        check_model_object("ref_model", wrapped.get_base_model())
    check_model_object("model", wrapped.merge_and_unload())
