"""Every field of peft.LoraConfig is right, or refused by its name before any work."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification

from dqo import DQOConfig, DQOTrainer
from dqo.config.lora import BOOKKEEPING, PLAIN, SAME_AS_DEFAULT, _default, check_lora_config, described
from dqo.errors import UserError
from dqo.models.lora import add_adapter
from dqo.models.new import save
from dqo.train.checkpoint import check_same_run
from dqo.train.damage import write_state
from dqo.train.inputs import Given, check_options
from dqo.train.loop import Trainer
from tests.dqo.helpers import policy, rollout_rows, tokenizer

peft = pytest.importorskip("peft")
FIELDS = dataclasses.fields(peft.LoraConfig)
OTHERS = {
    "init_lora_weights": "pissa",
    "bias": "all",
    "task_type": "SEQ_CLS",
    "lora_dropout": 0.1,
    "loftq_config": {"a": 1},
}


def another(field):
    """A value that is not the default; what it means does not matter."""
    default = _default(field)
    return OTHERS.get(field.name, not default if isinstance(default, bool) else ["something"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "then, now, told",
    [
        ({"lora_alpha": 8}, {"lora_alpha": 80}, "option peft_config.lora_alpha: 8 then, 80 now"),
        ({"r": 4}, {"r": 8}, "option peft_config.r: 4 then, 8 now"),
        ({"target_modules": ["q_proj"]}, {}, r"option peft_config.target_modules: \['q_proj'\] then, None now"),
        ({"r": 4}, None, "option peft_config.r: 4 then, None now"),
        (None, {"r": 4}, "option peft_config.r: None then, 4 now"),
    ],
)
def test_a_run_goes_on_with_the_same_peft_config_alone(tmp_path, then, now, told):
    def run(fields):
        given = None if fields is None else peft.LoraConfig(**fields)
        args = DQOConfig(output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, use_cpu=True)
        trainer = DQOTrainer(policy(), args, rollout_rows(), processing_class=tokenizer(), peft_config=given)
        return trainer.train().global_step

    run(then)
    with pytest.raises(UserError, match=told):
        run(now)
    assert run(then) == 1


def test_a_checkpoint_that_does_not_tell_its_peft_config_is_gone_on_with(tmp_path):
    (tmp_path / "adapters.safetensors").touch()
    write_state(tmp_path, {"identity": {"options": {"use_peft": False}}})
    check_same_run(tmp_path, {"options": {"use_peft": False} | described(peft.LoraConfig(r=4))})


@pytest.mark.parametrize("field", [f for f in FIELDS if f.name not in PLAIN | BOOKKEEPING], ids=lambda f: f.name)
def test_what_is_not_known_to_be_plain_is_refused_by_name(field):
    config = peft.LoraConfig()
    setattr(config, field.name, another(field))  # past peft's own checks
    with pytest.raises(UserError, match=rf"{field.name}( is |=)"):
        check_lora_config(config)


def test_known_names_are_fields_of_peft():
    assert {f.name for f in FIELDS} >= PLAIN | BOOKKEEPING | SAME_AS_DEFAULT.keys()


@pytest.mark.parametrize(
    "name", ["pissa", "pissa_niter_4", "olora", "orthogonal", False, "loftq", "eva", "corda", "mica"]
)
def test_starts_that_are_not_the_initial_policy_are_refused(name):
    config = peft.LoraConfig()
    config.init_lora_weights = name
    with pytest.raises(UserError, match="init_lora_weights="):
        check_lora_config(config)


def test_a_field_of_a_later_peft_is_refused_unless_at_its_default():
    later = dataclasses.make_dataclass("LoraConfig", [("use_magic", bool, False)], bases=(peft.LoraConfig,))
    check_lora_config(later())
    with pytest.raises(UserError, match="use_magic=True is not plain LoRA"):
        check_lora_config(later(use_magic=True))


def test_other_kinds_of_configuration_are_refused():
    with pytest.raises(UserError, match="peft_config is a AdaLoraConfig"):
        check_lora_config(peft.AdaLoraConfig(total_step=10))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": 0}, "r=0"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern"),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern 'q_prj' matches no layer"),
        ({"alpha_pattern": {"lm_head": 2}}, "alpha_pattern 'lm_head' matches no layer"),
        ({"layers_to_transform": [0, 7]}, r"layers_to_transform \[7\] are no layers"),
        ({"exclude_modules": ["q_prj"]}, "lora_exclude_modules: no linear layer q_prj"),
        ({"target_modules": ".*proj"}, "lora_target_modules is '.*proj'"),
        ({"target_modules": ["norm"]}, "no linear layer norm"),
    ],
)
def test_values_that_fit_nothing_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        add_adapter(policy(layers=2), peft.LoraConfig(**changes))


def adapted_layers(model):
    return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


def test_where_adapters_are_is_what_the_fields_say():
    model = policy(layers=3)
    config = peft.LoraConfig(layers_to_transform=[0, 2], exclude_modules=["up_proj"], layers_pattern="layers")
    config.target_modules = {"mlp.up_proj", "mlp.down_proj", "q_proj"}
    add_adapter(model, config)
    expected = {f"model.layers.{i}.{name}" for i in (0, 2) for name in ("mlp.down_proj", "self_attn.q_proj")}
    assert adapted_layers(model) == expected
    assert config.target_modules == {"mlp.up_proj", "mlp.down_proj", "q_proj"}  # the caller's stays as it was


SCALED = {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}}
SCALED |= {"alpha_pattern": {"k_proj": 40, "q_proj": 3}}
PLACED = {"r": 2, "init_lora_weights": "gaussian", "layers_to_transform": 1, "exclude_modules": ["v_proj"]}
PLACED |= {"fan_in_fan_out": True, "task_type": "CAUSAL_LM"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("fields", [SCALED, PLACED], ids=["scaled", "placed"])
def test_after_a_reload_everything_is_as_it_was(tmp_path, monkeypatch, fields):
    save(policy(layers=2), tokenizer(), tmp_path / "model")
    rows = rollout_rows(prompts=6, samples=4)

    def trainer(out):
        options = {"max_steps": 6, "save_steps": 3, "learning_rate": 1e-2, "critic_learning_rate": 1e-2}
        options |= {"value_model": "separate"}
        args = DQOConfig(output_dir=str(tmp_path / out), per_device_train_batch_size=4, **options)
        return DQOTrainer(str(tmp_path / "model"), args, rows, peft_config=peft.LoraConfig(**fields))

    whole = trainer("whole")
    whole.train()
    original = Trainer.train_step

    def stop(self, step, groups):
        if step == 4:
            raise KeyboardInterrupt
        return original(self, step, groups)

    monkeypatch.setattr(Trainer, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer("cut").train()
    monkeypatch.undo()
    trainer("cut").train()
    for name in ("adapter_model.safetensors", "critic/model.safetensors"):
        before, after = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

    ids = torch.tensor([[3, 4, 5, 6, 7]])
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "cut" / "critic")
    assert torch.allclose(critic(ids).logits, whole.value_model(ids).logits, atol=1e-5)
    assert critic(ids).logits.abs().max() > 0
    reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert torch.allclose(reloaded(ids).logits, whole.model(ids).logits, atol=1e-6)
    base = policy(layers=2)
    assert (base(ids).logits - whole.model(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options, fields, message",
    [
        (
            {"lora_r": 4},
            {"r": 8},
            r"lora_r 4 \(from DQOConfig\) and peft_config with r=8 contradict each other; remove one",
        ),
        ({"lora_r": 16}, {"r": 8}, "lora_r 16"),  # its default, and yet it was asked for
        ({"lora_alpha": 4.0}, {"r": 8}, "lora_alpha 4.0 .* lora_alpha=8 contradict"),
        ({"lora_target_modules": ["q_proj"]}, {}, "lora_target_modules .* target_modules=None contradict"),
        (
            {"lora_target_modules": ["q_proj"]},
            {"target_modules": "all-linear"},
            "target_modules='all-linear' contradict",
        ),
        ({"lora_r": 8, "lora_alpha": 2}, {"r": 8, "lora_alpha": 2}, None),
        ({"lora_target_modules": ["v_proj", "q_proj"]}, {"target_modules": ["q_proj", "v_proj"]}, None),
        ({}, {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]}, None),
    ],
)
def test_lora_options_beside_a_peft_config_say_the_same_or_are_refused(tmp_path, options, fields, message):
    args = DQOConfig(output_dir=str(tmp_path / "out"), **options)
    given = Given(dataset=[], model=policy(), tokenizer=tokenizer(), peft_config=peft.LoraConfig(**fields))
    if message is None:
        return check_options(args.options, given)
    with pytest.raises(UserError, match=message):
        check_options(args.options, given)
    assert not (tmp_path / "out").exists()
