"""A run goes on under the options of its checkpoint, whatever became of defaults, options and names since."""

import dataclasses
import inspect
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dqo.config.options import TrainConfig, load_options
from dqo.errors import UserError
from dqo.train.checkpoint import checkpoints
from dqo.train.damage import read_state, write_state
from dqo.train.resume import as_stored
from dqo.train.run import begin, train
from tests.dqo.helpers import arguments, policy, rollout_rows, tokenizer

SHORT = {"max_steps": 4, "save_steps": 2, "save_total_limit": 9, "logging_steps": 1}


def default_is(monkeypatch, name, value, cls=TrainConfig):
    """Gives an option another default, as a later version may."""
    parameters = [p for p in inspect.signature(cls.__init__).parameters.values() if p.default is not p.empty]
    values = tuple(value if p.name == name else p.default for p in parameters)
    assert values != cls.__init__.__defaults__
    monkeypatch.setattr(cls.__init__, "__defaults__", values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folders with a model, rollouts and a finished run, {method and more: folder}."""
    from dqo.models.new import save

    folders = {}
    for name, more in {"plain": {}, "adapter": {"use_peft": True, "lora_r": 2}}.items():
        folder = folders[name] = tmp_path_factory.mktemp(name)
        save(policy(), tokenizer(), folder / "model")
        (folder / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rollout_rows(prompts=6))))
        flags = [flag for flag in arguments(folder, **SHORT, **more) if flag != "True"]
        train(load_options([*flags, "--use_cpu"]))
    return folders


@pytest.fixture
def stopped(finished, tmp_path):
    """stopped(name): a copy of the run as it was after step 2, in its own place, whose options are those of the checkpoint."""
    saved = {}

    def made(name="plain"):
        folder = finished[name]
        saved[folder] = tmp_path / name
        shutil.copytree(folder / "out", saved[folder])
        shutil.rmtree(folder / "out" / "checkpoint-4")
        return folder

    yield made
    for folder, copy in saved.items():
        shutil.rmtree(folder / "out")
        shutil.move(copy, folder / "out")


def told(folder, *more):
    """The shortest command that goes on."""
    return load_options(["--output_dir", str(folder / "out"), "--use_cpu", *more])


def change(checkpoint, **changes):
    """Alters the state of a checkpoint as another version would have written it."""
    state = read_state(checkpoint)
    for key, values in changes.items():
        state[key] = values(state.get(key))
    kept = {name: value for name, value in state.items() if name not in ("files", "crc32")}
    (checkpoint / "dqo_state.json").unlink()
    write_state(checkpoint, kept)


def goes_on_to_the_same_end(finished_run, folder, *more):
    expected = load_file(finished_run / "optimizer.safetensors")
    train(told(folder, *more))
    found = load_file(folder / "out" / "checkpoint-4" / "optimizer.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_checkpoint_keeps_all_options_their_defaults_and_what_they_came_to(finished):
    state = read_state(finished["plain"] / "out" / "checkpoint-4")
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    assert names | {"beta", "lam"} <= state["options"].keys() == state["defaults"].keys()
    assert state["options"]["learning_rate"] == 1e-3 and state["defaults"]["learning_rate"] == 1e-6
    assert state["derived"] == {"warmup": 0, "phases": {"training": 0}, "save_dtype": "float32", "is_level": "none"}
    assert state["steps"] == 4
    assert state["identity"]["trained end token"] == tokenizer().eos_token_id
    assert state["identity"]["configuration"]["hidden_size"] == 16
    assert "model.embed_tokens.weight" in state["parameters"]["policy"] and state["versions"]["torch"]


@pytest.mark.parametrize("name", ["plain", "adapter"])
def test_a_run_goes_on_under_its_options_when_defaults_change(name, stopped, tmp_path, monkeypatch, caplog):
    folder = stopped(name)
    for option, value in {"weight_decay": 0.5, "lr_scheduler_type": "linear", "per_device_train_batch_size": 3}.items():
        default_is(monkeypatch, option, value)
    default_is(monkeypatch, "beta", 7.0, type(told(folder).objective))
    goes_on_to_the_same_end(tmp_path / name / "checkpoint-4", folder)
    [line] = [record.message for record in caplog.records if "which nothing gives now" in record.message]
    assert "weight_decay 0.0" in line and "beta 0.1" in line and "max_steps 4" in line


@pytest.mark.parametrize(
    "more, message",
    [
        (["--beta", "0.7"], "option beta: 0.1 then, 0.7 now"),
        (["--learning_rate", "1e-6"], "option learning_rate: 0.001 then, 1e-06 now"),  # given, though it is the default
        (["--num_train_epochs", "2"], "option max_steps: 4 then, -1 now"),
        (["--method", "sft"], "option method: 'dqo' then, 'sft' now"),
    ],
)
def test_an_option_that_is_given_and_differs_is_refused(more, message, stopped):
    folder = stopped()
    data = ["--dataset_name", str(folder / "rollouts.jsonl"), "--model_name_or_path", str(folder / "model")]
    with pytest.raises(UserError, match=message):
        begin(told(folder, *data, *more))


def test_options_of_the_run_are_taken_and_those_of_its_place_are_not(stopped):
    folder = stopped()
    change(
        folder / "out" / "checkpoint-2", options=lambda o: o | {"fsdp": True, "save_total_limit": 5, "dry_run": True}
    )
    options = as_stored(told(folder, "--save_steps", "3"))
    assert options.train.save_total_limit == 5 and options.train.save_steps == 3
    assert not options.train.fsdp and not options.train.dry_run
    assert options == as_stored(options)


def test_an_option_that_was_added_since_keeps_its_default_or_is_refused(stopped, tmp_path):
    folder = stopped()

    def without(options):
        return {name: value for name, value in options.items() if name != "is_level"}

    def identity(state):
        return state | {"options": without(state["options"])}

    change(folder / "out" / "checkpoint-2", identity=identity, options=without, defaults=without)
    with pytest.raises(UserError, match="option is_level: None then, 'token' now"):
        begin(told(folder, "--is_level", "token"))
    goes_on_to_the_same_end(tmp_path / "plain" / "checkpoint-4", folder)


@pytest.mark.parametrize("value", [0.25, 0.5])
def test_an_option_that_is_gone_is_named_and_passed_over_at_its_default_alone(value, stopped, tmp_path, caplog):
    folder = stopped()

    def having(options):
        return options | {"old_coef": value}

    def identity(state):
        return state | {"options": having(state["options"])}

    change(
        folder / "out" / "checkpoint-2", identity=identity, options=having, defaults=lambda d: d | {"old_coef": 0.25}
    )
    if value == 0.25:
        goes_on_to_the_same_end(tmp_path / "plain" / "checkpoint-4", folder)
        assert sum("option old_coef, 0.25 in" in record.message for record in caplog.records) == 1
    else:
        with pytest.raises(UserError, match="option old_coef: 0.5 then, and there is no such option now"):
            begin(told(folder))


def test_what_options_came_to_is_kept(stopped):
    folder = stopped()
    derived = {"warmup": 3, "phases": {"value_warmup_steps": 0, "training": 1}, "save_dtype": "bfloat16"}
    change(folder / "out" / "checkpoint-2", derived=lambda _: derived)
    trainer = begin(told(folder))
    assert (trainer.warmup, trainer.prepared.save_dtype) == (3, torch.bfloat16)
    assert [stretch.begin for stretch in trainer.stretches] == [0, 1]
    assert begin(told(folder, "--save_dtype", "float32")).prepared.save_dtype == torch.float32


def renamed(name):
    part, _, name = name.partition("/")
    return f"{part}/base_model.model.{name.replace('.default.', '.')}"


def test_adapters_go_on_under_the_names_of_another_peft(stopped, tmp_path):
    folder = stopped("adapter")
    path = folder / "out" / "checkpoint-2" / "adapters.safetensors"
    tensors = load_file(path)
    assert all(renamed(name) != name for name in tensors) and any(".default." in name for name in tensors)
    save_file({renamed(name): tensor.clone() for name, tensor in tensors.items()}, path)
    change(path.parent)
    goes_on_to_the_same_end(tmp_path / "adapter" / "checkpoint-4", folder)


def test_optimizer_states_follow_their_parameters_into_another_order(stopped, tmp_path):
    folder = stopped("adapter")
    checkpoint = folder / "out" / "checkpoint-2"
    path, last = checkpoint / "optimizer.safetensors", len(read_state(checkpoint)["parameters"]["policy"]) - 1

    def turned(key):
        owner, index, field = key.split("/")
        return f"{owner}/{last - int(index)}/{field}" if owner == "policy" else key

    save_file({turned(key): tensor.clone() for key, tensor in load_file(path).items()}, path)
    change(checkpoint, parameters=lambda names: names | {"policy": names["policy"][::-1]})
    goes_on_to_the_same_end(tmp_path / "adapter" / "checkpoint-4", folder)


def test_adapters_of_other_layers_are_refused_by_name(stopped):
    folder = stopped("adapter")
    path = folder / "out" / "checkpoint-2" / "adapters.safetensors"
    tensors = load_file(path)
    gone = sorted(tensors)[-1]
    save_file({name: tensor.clone() for name, tensor in tensors.items() if name != gone}, path)
    change(path.parent)
    with pytest.raises(UserError, match="its adapter is of other parameters; .* is not in the checkpoint"):
        begin(told(folder))


def test_adapters_keep_the_layers_and_the_scale_of_their_checkpoint(stopped, monkeypatch):
    from dqo.models import lora

    folder = stopped("adapter")
    usual = lora.lora_config(2, 32.0, None)
    usual.use_rslora = True  # a later default of peft
    monkeypatch.setattr("dqo.train.run_models.lora_config", lambda *_: usual)
    path = folder / "out" / "checkpoint-2" / "adapter_config.json"
    assert json.loads(path.read_text())["use_rslora"] is False
    config = begin(told(folder)).learner.policy.peft_config["default"]
    assert not config.use_rslora and config.target_modules == set(json.loads(path.read_text())["target_modules"])


@pytest.mark.parametrize("name", ["plain", "adapter", "old"])
@pytest.mark.parametrize(
    "field, value", [("rope_parameters", {"rope_type": "default", "rope_theta": 77.0}), ("rms_norm_eps", 0.5)]
)
def test_a_model_whose_configuration_changed_is_refused_in_one_line(name, field, value, stopped):
    folder = stopped("adapter" if name == "adapter" else "plain")
    if name == "old":  # its checkpoint has the configuration in config.json alone
        drop = lambda identity: {k: v for k, v in identity.items() if k != "configuration"}  # noqa: E731
        change(folder / "out" / "checkpoint-2", identity=drop)
    path = folder / "model" / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {field: value}))
    try:
        with pytest.raises(UserError, match="the configuration of the model has changed since: r") as error:
            begin(told(folder))
    finally:
        path.write_text(before)
    assert "\n" not in str(error.value) and str(checkpoints(folder / "out")[-1]) in str(error.value)
