import pytest
import torch

from dqo.errors import UserError
from dqo.models.critic import value_model_from
from dqo.models.implicit_value import implicit_value_from
from dqo.processes import Processes
from dqo.train import checkpoint, optim
from dqo.train.learner import Learner
from tests.dqo.helpers import policy, tokenizer

ALONE = Processes()


def stepped(model):
    optimizer = optim.make_optimizer(model, 1e-2, 0.1, (0.9, 0.99), 1e-8)
    for _ in range(3):
        model(torch.tensor([[3, 4, 5]])).logits.square().mean().backward()
        optim.clip(model, 1.0)
        optim.update(optimizer, 1e-2)
        optimizer.zero_grad(set_to_none=True)
    return optimizer


def write(directory, step, keep=2, state=None):
    model = policy()
    critic = value_model_from(model)
    optimizers = {"policy": stepped(model), "critic": stepped(critic)}
    state = state or {"identity": {"data": "a", "options": {"beta": 0.1}}}
    path = checkpoint.save_checkpoint(
        directory, step, Learner(model, critic), tokenizer(), optimizers, state, keep, ALONE
    )
    return path, optimizers


def test_optimizer_states_come_back_bit_for_bit(tmp_path):
    path, saved = write(tmp_path, 3)
    model = policy()
    critic = value_model_from(model)
    fresh = {
        name: optim.make_optimizer(m, 1e-2, 0.1, (0.9, 0.99), 1e-8)
        for name, m in {"policy": model, "critic": critic}.items()
    }
    checkpoint.load_optimizers(path, fresh, Learner(model, critic))
    for name in saved:
        before, after = (checkpoint.optimizer_tensors({name: o[name]}) for o in (saved, fresh))
        assert before.keys() == after.keys() and before
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_average_of_an_implicit_value_model_comes_back_with_its_tied_weights(tmp_path):
    def made(seed):
        model = policy(seed)
        model.tie_weights()
        parts = [implicit_value_from(model, [0.0, 1.0], 0.5, "a") for _ in range(2)]
        return Learner(model, parts[0], target=parts[1])

    learner, other = made(0), made(1)
    assert learner.policy.get_output_embeddings().weight is learner.policy.get_input_embeddings().weight
    state = {"counters": {}, "identity": {}}
    checkpoint.save_checkpoint(tmp_path, 1, learner, tokenizer(), {}, state, 1, ALONE)
    checkpoint.load_models(tmp_path / "checkpoint-1", other)
    expected = learner.target.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in other.target.state_dict().items())


def test_old_checkpoints_are_deleted_and_partial_ones_are_not_seen(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step)
    (tmp_path / ".checkpoint-11.partial").mkdir()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_a_checkpoint_holds_no_pickle(tmp_path):
    path, _ = write(tmp_path, 1)
    suffixes = {p.suffix for p in path.rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja"}


def test_what_differs_from_the_checkpoint_is_listed(tmp_path):
    path, _ = write(tmp_path, 1)
    checkpoint.check_same_run(path, {"data": "a", "options": {"beta": 0.1}})
    with pytest.raises(UserError, match=r"data: a then, b now\n  option beta: 0.1 then, 0.3 now"):
        checkpoint.check_same_run(path, {"data": "b", "options": {"beta": 0.3}})
