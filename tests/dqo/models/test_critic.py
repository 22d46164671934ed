import pytest
import torch
from transformers import AutoModelForTokenClassification, OPTConfig, OPTForCausalLM

from benchmarks.trainer.small_models import small_model
from dqo.data.batches import collate
from dqo.errors import UserError
from dqo.models.critic import ValueHead, load_critic, make_value_model, save_value_model, value_model_from, value_rows
from dqo.models.policy import hidden_positions, ready
from dqo.objectives import DQO
from dqo.train.learner import Learner, objective_sums, update_target
from tests.dqo.helpers import episodes, gpt2, gradients, policy


@pytest.mark.parametrize("make", [policy, gpt2])
def test_a_new_value_model_says_zero_and_shares_the_trunk(make):
    model = make()
    value_model = value_model_from(model)
    values, end_values = value_rows(value_model, collate(episodes(4), 0))
    assert not values.any() and not end_values.any()
    for mine, theirs in zip(value_model.base_model.parameters(), model.base_model.parameters()):
        assert torch.equal(mine, theirs) and mine is not theirs


def test_a_saved_value_model_loads_in_plain_transformers(tmp_path):
    value_model = value_model_from(policy())
    torch.nn.init.normal_(value_model.score.weight)
    value_model.save_pretrained(tmp_path)
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    assert plain.config.num_labels == 1
    assert torch.allclose(plain.eval()(ids).logits, value_model.eval()(ids).logits, atol=1e-6)
    assert torch.equal(load_critic(tmp_path)(ids).logits, value_model(ids).logits)  # bit for bit, as resuming needs


def narrow_opt():
    """Hidden states that are narrower than the layers, as those of OPT 350M."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "word_embed_proj_dim": 8,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return ready(OPTForCausalLM(OPTConfig(vocab_size=20, max_position_embeddings=32, pad_token_id=0, **sizes)), "cpu")


def test_a_head_reads_hidden_states_of_another_width_than_the_layers():
    model, batch = narrow_opt(), collate(episodes(4), 0)
    values, _ = value_rows(make_value_model("head", model), batch, hidden_positions(model, batch))
    assert values.shape == batch.actions.shape
    with pytest.raises(UserError, match="hidden states of width 8 here.*reads 16; use --value_model head"):
        make_value_model("separate", model)


# Classes of which transformers has no token classification, or only within a model of several parts.
WITHOUT_CLASS = [
    "gemma3",
    "gemma3_text",
    "gemma4_text",
    "qwen3_5",
    "olmo2",
    "olmo3",
    "granite",
    "llama4",
    "lfm2",
    "falcon_h1",
]


SLOW = ["gemma4_text", "qwen3_5", "falcon_h1", "mamba2", "afmoe"]  # to build and to run
QUICK = [name for name in [*WITHOUT_CLASS, "opt"] if name not in SLOW]


@pytest.mark.parametrize("model_type", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_trunk_has_a_value_model_that_loads_again(model_type, tmp_path):
    model = ready(small_model(model_type), "cpu")
    value_model, batch = value_model_from(model), collate(episodes(4), 0)
    assert not value_rows(value_model, batch)[0].any() and not value_model.training
    assert torch.equal(hidden_positions(value_model, batch), hidden_positions(model, batch))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in value_model.parameters()}
    torch.nn.init.normal_(value_model.score.weight)
    save_value_model(value_model, value_model.state_dict(), tmp_path)
    again = load_critic(tmp_path)
    assert type(again).__name__ == type(value_model).__name__ and type(again).__name__.endswith(
        "ForTokenClassification"
    )
    for one, two in zip(value_rows(again, batch), value_rows(value_model, batch)):
        assert torch.equal(one, two) and one.any()
    value_rows(again, batch)[0].sum().backward()
    assert gradients(again.base_model).any()


def test_a_decoder_that_is_no_model_of_its_own_is_refused():
    with pytest.raises(UserError, match="no model of BartDecoderWrapper alone.*--value_model head"):
        value_model_from(ready(small_model("bart"), "cpu"))


def test_a_critic_without_a_head_is_refused(tmp_path):
    policy().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="score.weight.*refusing to start from a random head"):
        load_critic(tmp_path)


def test_a_new_value_head_says_zero_and_sends_no_gradient_to_the_policy():
    model, batch = policy(), collate(episodes(4), 0)
    head = make_value_model("head", model)
    values, _ = value_rows(head, batch, hidden_positions(model, batch))
    assert not values.any()
    (values - 1.0).square().sum().backward()
    assert gradients(head).abs().max() > 0
    assert gradients(model).abs().max() == 0


def test_a_value_head_learns_and_comes_back_from_its_file(tmp_path):
    model, batch = policy(), collate(episodes(8), 0)
    head = make_value_model("head", model)
    target = torch.randn(batch.actions.shape, generator=torch.Generator().manual_seed(0))
    hidden = hidden_positions(model, batch).detach()
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (value_rows(head, batch, hidden)[0] - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    save_value_model(head, head.state_dict(), tmp_path)
    again = load_critic(tmp_path)
    assert isinstance(again, ValueHead)
    assert torch.equal(value_rows(again, batch, hidden)[0], value_rows(head, batch, hidden)[0])


def test_targets_come_from_the_moving_average():
    objective, model, batch = DQO(lam=0.0, is_level="none", target_ema=0.9), policy(), collate(episodes(6), 0)
    live, target = value_model_from(model), value_model_from(model)
    torch.nn.init.normal_(live.score.weight)
    torch.nn.init.normal_(target.score.weight)
    with_target = objective_sums(Learner(model, live, target=target), objective, batch)[0]
    without = objective_sums(Learner(model, live), DQO(lam=0.0, is_level="none"), batch)[0]
    assert not torch.allclose(with_target, without)
    target.load_state_dict(live.state_dict())
    assert torch.allclose(objective_sums(Learner(model, live, target=target), objective, batch)[0], without, rtol=1e-6)


def test_the_moving_average_moves_by_its_decay():
    model = policy()
    live, target = value_model_from(model), value_model_from(model)
    torch.nn.init.ones_(live.score.weight)
    learner = Learner(model, live, target=target)
    update_target(learner, 0.9)
    assert torch.allclose(target.score.weight, torch.full_like(target.score.weight, 0.1))
    assert not any(p.requires_grad for p in target.parameters())
