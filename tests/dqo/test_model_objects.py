"""Models from Python that cannot be trained are refused before any work, in one line."""

import json

import pytest
import torch

from dqo import DQOConfig, DQOTrainer
from dqo.config import load_options
from dqo.errors import UserError
from dqo.model_objects import check_model_object
from dqo.train import train
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
