"""What is exported loads in plain transformers as it was trained; it is whole or not there at all."""

import errno
import json
import os
import shutil
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, GenerationConfig

from dqo import api
from dqo.commands.base import dqo_command
from dqo.config.options import load_options
from dqo.errors import UserError
from dqo.models.critic import load_critic
from dqo.models.new import save
from dqo.train import export as exporting
from dqo.train.export import export
from dqo.train.run import train
from tests.dqo.helpers import arguments, policy, rollout_rows, tokenizer

IDS = torch.tensor([[3, 4, 5, 6, 7]])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A model in model/, and two runs of four steps with checkpoints 2 and 4: full/ of all weights, lora/ of adapters."""
    folder = tmp_path_factory.mktemp("runs")
    save(policy(), tokenizer(), folder / "model")
    (folder / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rollout_rows(prompts=12, samples=4))))
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "value_model": "separate"}
    train(load_options(arguments(folder, output_dir=folder / "full", **settings)))
    lora = arguments(folder, output_dir=folder / "lora", lora_r=2, **settings)
    train(load_options([*lora, "--use_peft"]))
    return folder


@pytest.fixture
def full(runs, tmp_path):
    return shutil.copytree(runs / "full", tmp_path / "full")


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def test_the_directory_loads_in_transformers_without_an_argument(runs, tmp_path, capsys):
    dqo_command(["export", str(runs / "full"), "--output_dir", str(tmp_path / "a" / "out"), "--value_model"])
    said = capsys.readouterr().out
    out = tmp_path / "a" / "out"
    assert "parameters in float32, the value model in critic/" in said and "every weight is as it was written" in said
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"}
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert not list(out.parent.glob(".*"))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(runs / "full")))
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(out)("1+2=")["input_ids"] == tokenizer()("1+2=")["input_ids"]
    critic = AutoModelForTokenClassification.from_pretrained(out / "critic")
    assert torch.allclose(logits(critic), logits(load_critic(runs / "full" / "critic")), atol=1e-6)
    assert logits(critic).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_type_is_the_trained_weights_rounded(runs, tmp_path, dtype):
    found = api.export(runs / "full", tmp_path / "out", dtype=dtype, value_model=True)
    exact = load_file(runs / "full" / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == exact.keys()
    assert all(torch.equal(tensor.to(getattr(torch, dtype)), written[name]) for name, tensor in exact.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
    assert 0 < found.difference < exporting.BOUNDS[dtype]


@pytest.mark.parametrize("part", [".", "checkpoint-4"])
def test_an_adapter_is_merged_and_its_value_model_too(runs, tmp_path, part):
    from peft import AutoPeftModelForCausalLM

    found = export(runs / "lora" / part, tmp_path / "out", value_model=True)
    assert found.adapter and found.dtype == "float32"
    trained = logits(AutoPeftModelForCausalLM.from_pretrained(runs / "lora" / part))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(model), trained, atol=1e-5)
    assert (trained - logits(AutoModelForCausalLM.from_pretrained(runs / "model"))).abs().max() > 1e-3
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "out" / "critic")
    assert torch.allclose(logits(critic), logits(load_critic(runs / "lora" / "critic")), atol=1e-6)


def test_an_adapter_alone_has_the_type_of_its_base(runs, tmp_path):
    policy().bfloat16().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    config = json.loads((runs / "lora" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "model")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(runs / "lora" / "adapter_model.safetensors", tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "out").dtype == "bfloat16"
    assert "from the base" not in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path / "model") in (tmp_path / "out" / "README.md").read_text()


def test_a_checkpoint_is_exported_with_its_own_results(runs, tmp_path):
    export(runs / "full" / "checkpoint-2", tmp_path / "out")
    written, saved = (load_file(p / "model.safetensors") for p in (tmp_path / "out", runs / "full" / "checkpoint-2"))
    assert all(torch.equal(written[name], saved[name]) for name in saved)
    assert "2 steps." in (tmp_path / "out" / "README.md").read_text()


def test_the_card_has_results_data_and_options_and_leaves_the_license_to_the_user(runs, tmp_path):
    (runs / "full" / "report.json").write_text(json.dumps({"command": "dqo-train --beta 0.1"}))
    export(runs / "full", tmp_path / "out")
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    state = json.loads((runs / "full" / "checkpoint-4" / "dqo_state.json").read_text())
    rows = [json.loads(line) for line in (runs / "full" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert f"| eval_loss | {losses[0]:.6g} | {losses[-1]:.6g} |" in card.text
    assert state["identity"]["data"] in card.text and "beta: 0.1" in card.text and "4 steps" in card.text
    assert "```bash\ndqo-train --beta 0.1\n```" in card.text
    assert card.data.license is None and "## License\n\nNot stated." in card.text


def test_it_stops_where_training_ended_responses(tmp_path):
    # the template ends a message with a token that is not the tokenizer's EOS
    tok = tokenizer()
    tok.add_special_tokens({"additional_special_tokens": ["<e>"]})
    tok.chat_template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<e>{% endif %}{% endfor %}"
    model = policy()
    model.resize_token_embeddings(len(tok))
    model.generation_config = GenerationConfig(eos_token_id=[7], temperature=0.5, do_sample=True)
    save(model, tok, tmp_path / "model")

    def messages(row):
        turns = {"prompt": ("user", row["prompt"]), "completion": ("assistant", row["completion"])}
        return row | {name: [{"role": role, "content": text}] for name, (role, text) in turns.items()}

    rows = map(messages, rollout_rows(prompts=6, samples=4))
    (tmp_path / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(load_options(arguments(tmp_path, method="sft", max_steps=1)))
    export(tmp_path / "out", tmp_path / "whole")
    settings = GenerationConfig.from_pretrained(tmp_path / "whole")
    ends = [tok.convert_tokens_to_ids("<e>"), *sorted({7, tok.eos_token_id})]
    assert settings.eos_token_id == ends and settings.pad_token_id == tok.pad_token_id and settings.temperature == 0.5
    loaded = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert loaded.chat_template == tok.chat_template
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").generation_config.eos_token_id == ends


# ----------------------------------------------------------------------------------------------------------- refused


def refused(run, output_dir, part, **options):
    with pytest.raises(UserError) as caught:
        export(run, output_dir, **options)
    assert part in str(caught.value), caught.value
    return str(caught.value)


def test_what_a_run_owns_is_no_place_for_an_export(full, runs, tmp_path):
    inside = [full / "exported", full / "critic" / "x", full / "checkpoint-9", full / "checkpoint-2" / "x"]
    for run in (full, full / "checkpoint-4"):
        for place in inside:
            refused(run, place, f"output_dir {place} lies in ")
    refused(runs / "lora", full / "checkpoint-2" / "x", f"lies in {full / 'checkpoint-2'}, whose folders a run")
    refused(runs / "lora", full / "checkpoint-9", "has the name of a checkpoint, for which a run would take it")
    assert not any(place.exists() for place in inside)


@pytest.mark.parametrize("dtype", ["int8", "float64", "foo"])
def test_another_type_of_weights_is_refused(runs, tmp_path, dtype):
    said = f"dtype must be one of bfloat16, float16, float32, or None, got '{dtype}'"
    refused(runs / "full", tmp_path / "out", said, dtype=dtype)


def test_an_unfinished_run_is_refused_with_its_last_checkpoint(full, tmp_path):
    shutil.rmtree(full / "checkpoint-4")
    refused(
        full, tmp_path / "out", f"{full} is not finished (2 of 4 steps): the command that began it goes on there. Or"
    )
    assert refused(full, tmp_path / "out", "its last checkpoint").endswith(str(full / "checkpoint-2"))
    shutil.rmtree(full / "checkpoint-2")
    (full / "config.json").unlink()
    refused(full, tmp_path / "out", f"{full} is the output_dir of a run that has made no checkpoint yet")
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_killed_before_its_models_were_written_is_refused(full, tmp_path):
    (full / "config.json").unlink()
    refused(full, tmp_path / "out", "is not finished (its models are not written yet)")


@pytest.mark.parametrize("damage", ["altered", "gone", "no state"])
def test_a_damaged_checkpoint_is_refused_with_another(full, tmp_path, damage):
    path = full / "checkpoint-4" / ("dqo_state.json" if damage == "no state" else "model.safetensors")
    if damage == "altered":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    said = refused(full / "checkpoint-4", tmp_path / "out", f"{full / 'checkpoint-4'} is damaged: {path.name}")
    assert said.endswith(f"; {full / 'checkpoint-2'} is whole")


@pytest.mark.parametrize(
    "name, part",
    [
        (
            "nowhere",
            "nowhere: there is no such directory; name a run's output_dir, a checkpoint in it, or an adapter's",
        ),
        ("file", "file: is a file; name a run's output_dir"),
        ("empty", "empty holds neither a model (config.json) nor an adapter (adapter_config.json)"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, name, part):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / name, tmp_path / "out", part)


def test_a_directory_in_use_is_refused_and_an_empty_one_taken(runs, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    export(runs / "full", used)
    refused(runs / "full", used, f"output_dir {used} is in use; choose a new or empty directory")
    refused(runs / "full", runs / "full", "is in use (it is the run itself)")
    refused(runs / "full", used / "config.json", "config.json is a file; choose a new directory")


@pytest.mark.parametrize(
    "setting, part",
    [
        ("head", "its value model is a head"),
        ("implicit", "its value model is a language model beside its reference"),
        ("none", "has no value model (critic/)"),
    ],
)
def test_a_value_model_of_no_class_and_a_missing_one_are_refused(runs, tmp_path, setting, part):
    train(
        load_options(
            arguments(
                tmp_path,
                model_name_or_path=runs / "model",
                dataset_name=runs / "rollouts.jsonl",
                max_steps=1,
                value_model=setting,
            )
        )
    )
    refused(tmp_path / "out", tmp_path / "whole", part, value_model=True)
    export(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("name, value", [("value_loss", "bce"), ("value_input", "ref_logprob")])
def test_a_value_model_of_another_form_is_refused(runs, tmp_path, name, value):
    options = {"model_name_or_path": runs / "model", "dataset_name": runs / "rollouts.jsonl", name: value}
    options |= {"value_model": "separate"}
    train(load_options(arguments(tmp_path, max_steps=1, **options)))
    part = f"its value model was trained with {name} {value}, which no class of transformers describes"
    refused(tmp_path / "out", tmp_path / "whole", part, value_model=True)


# ----------------------------------------------------------------------------------------------- whole or not there


def nothing_left(folder):
    return [path.name for path in folder.iterdir()] == []


def test_a_merge_that_computes_something_else_is_refused(runs, tmp_path, monkeypatch):
    merged = exporting.merged

    def wrong(*arguments):
        found = merged(*arguments)
        found.model.layers[0].mlp.down_proj.weight.data *= 1.05
        return found

    monkeypatch.setattr(exporting, "merged", wrong)
    refused(runs / "lora", tmp_path / "out", "gives log-probabilities that differ from the trained policy's by")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("part", ["policy", "value model"])
def test_a_weight_that_was_written_otherwise_is_found(runs, tmp_path, monkeypatch, part):
    from safetensors.torch import save_file

    save_models = exporting.save_models

    def wrong(directory, *arguments, **options):
        save_models(directory, *arguments, **options)
        path = (directory / "critic" if part == "value model" else directory) / "model.safetensors"
        tensors = load_file(path)
        name = min(name for name in tensors if "mlp" in name)
        tensors[name].view(-1)[0] += 1e-6
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(exporting, "save_models", wrong)
    refused(
        runs / "full", tmp_path / "out", f"the {part}, loaded again, differs from what was written", value_model=True
    )
    assert nothing_left(tmp_path)


def test_a_full_disk_is_one_line_before_and_while_it_writes(runs, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        refused(runs / "full", tmp_path / "out", "the models need 13.6 KB")
        refused(
            runs / "full", tmp_path / "out", ", and the disk has 1 KB left; free some, or choose another --output_dir"
        )

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for what in ("transformers.PreTrainedModel.save_pretrained", "dqo.files.os.fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(what, full_disk)
            refused(runs / "full", tmp_path / "out", f"{tmp_path / 'out'}: cannot be written: No space left on device")
    assert nothing_left(tmp_path)


def test_of_two_at_once_the_second_is_refused_and_the_first_stays(runs, tmp_path, monkeypatch):
    def slower(path):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "config.json").write_text("the first's")

    monkeypatch.setattr(exporting, "sync_tree", slower)
    refused(runs / "full", tmp_path / "out", f"output_dir {tmp_path / 'out'} was written by another process meanwhile")
    assert (tmp_path / "out" / "config.json").read_text() == "the first's"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_is_deleted_when_it_is_old(runs, tmp_path):
    names = [".out.0123abcd.partial", ".out.4567abcd.partial", ".other.0123abcd.partial", ".out.2.0123abcd.partial"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
        if name != names[1]:
            os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    export(runs / "full", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *names[1:]}


# --------------------------------------------------------------------------------------------------------------- hub


def test_it_is_uploaded_whole_and_a_failed_upload_leaves_it(runs, tmp_path, monkeypatch):
    sent = {}

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, allow_patterns, ignore_patterns, **others):
            there = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
            chosen = huggingface_hub.utils.filter_repo_objects
            sent["files"] = set(chosen(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
            assert sent["files"] == set(there)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    found = export(runs / "full", tmp_path / "out", value_model=True, push_to_hub="me/tiny")
    assert found.commit == "https://hub/me/tiny" and "uploaded: https://hub/me/tiny" in str(found)
    assert sent["files"] >= {"README.md", "model.safetensors", "critic/model.safetensors", "generation_config.json"}

    def unreachable(self, *_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(Hub, "create_repo", unreachable)
    said = refused(
        runs / "full",
        tmp_path / "again",
        "is written and whole, and its upload to me/tiny failed",
        push_to_hub="me/tiny",
    )
    assert "no route to the hub" in said and "hf upload me/tiny" in said
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")),
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")),
    )


def test_a_name_that_no_repository_can_have_is_refused_first(runs, tmp_path):
    refused(runs / "full", tmp_path / "out", "push_to_hub 'a b/c/d'", push_to_hub="a b/c/d")
    assert not (tmp_path / "out").exists()
