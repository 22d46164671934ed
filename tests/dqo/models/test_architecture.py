"""Models of every class of transformers: nothing random in them, their trunk, their layers recomputed."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.trainer.small_models import config_classes, small_model
from dqo.errors import UserError
from dqo.models.architecture import disable_dropout, layers_of, name_trunk, recompute_activations
from tests.dqo.helpers import gradients

ROW = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11]])
# Classes that differ from themselves in training mode as transformers makes them, each by other means.
RANDOM = [
    "opt",
    "gpt2",
    "gpt_bigcode",
    "biogpt",
    "xglm",
    "ctrl",
    "seed_oss",
    "openai-gpt",
    "phimoe",
    "gpt_neox_japanese",
]
NOT_BUILT = {
    "blt": "sizes of its patcher depend on each other",
    "cohere_compass_text": "its configuration's own rotary parameters lack a layer type",
    "dots3_note": "its layers are numbered in the configuration",
    "fuyu": "its vision part has no size to make small",
    "gemma3n": "its vision part needs the package timm",
    "gemma4_assistant": "reads another model's cache",
    "gemma4_unified": "its audio part is large",
    "gemma4_unified_assistant": "reads another model's cache",
    "got_ocr2": "its vision part is large",
    "moss_transcribe_diarize": "its audio part is large",
    "musicgen": "made of three models",
    "musicgen_melody": "made of three models",
    "phi4_multimodal": "its vision and audio parts are large",
    "zamba": "its layers share weights by their number",
}
NOT_RUN = {
    "dbrx": "its configuration's default for clip_qkv is refused by torch",
    "zamba2": "its layers share weights by their number",
}


def hidden(model, seed):
    torch.manual_seed(seed)
    return model.base_model(input_ids=ROW, use_cache=False).last_hidden_state


@pytest.mark.slow
def test_in_training_mode_every_class_equals_itself():
    different, left_out, tried = [], {}, 0
    for model_type in config_classes():
        try:
            model = small_model(model_type)
        except Exception as error:
            left_out[model_type] = str(error)
            continue
        disable_dropout(name_trunk(model)).train()
        with torch.no_grad():
            try:
                first, second = hidden(model, 1), hidden(model, 2)
            except Exception as error:
                left_out[model_type] = str(error)
                continue
        tried += 1
        if not torch.equal(first, second):
            different.append(model_type)
    print(f"{tried} classes; not tried: {left_out}")
    assert not different
    assert tried >= 120  # 179 of the 195 of transformers 5.24
    assert len(left_out.keys() - NOT_BUILT.keys() - NOT_RUN.keys()) <= 20  # of another version


@pytest.mark.parametrize("model_type", RANDOM)
def test_what_training_mode_draws_is_not_drawn(model_type):
    model = small_model(model_type).train()
    assert not torch.equal(hidden(model, 1), hidden(model, 2))
    disable_dropout(model)
    assert torch.equal(hidden(model, 1), hidden(model, 2))
    model.train()
    assert torch.equal(hidden(model, 1), hidden(model, 2))


def test_a_copy_and_parts_that_come_later_stay_in_evaluation_mode():
    model = disable_dropout(small_model("opt"))
    copied = copy.deepcopy(model)
    assert copied.train() is copied and not copied.training
    copied.part = nn.Dropout(0.5)
    assert copied.part.training
    copied.train()
    assert not any(part.training for part in copied.modules())
    holder = nn.ModuleList([copied]).train()
    assert holder.training and not any(part.training for part in copied.modules())


@pytest.mark.parametrize("model_type", ["opt", "gpt2", "llama4", "mixtral", "lfm2", "falcon_h1"])
def test_recomputed_layers_give_the_same_gradients_without_dropout(model_type):
    def gradient(model, forwards=None):
        if forwards is not None:
            for layer in layers_of(model):
                layer.register_forward_hook(lambda *_: forwards.append(1))
                inner = layer.forward
                layer.forward = lambda *a, _inner=inner, **k: (forwards.append(1), _inner(*a, **k))[1]
            recompute_activations(model)
        hidden(model, 1).square().sum().backward()
        return gradients(model)

    model = disable_dropout(name_trunk(small_model(model_type)))
    recomputing, forwards = copy.deepcopy(model).train(), []
    expected, found = gradient(model), gradient(recomputing, forwards)
    assert torch.equal(found, expected) and found.any()
    assert len(forwards) == 3 * len(layers_of(model))  # called once from outside, run twice


def test_recomputing_costs_nothing_without_gradients():
    model = disable_dropout(small_model("llama"))
    with torch.no_grad():
        expected = hidden(model, 1)
        recompute_activations(model)
        assert torch.equal(hidden(model, 1), expected)


def test_a_model_whose_layers_are_not_known_is_refused():
    model = small_model("llama")
    model._no_split_modules = None
    model.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match="LlamaForCausalLM does not say what its layers are.*--gradient_checkpointing"):
        recompute_activations(model)


def test_a_trunk_under_another_name_is_found():
    model = small_model("llama4")
    assert model.base_model is model
    assert name_trunk(model).base_model is model.model
    assert copy.deepcopy(model).base_model is not model.model
    with pytest.raises(UserError, match="has no trunk that could be told from its head"):
        name_trunk(small_model("llama").model)
