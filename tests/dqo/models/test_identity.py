import json
from types import SimpleNamespace

import pytest

from dqo.errors import UserError
from dqo.models.identity import check_holds_model, model_identity

FILES = (
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
    "value_head.safetensors",
    "value_form.safetensors",
    "implicit_value.json",
    "value_start.safetensors",
)


def identity(path):
    return model_identity(str(path), SimpleNamespace(_commit_hash="0a1b"))


def model(path, names=FILES):
    path.mkdir()
    for name in names:
        (path / name).write_text(f"{name} ")
    return path


def test_it_is_of_what_responses_depend_on_and_of_nothing_else(tmp_path):
    path = model(tmp_path / "a")
    before = identity(path)
    assert identity(model(tmp_path / "b")) == before  # the name is not part of it
    for name in ("optimizer.safetensors", "dqo_state.json", "README.md"):
        (path / name).write_text("x")
    (path / "critic").mkdir()
    (path / "critic" / "model.safetensors").write_text("x")
    assert identity(path) == before
    found = {before}
    for name in FILES:
        (path / name).write_text("changed")
        found.add(identity(path))
    assert len(found) == 1 + len(FILES)


def test_that_of_an_adapter_is_of_its_base_too(tmp_path):
    base, adapter = model(tmp_path / "base"), model(tmp_path / "adapter", ["adapter_model.safetensors"])
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = identity(adapter)
    (adapter / "adapter_model.safetensors").write_text("changed")
    after = identity(adapter)
    (base / "config.json").write_text("changed")
    assert len({before, after, identity(adapter), identity(base)}) == 4


def test_that_of_a_hub_name_is_its_commit():
    assert identity("org/name") == "org/name@0a1b"


def test_a_run_without_a_model_names_its_newest_checkpoint(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="the run has not ended, and has no model yet; .* such as .*checkpoint-10$"):
        check_holds_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    check_holds_model(str(tmp_path))
    check_holds_model("org/name")
