"""Runs that begin from a value model in a directory, and runs that keep it as it is."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from dqo.config.options import load_options
from dqo.data.batches import collate
from dqo.errors import UserError
from dqo.models.critic import load_critic, make_value_model, save_value_model, score_of, value_rows
from dqo.models.implicit_value import implicit_value_from
from dqo.models.new import character_tokenizer
from dqo.models.policy import load_policy, weights_hash
from dqo.models.value_form import ValueForm, form_of
from dqo.objectives import DQO, DRO
from dqo.objectives.base import Phase
from dqo.train import phases
from dqo.train.run import train
from tests.dqo.helpers import arguments, episodes, policy, tokenizer

SIZES = {"vocab_size": len(tokenizer()), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def run(files, value_model, *flags, **changes):
    settings = {"value_model": value_model, "max_steps": 4, "save_steps": 2} | changes
    return train(load_options([*arguments(files, **settings), *flags]))


def fitted(files, kind="separate", model=None):
    """A directory with a value model of `kind`, whose values differ from state to state."""
    model = policy() if model is None else model
    if kind == "implicit":
        value_model = implicit_value_from(model, [0.0, 1.0, 1.0], 0.5, weights_hash(model, torch.float32))
    else:
        value_model = make_value_model(kind, model)
    torch.manual_seed(3)
    for parameter in list(value_model.parameters())[-2:]:
        parameter.data += 0.3 * torch.randn_like(parameter)
    save_value_model(value_model, value_model.state_dict(), files / kind)
    return files / kind


def tensors(directory):
    return {
        f"{path.name}/{name}": x
        for path in sorted(directory.glob("*.safetensors"))
        for name, x in load_file(path).items()
    }


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["separate", "head", "implicit"])
def test_a_frozen_value_model_stays_as_it_is_and_has_no_warm_up_and_no_optimizer(files, caplog, kind):
    where = fitted(files, kind)
    found = run(files, where, "--freeze_value_model", value_warmup_steps=2, output_dir=files / "out")
    assert same(tensors(where), tensors(files / "out" / "critic"))
    states = load_file(files / "out" / "checkpoint-4" / "optimizer.safetensors")
    assert {name.split("/")[0] for name in states} == {"policy"}
    moved = load_policy(str(files / "out" / "checkpoint-2")).state_dict()
    assert any(
        not torch.equal(x, moved[name]) for name, x in policy().state_dict().items()
    )  # not one step is a warm-up
    assert found.held_out["eval_value/auc_end"] >= 0.0
    assert "value_warmup_steps (the value model is frozen)" in caplog.text
    assert ("is a head on the hidden states of the policy that was trained with it" in caplog.text) == (kind == "head")


@pytest.mark.slow
def test_a_run_goes_on_from_the_value_model_that_it_began_with_or_not_at_all(files):
    where = fitted(files)
    run(files, where)
    began, ended = tensors(where), tensors(files / "out" / "critic")
    assert not same(began, ended)  # without the option it is trained
    again = run(files, where, output_dir=files / "again", resume_from_checkpoint=files / "out" / "checkpoint-2")
    assert same(ended, tensors(files / "again" / "critic")) and again.steps == 4
    shutil.rmtree(where)
    fitted(files, model=policy(5))
    with pytest.raises(UserError, match="belongs to another run:\n  fitted value model: "):
        run(files, where)
    run(files, files / "out", "--freeze_value_model", output_dir=files / "third", max_steps=1)  # a run's directory
    assert same(ended, tensors(files / "third" / "critic"))


@pytest.mark.parametrize("form", [ValueForm("hl_gauss", 0.0, 1.0), ValueForm("bce", 0.0, 1.0), ValueForm()], ids=str)
def test_value_models_of_every_value_loss_go_on_elsewhere(files, form):
    value_model = make_value_model("separate", policy(), form=form, start=0.25)
    save_value_model(value_model, value_model.state_dict(), files / "critic")
    found = run(files, files / "critic", "--freeze_value_model", max_steps=1)
    assert same(tensors(files / "critic"), tensors(files / "out" / "critic"))
    assert form_of(found.prepared.learner.value_model) == form
    assert found.held_out["eval_value/max"] == pytest.approx(0.25, abs=1e-5)


def edited(path, name, value):
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


def test_a_run_does_not_go_on_with_a_value_model_that_is_read_otherwise(files):
    """Its weights are the same."""
    where = fitted(files, "implicit")
    run(files, where, "--freeze_value_model", max_steps=2)
    edited(where / "implicit_value.json", "high", 3.0)
    with pytest.raises(
        UserError, match="of the value model that it began with has changed since: scale.high 1.0 then, 3.0"
    ):
        run(files, where, "--freeze_value_model", max_steps=2)
    edited(where / "implicit_value.json", "high", 1.0)
    edited(where / "config.json", "rms_norm_eps", 0.5)
    with pytest.raises(UserError, match="rms_norm_eps .* then, 0.5 now. Put its directory back"):
        run(files, where, "--freeze_value_model", max_steps=2)


@pytest.mark.parametrize(
    "kind, name",
    [("head", "value_head.safetensors"), ("separate", "model.safetensors"), ("implicit", "model.safetensors")],
)
def test_a_damaged_value_model_is_named(files, kind, name):
    where = fitted(files, kind)
    content = (where / name).read_bytes()
    (where / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{where}.* (damaged|cut or altered)") as caught:
        run(files, where)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
def test_with_adapters_it_gets_one_of_its_own_or_stays_frozen(files):
    where = fitted(files)
    run(files, where, "--use_peft", lora_r=2)
    run(files, where, "--use_peft", "--freeze_value_model", lora_r=2, output_dir=files / "frozen")
    before, trained, frozen = (
        tensors(place) for place in (where, files / "out" / "critic", files / "frozen" / "critic")
    )
    assert same(before, frozen) and not same(before, trained)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reward_model_is_read_in_every_state(files, family):
    """transformers' score of a text is that of its last token: the value of that state."""
    if family == "llama":
        config = LlamaConfig(**SIZES, intermediate_size=16, num_labels=1, pad_token_id=0)
        model = LlamaForSequenceClassification(config)
    else:
        sizes = {"vocab_size": SIZES["vocab_size"], "n_embd": 16, "n_layer": 1, "n_head": 2}
        model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=1, pad_token_id=0))
    model.eval().save_pretrained(files / "rm")
    tokenizer().save_pretrained(files / "rm")
    value_model, batch = load_critic(files / "rm"), collate(episodes(4), 0)
    values, ends = value_rows(value_model, batch)
    row = 0
    for i, e in enumerate(batch.episodes):
        with torch.no_grad():
            states = [e.prompt_ids + e.completion_ids[:t] for t in range(e.action_count + 1)]
            expected = [model(torch.tensor([ids])).logits[0, 0].item() for ids in states]
        assert values[row : row + e.action_count].tolist() == pytest.approx(expected[:-1], abs=1e-5)
        assert ends[i].item() == pytest.approx(expected[-1], abs=1e-5)
        row += e.action_count
    found = run(files, files / "rm", max_steps=1)
    assert score_of(found.prepared.learner.value_model).out_features == 1


def two_sided(files):
    config = BertConfig(**SIZES, intermediate_size=16, num_labels=1)
    BertForTokenClassification(config).save_pretrained(files / "two-sided")
    return files / "two-sided"


def other_tokens(files):
    where = fitted(files)
    words = sorted(tokenizer().get_vocab(), key=tokenizer().get_vocab().get)
    character_tokenizer("".join(reversed([w for w in words if len(w) == 1]))).save_pretrained(where)
    return where


def other_reference(files):
    return fitted(files, "implicit", policy(7))


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda files: fitted(files, "head", policy(hidden_size=8)),
            "a head on hidden states of width 8, and .* has 16 here",
        ),
        (other_tokens, "has another tokenizer than the policy: '.+' is .* there and .* here; a value model shares"),
        (other_reference, "was fitted beside another reference"),
        (
            two_sided,
            "BertForTokenClassification is not causal: its hidden states change with the tokens to their right",
        ),
        (lambda files: files / "model", "is LlamaForCausalLM, which gives no value to a state"),
    ],
)
def test_a_value_model_that_does_not_belong_to_the_policy_is_refused(files, make, message):
    with pytest.raises(UserError, match=message) as caught:
        run(files, make(files), "--freeze_value_model")
    assert len(str(caught.value).splitlines()) == 1 and not (files / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--freeze_value_model"],
            r"freeze_value_model needs a value model that was fitted: give --value_model DIRECTORY",
        ),
        (
            ["--value_model", "seperate"],
            r"value_model must be separate, head, implicit, none, implied:RUN, or the directory of a value model",
        ),
        (
            ["--method", "dro", "--value_model", "none"],
            r"value_model must be separate, head, implicit, implied:RUN, or the directory",
        ),
        (
            ["--value_model", "DIR", "--freeze_value_model", "--target_ema", "0.9"],
            "target_ema must be None with freeze",
        ),
        (["--value_model", "DIR", "--target", "residual"], "target must be detach with value_model implicit"),
        (["--value_model", "DIR", "--value_loss", "bce"], "value_loss bce is for value_model separate or head, not"),
    ],
)
def test_options_that_contradict_it_are_refused(files, flags, message):
    where = str(fitted(files, "implicit")) if "DIR" in flags else ""
    with pytest.raises(UserError, match=message):
        train(load_options([*arguments(files), *(where if flag == "DIR" else flag for flag in flags)]))


def test_phases_leave_a_frozen_value_model_out():
    found = phases.stretches(DQO(), 3, 8, frozen=True)
    assert [(s.begin, s.phase.name, s.phase.trains) for s in found] == [(0, "training", ("policy",))]

    class Last(DRO):
        def phases(self, value_warmup):
            return Phase("policy", 2, ("policy",)), Phase("critic", trains=("critic",))

    phases.check_phases(Last(), 0.0)
    with pytest.raises(UserError, match="phase 'critic' of Last trains the value model alone, which is frozen"):
        phases.check_phases(Last(), 0.0, frozen=True)
