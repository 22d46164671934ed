"""Models that stay in their files until a process reads its share."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dqo.config.options import load_options
from dqo.errors import UserError
from dqo.models.critic import value_model_from
from dqo.models.implicit_value import implicit_value_from
from dqo.models.on_disk import SINGLE, Weights, fill, is_empty, weight_files
from dqo.models.policy import load_empty, load_policy, weights_hash
from dqo.train.run import train
from tests.dqo.helpers import arguments, policy


@pytest.fixture
def split(files):
    """The model in files of several layers each."""
    policy(layers=3).save_pretrained(files / "model", max_shard_size="8KB")
    (files / "model" / SINGLE).unlink(missing_ok=True)
    assert len(list((files / "model").glob("*.safetensors"))) > 2
    return files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_later_is_what_is_loaded_at_once(split, dtype):
    path = str(split / "model")
    loaded, empty = load_policy(path, dtype=dtype), load_empty(path, dtype)
    assert is_empty(empty) and not any(p.is_meta for p in empty.buffers())
    assert weights_hash(empty) == weights_hash(loaded)
    critic, implicit = value_model_from(empty), implicit_value_from(empty, [0.0, 1.0], 0.1, "")
    for model, expected in (
        (empty, loaded),
        (critic, value_model_from(loaded)),
        (implicit, implicit_value_from(loaded, [0.0, 1.0], 0.1, "")),
    ):
        fill(model, torch.device("cpu"))
        state = model.state_dict()
        assert state.keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(state[name], tensor.float()), name
    ids = torch.tensor([[3, 4, 5]])
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert torch.equal(empty.float()(ids).logits, loaded.float()(ids).logits)


def test_a_slice_is_these_rows(split):
    files = weight_files(str(split / "model"))
    weights, whole = Weights(files), load_policy(str(split / "model")).state_dict()
    for name in files:
        assert torch.equal(weights.read(name, 1, 3), whole[name][1:3])


def test_a_model_that_lacks_one_of_its_files_is_named_with_the_cure(split):
    gone = sorted((split / "model").glob("*.safetensors"))[1]
    gone.unlink()
    said = rf"model' lacks {gone.name}, which its model.safetensors.index.json names \(1 of \d+ files are missing\); fetch or"
    with pytest.raises(UserError, match=said) as caught:
        train(load_options(arguments(split)))
    assert "\n" not in str(caught.value) and not (split / "out").exists()
    with pytest.raises(UserError, match=said):
        load_empty(str(split / "model"), torch.float32)


def test_files_with_other_names_are_left_to_transformers(split):
    state = {f"other.{name}": tensor for name, tensor in policy(layers=3).state_dict().items() if "lm_head" not in name}
    for path in (split / "model").glob("*.safetensors*"):
        path.unlink()
    save_file(state, split / "model" / SINGLE)
    assert load_empty(str(split / "model"), torch.float32) is None
    assert weight_files(str(split)) is None


def test_a_cut_file_is_named(split):
    empty = load_empty(str(split / "model"), torch.float32)
    path = next(iter(empty.on_disk.files.values()))[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{path.name} cannot be read .*; fetch or copy it again"):
        fill(empty, torch.device("cpu"))


def test_tensors_are_written_as_safetensors_writes_them(tmp_path):
    from dqo.processes import Processes
    from dqo.train.streamed import write_tensors

    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    tensors = {
        f"{kind}/{shape}": torch.ones(shape).to(kind) * 1 for kind in kinds for shape in ((), (0,), (3,), (2, 5))
    }
    tensors = {name: tensor.to(getattr(torch, name.split("/")[0].split(".")[1])) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "a.safetensors", tensors, Processes(), {"torch.float32/(3,)": torch.bfloat16})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        kind = torch.bfloat16 if name == "torch.float32/(3,)" else tensor.dtype
        assert found[name].dtype == kind and torch.equal(found[name], tensor.to(kind)), name
    header = (tmp_path / "a.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}
