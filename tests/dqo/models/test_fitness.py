"""What is refused before any work: models, tokenizers and rows that do not fit each other."""

import dataclasses
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DistilBertConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, T5Config

from benchmarks.trainer.small_models import config_classes, small_config, small_model
from dqo.commands.check import CheckConfig, check
from dqo.config.options import load_options
from dqo.data.rows import read_rows
from dqo.errors import UserError
from dqo.models.architecture import disable_dropout, name_trunk
from dqo.models.fitness import check_head, check_model
from dqo.models.limits import check_positions, check_tokenizer, position_limit
from dqo.train.run import train
from tests.dqo.helpers import arguments, episodes, gpt2, policy, tokenizer

IDS = [1, 5, 6, 7, 8, 9, 10, 11]


def refused(model, ids=IDS) -> str:
    with pytest.raises(UserError) as error:
        check_model(disable_dropout(name_trunk(model)), ids, 0)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("make", [policy, gpt2])
def test_models_that_can_be_trained_pass(make):
    model = disable_dropout(make())
    for ids in (IDS, IDS[:3], IDS[:2]):
        check_model(model, ids, 0)
    check_model(model.bfloat16(), IDS, 0)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "mamba2", "granite"])
def test_models_of_other_kinds_pass(model_type):
    test_models_that_can_be_trained_pass(lambda: small_model(model_type))


def test_a_model_that_differs_from_itself_is_refused():
    class Noisy(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.norm.register_forward_hook(lambda _, __, out: torch.nn.functional.dropout(out, 0.1))

    message = refused(Noisy(policy().config))
    assert message.startswith("Noisy gives one row two results") and "random numbers even in evaluation mode" in message


def test_a_model_that_changes_its_weights_is_refused():
    assert refused(small_model("rwkv")).startswith("RwkvForCausalLM changes its own weights in a forward pass")


@pytest.mark.parametrize("model_type", ["bert", "cpmant", "xlnet", "xlm", "roformer"])
def test_a_model_that_looks_ahead_is_refused(model_type):
    message = refused(small_model(model_type))
    assert "is not causal: its hidden states change with the tokens to their right" in message
    assert ("set is_decoder" in message) == (model_type in ("bert", "roformer"))


def test_a_model_whose_rows_see_each_other_is_refused():
    class Coupled(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.norm.register_forward_hook(lambda _, __, out: out - out.mean(0, keepdim=True) / 2)

    assert refused(Coupled(policy().config)).startswith("Coupled gives a row other hidden states in a padded batch")


def test_a_model_that_needs_more_than_tokens_is_refused():
    class Wants(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.register_forward_pre_hook(self.complain)

        def complain(self, *_):
            raise ValueError("You have to give\npixel_values")

    message = refused(Wants(policy().config))
    assert message.startswith("Wants cannot be run on token ids alone (You have to give pixel_values)")


@pytest.mark.parametrize("model_type", ["cohere", "granite", "hyperclovax", "falcon_h1"])
def test_a_known_factor_of_the_logits_is_the_heads(model_type):
    factors = {"logit_scale": 0.3, "logits_scaling": 3.0, "lm_head_multiplier": 0.3}
    config = small_config(model_type)
    changed = {name: value for name, value in factors.items() if hasattr(config, name)}
    model = disable_dropout(small_model(model_type, **changed))
    torch.nn.init.normal_(model.lm_head.weight)
    check_head(model, IDS)
    for name in changed:
        setattr(model.config, name, 1.7)  # what the model was not built with
    if model_type in ("cohere", "falcon_h1"):
        with pytest.raises(UserError, match="does more to its logits"):
            check_head(model, IDS)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(8, 48))
@settings(max_examples=50, deadline=None)
def test_learned_positions_are_a_limit(lengths, limit):
    members = episodes(len(lengths))
    for e, length in zip(members, lengths):
        e.prompt_ids, e.completion_ids = [3] * length, [3]
    config = GPT2Config(n_positions=limit)
    longer = [e for e in members if e.length > limit]
    if not longer:
        check_positions(config, members)
        return
    with pytest.raises(UserError) as error:
        check_positions(config, members)
    assert str(error.value).startswith(
        f"{longer[0].source}: {longer[0].length} tokens of prompt and completion, and the"
    )
    assert f"{limit} positions ({len(longer)} of {len(members)}" in str(error.value)


def test_more_tokens_than_a_rotary_model_was_made_for_are_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        check_positions(small_config("llama", max_position_embeddings=4), episodes(6))
    (record,) = caplog.records
    assert "the model was made for 4 positions, and" in record.message


@pytest.mark.slow
def test_a_limit_is_hard_where_a_longer_row_fails():
    wrong, tried = [], 0
    for model_type in config_classes():
        try:
            model = disable_dropout(name_trunk(small_model(model_type)))
        except Exception:
            continue
        limit, hard = position_limit(model.config)

        def runs(length, model=model):
            try:
                with torch.no_grad():
                    model.base_model(input_ids=torch.full((1, length), 5), use_cache=False)
            except Exception:
                return False
            return True

        if not runs(8):
            continue
        tried += 1
        if limit is not None and (not runs(limit) or hard == runs(limit + 3)):
            wrong.append(model_type)
    assert not wrong and tried >= 120


def slow_tokenizer():
    class Slow:
        pad_token, pad_token_id, eos_token, eos_token_id, is_fast = "<pad>", 0, "<eos>", 2, False

    return Slow()


def test_tokenizers_that_do_not_fit_are_refused(files):
    config = policy().config
    rows = read_rows(files / "rollouts.jsonl")
    check_tokenizer(tokenizer(), rows, config)
    check_tokenizer(slow_tokenizer(), rows, config)
    rows[3] = dataclasses.replace(rows[3], steps=[(0, len(rows[3].completion))], step_rewards=[1.0])
    check_tokenizer(tokenizer(), rows, config)
    with pytest.raises(UserError, match=r"rollouts.jsonl:4: steps are placed on tokens .*, which Slow does not report"):
        check_tokenizer(slow_tokenizer(), rows, config)
    for name in ("pad", "eos"):
        larger = tokenizer()
        larger.add_special_tokens({f"{name}_token": "<more>"})
        with pytest.raises(
            UserError, match=rf"{name}_token '<more>' has id {config.vocab_size}, and the model has emb"
        ):
            check_tokenizer(larger, rows, config)


def trained_on(files):
    return train(load_options(arguments(files)))


def checked(files):
    check(CheckConfig(data=(str(files / "rollouts.jsonl"),), model_name_or_path=str(files / "model")))


@pytest.mark.parametrize("act", [trained_on, checked])
def test_check_and_training_refuse_the_same_before_any_work(files, act):
    size = len(tokenizer())
    short = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=9, n_embd=16, n_layer=1, n_head=2))
    short.save_pretrained(files / "model")
    with pytest.raises(
        UserError, match=r"rollouts.jsonl:\d+: \d+ tokens of prompt and completion, and the model has 9 pos"
    ):
        act(files)
    larger = AutoTokenizer.from_pretrained(files / "model")
    larger.add_special_tokens({"pad_token": "<more>"})
    larger.save_pretrained(files / "model")
    with pytest.raises(UserError, match=f"pad_token '<more>' has id {size}"):
        act(files)
    for other, reason in (
        (DistilBertConfig(), r"\(distilbert\) is no causal"),
        (T5Config(), r"an encoder and a decoder \(t5"),
    ):
        other.save_pretrained(files / "model")
        with pytest.raises(UserError, match=reason):
            act(files)
    assert not (files / "out").exists()


def test_a_model_that_cannot_be_trained_is_refused_before_output_dir_is_used(files):
    small_model("rwkv", vocab_size=20).save_pretrained(files / "model")
    with pytest.raises(UserError, match="RwkvForCausalLM changes its own weights"):
        trained_on(files)
    assert not (files / "out").exists()


def test_adapters_on_layers_that_only_look_linear_are_refused_before_output_dir_is_used(files):
    model = small_model("llama4", vocab_size=20)
    tokens = AutoTokenizer.from_pretrained(files / "model")
    model.save_pretrained(files / "model")
    tokens.save_pretrained(files / "model")
    flags = [*arguments(files), "--use_peft"]
    with pytest.raises(UserError, match="Llama4ForCausalLM with adapters cannot be run .*--lora_target_modules"):
        train(load_options(flags))
    assert not (files / "out").exists()
