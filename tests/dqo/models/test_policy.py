import pytest
import torch

from dqo.data.batches import collate
from dqo.errors import UserError
from dqo.models.architecture import disable_dropout
from dqo.models.fitness import check_head
from dqo.models.named import load_tokenizer
from dqo.models.new import save
from dqo.models.policy import load_policy, policy_stats, weights_hash
from tests.dqo.helpers import episodes, gpt2, policy, tokenizer


@pytest.mark.parametrize("make", [policy, gpt2])
def test_row_statistics_equal_those_of_the_models_own_logits_episode_by_episode(make):
    model, members = make().eval(), episodes(6)
    stats = policy_stats(model, collate(members, 0))
    expected = []
    for e in members:
        logits = model(torch.tensor([e.prompt_ids + e.completion_ids])).logits[0, :-1].log_softmax(-1)
        actions = torch.tensor(e.completion_ids)
        expected.append(logits[len(e.prompt_ids) - 1 :].gather(-1, actions[:, None])[:, 0])
    assert torch.allclose(stats.logprobs, torch.cat(expected), atol=1e-5)


def test_training_mode_is_deterministic_because_dropout_is_off():
    model = disable_dropout(gpt2()).train()
    batch = collate(episodes(4), 0)
    assert torch.equal(policy_stats(model, batch).logprobs, policy_stats(model, batch).logprobs)


def test_a_model_that_scales_its_logits_is_refused():
    class Scaled(type(policy())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    with pytest.raises(UserError, match="more to its logits"):
        check_head(Scaled(policy().config), [4, 5, 6])


def test_the_hash_follows_every_parameter():
    model = policy()
    before = weights_hash(model)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    assert weights_hash(model) != before == weights_hash(policy())


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_policy(str(tmp_path / "a" / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        load_tokenizer(str(tmp_path / "a" / "nowhere"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("way", ["emptied", "cut", "braces", "list", "zeros"])
def test_a_damaged_file_of_a_model_is_one_line(name, way, tmp_path):
    save(policy(), tokenizer(), tmp_path)
    content = (tmp_path / name).read_bytes()
    others = {"emptied": b"", "cut": content[: len(content) // 2], "braces": b"{}", "list": b"[]", "zeros": bytes(99)}
    (tmp_path / name).write_bytes(others[way])
    with pytest.raises(UserError, match=f"{tmp_path}"):
        load_tokenizer(str(tmp_path))
        load_policy(str(tmp_path))


def test_the_character_tokenizer_round_trips(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "1+2*3=\n#9"
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert len(loaded(text)["input_ids"]) == len(text)
