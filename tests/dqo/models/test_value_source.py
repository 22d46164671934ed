"""What a directory holds, told without torch."""

import json

import pytest

from dqo.errors import UserError
from dqo.models.value_source import find_value_model

TOKENS = {"architectures": ["LlamaForTokenClassification"], "id2label": {"0": "LABEL_0"}}


def made(path, **files):
    """A directory with these files: a dict is JSON."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content) if isinstance(content, dict) else content
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_a_run_its_critic_and_a_foreign_model_are_found_with_their_tokenizer(tmp_path):
    run = made(tmp_path / "run", config__yaml="", tokenizer__json={})
    critic = made(run / "critic", config__json=TOKENS)
    for given in (run, critic):
        found = find_value_model(given)
        assert (found.path, found.form, found.tokenizer) == (critic, "separate", run)
    foreign = made(tmp_path / "rm", config__json=TOKENS | {"architectures": ["Qwen2ForSequenceClassification"]})
    assert find_value_model(str(foreign)).tokenizer is None
    for form, name in (("head", "value_head.safetensors"), ("implicit", "implicit_value.json")):
        inner = made(tmp_path / form / "critic", **{name: ""})
        assert (find_value_model(tmp_path / form).form, find_value_model(inner).path) == (form, inner)


def test_the_bins_of_another_value_loss_are_no_labels(tmp_path):
    with pytest.raises(UserError, match="with 2 labels"):
        find_value_model(made(tmp_path, config__json=TWO))
    assert find_value_model(made(tmp_path, value_form__safetensors="")).form == "separate"


TWO = {"architectures": ["A_ForTokenClassification"], "id2label": {"0": "a", "1": "b"}}


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "holds no config.json, value_head.safetensors or implicit_value.json; name a run's output_dir"),
        ({"adapter_config__json": "{}"}, "holds an adapter; name a run's"),
        ({"config__json": "["}, "its config.json cannot be read"),
        (
            {"config__json": {"architectures": ["LlamaForCausalLM"]}},
            "is LlamaForCausalLM, which gives no value to a state",
        ),
        ({"config__json": {"architectures": ["OddRewardModel"]}}, "is OddRewardModel, which gives no value"),
        ({"config__json": {}}, "is a model that does not say its class, which gives no value"),
        ({"config__json": TWO}, "is A_ForTokenClassification with 2 labels; a value model has one"),
        ({"config__json": {"architectures": TWO["architectures"]}}, "with 2 labels"),
        (
            {"config__yaml": "", "config__json": TOKENS},
            "has no critic/: the run is not finished, or has no value model",
        ),
    ],
)
def test_anything_else_is_refused_by_what_it_is(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as caught:
        find_value_model(made(tmp_path / "there", **files))
    assert str(tmp_path / "there") in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_what_is_no_directory_is_refused_and_a_checkpoint_with_a_critic_is_named(tmp_path):
    with pytest.raises(UserError, match="value_model .*nowhere: there is no such directory; name a run's output_dir"):
        find_value_model(tmp_path / "nowhere")
    run = made(tmp_path / "run", config__yaml="")
    for step in (2, 10):
        made(run / f"checkpoint-{step}" / "critic", config__json=TOKENS)
    with pytest.raises(UserError, match="has no critic/.*checkpoint-10/critic is there"):
        find_value_model(run)
    with pytest.raises(UserError, match="config.yaml: is a file"):
        find_value_model(run / "config.yaml")
