import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from dqo.models import decoding, generate
from dqo.models.generate import Request, Sampling, in_order
from tests.dqo import packing_models

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 4], [9, 3, 17, 4], [6, 6]]
ROWS_LEAVE = ["llama", "qwen2", "qwen2 with a window", "gemma2", "gemma3", "gpt_oss", "gpt2", "bloom"]


def mamba():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
    return MambaForCausalLM(MambaConfig(**sizes)).eval()


def responses(model, leave, monkeypatch, prompts=PROMPTS, count=6, **sampling):
    """Of `count` requests a prompt: the responses, and how many positions the model computed for them."""
    computed = []
    hook = model.register_forward_pre_hook(
        lambda module, arguments, inputs: computed.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    requests = [Request(prompt, (i, k)) for i, prompt in enumerate(prompts) for k in range(count)]
    settings = Sampling(**{"max_new_tokens": 14} | sampling)
    with monkeypatch.context() as patch:
        if not leave:
            patch.setattr(generate, "rows_can_leave", lambda *_: False)
        found = in_order(generate.generate(model, requests, settings, stop_ids=[2, 5], pad_id=0, quiet=True))
    hook.remove()
    return found, sum(computed)


def assert_same(found, expected):
    assert [r.ids for r in found] == [r.ids for r in expected]
    for one, other in zip(found, expected):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4) and one.ended == other.ended


@pytest.mark.parametrize("name", ROWS_LEAVE)
def test_responses_are_those_of_a_batch_that_keeps_all_rows_and_less_is_computed(name, monkeypatch):
    model = packing_models.model(name)
    assert decoding.rows_can_leave(model, PROMPTS[0], 0)
    for sampling in ({}, {"temperature": 0.0}):
        expected, before = responses(model, False, monkeypatch, **sampling)
        found, after = responses(model, True, monkeypatch, **sampling)
        assert_same(found, expected)
        ended = sum(r.ended for r in found)
        assert after < (0.75 if ended > 6 else 0.8) * before  # where few end, equal prompts are read once all the same


@pytest.mark.parametrize("made", [mamba, lambda: packing_models.model("lfm2")])
def test_a_model_with_recurrent_states_keeps_its_rows(made, monkeypatch):
    model = made()
    assert not decoding.rows_can_leave(model, PROMPTS[0], 0)
    expected, before = responses(model, False, monkeypatch)
    found, after = responses(model, True, monkeypatch)
    assert_same(found, expected)
    assert after == before + len(PROMPTS[0])  # what it takes to see that they cannot leave


def test_a_prompt_of_one_token_and_prompts_that_differ_are_read_as_they_are(monkeypatch):
    model = packing_models.model("llama")
    for prompts, count in (([[7], [8, 9, 4]], 3), (PROMPTS, 1), ([PROMPTS[0]], 8)):
        expected, _ = responses(model, False, monkeypatch, prompts, count)
        assert_same(responses(model, True, monkeypatch, prompts, count)[0], expected)
