"""Full training with weights in bfloat16: float32 copies take the updates, and checkpoints keep them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dqo.config.options import load_options
from dqo.models.new import save
from dqo.train import masters, optim
from dqo.train.run import train
from tests.dqo.helpers import arguments, policy, rollout_rows, tokenizer

SETTINGS = {"max_steps": 8, "save_steps": 4, "save_total_limit": 5, "learning_rate": 1e-4, "target_ema": 0.99}
SETTINGS |= {"value_model": "separate"}


def weights(path):
    return load_file(path / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run with weights in float32 and in bfloat16."""
    files = tmp_path_factory.mktemp("runs")
    save(policy(), tokenizer(), files / "model")
    lines = [json.dumps(row) for row in rollout_rows(prompts=12, samples=4)]
    (files / "rollouts.jsonl").write_text("\n".join(lines))
    found = {
        dtype: train(load_options(arguments(files, output_dir=files / dtype, dtype=dtype, **SETTINGS)))
        for dtype in ("float32", "bfloat16")
    }
    return files, found


def test_updates_too_small_for_a_weight_in_bfloat16_add_up():
    """200 updates of 5e-6 at a weight of 1, whose neighbours in bfloat16 are 1/256 and 1/128 away."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    masters.add_masters(model)
    optimizer = optim.make_optimizer(model, 5e-6, 0.0, (0.9, 0.999), 1e-8)
    for _ in range(200):
        masters.clear_gradients(model)
        for _ in range(3):  # micro-batches
            model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
            masters.take_gradients(model)
        assert optim.clip(model, 100.0) == 3.0
        optim.update(optimizer, 5e-6)
        masters.round_to_weights(model)
    (master,) = masters.masters_of(model)
    assert master.item() == pytest.approx(1.0 - 1e-3, abs=2e-5)
    assert torch.equal(model.weight, master.bfloat16()) and model.weight.dtype == torch.bfloat16


def test_a_run_is_near_the_one_in_float32(runs):
    files, found = runs
    exact, rounded = found["float32"], found["bfloat16"]
    assert rounded.held_out["eval_loss"] == pytest.approx(exact.held_out["eval_loss"], rel=0.01)
    model, critic = rounded.prepared.learner.policy, rounded.prepared.learner.value_model
    assert model.dtype == torch.bfloat16 and critic.score.weight.dtype == torch.float32
    begun = load_file(files / "model" / "model.safetensors")
    one, two = (weights(run.output_dir / "checkpoint-8") for run in (exact, rounded))
    for name, start in begun.items():
        moved = (one[name] - start).abs().mean()
        assert (two[name] - one[name]).abs().mean() < 0.25 * moved, name  # the start is rounded too
        assert torch.equal(two[name].bfloat16(), model.state_dict()[name])
    assert any(not torch.equal(two[name].bfloat16().float(), two[name]) for name in two)


def test_a_run_goes_on_bit_for_bit(runs):
    files, found = runs
    whole = found["bfloat16"].output_dir
    shutil.copytree(whole, files / "again")
    shutil.rmtree(files / "again" / "checkpoint-8")
    train(load_options(arguments(files, output_dir=files / "again", dtype="bfloat16", **SETTINGS)))
    for name in ("model.safetensors", "critic/model.safetensors", "optimizer.safetensors", "target.safetensors"):
        one, two = (load_file(path / "checkpoint-8" / name) for path in (whole, files / "again"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name


def test_the_files_say_float32(runs):
    files, found = runs
    checkpoint = found["bfloat16"].output_dir / "checkpoint-8"
    for part in (checkpoint, checkpoint / "critic"):
        assert json.loads((part / "config.json").read_text())["dtype"] == "float32"
        assert {tensor.dtype for tensor in weights(part).values()} == {torch.float32}
