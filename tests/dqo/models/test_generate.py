import pytest
import torch
from transformers import GenerationConfig, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from dqo.models.generate import generate, without_generation_config
from tests.dqo.helpers import policy, tokenizer

TOKENIZER = tokenizer()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("1+2=", "7*8-3=", "5-5=")]


def answers(**options):
    settings = {"stop_ids": [2], "pad_id": 0, "max_new_tokens": 6, "quiet": True} | options
    return generate(policy(), PROMPTS, **settings)


def test_greedy_tokens_are_the_argmax_of_the_model_without_padding():
    model = policy()
    for prompt, (response,) in zip(PROMPTS, answers(temperature=0.0)):
        ids = list(prompt)
        for token in response.ids:
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(token)


def test_a_recurrence_that_takes_padding_in_is_given_none():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "lru_width": 32,
    }
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(vocab_size=20, attention_window_size=8, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 4], [9, 3, 17]]
    settings = {"stop_ids": [2], "pad_id": 0, "max_new_tokens": 12, "quiet": True, "temperature": 0.0}
    assert generate(model, prompts, **settings) == [generate(model, [prompt], **settings)[0] for prompt in prompts]


def test_every_prompt_gets_its_own_responses_whatever_the_batch_size():
    one, many = answers(temperature=0.0, batch_size=1), answers(temperature=0.0, batch_size=8)
    assert one == many
    assert [len(found) for found in answers(num_generations=4)] == [4, 4, 4]


def test_a_response_has_ended_exactly_when_its_last_token_is_eos():
    for response in (r for found in answers(num_generations=50, max_new_tokens=12) for r in found):
        assert response.ended == (response.ids[-1] == 2)
        assert 2 not in response.ids[:-1]
        assert response.ended or len(response.ids) == 12


def test_samples_follow_the_whole_distribution():
    # 4,000 first tokens against the model's own probabilities: chi-square with 18 degrees of freedom stays below 50 (p = 7e-5)
    model = policy()
    probabilities = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    found = generate(
        model, [PROMPTS[0]], stop_ids=[2], pad_id=0, num_generations=4000, max_new_tokens=1, batch_size=4000, quiet=True
    )
    counts = torch.bincount(torch.tensor([r.ids[0] for r in found[0]]), minlength=19)
    expected = 4000 * probabilities
    assert ((counts - expected).square() / expected).sum() < 50


def test_the_seed_decides_the_samples():
    assert answers(seed=1) == answers(seed=1)
    assert answers(seed=1, num_generations=8) != answers(seed=2, num_generations=8)


OF_ITS_KIND = {  # of fields where 3 would be of no kind, or would disturb nothing
    "suppress_tokens": [3, 4, 5],
    "begin_suppress_tokens": [3, 4, 5],
    "bad_words_ids": [[3], [4]],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "sequence_bias": [[[3], 10.0]],
    "exponential_decay_length_penalty": (1, 5.0),
    "eos_token_id": [3, 4, 5, 6],
    "pad_token_id": 5,
    "stop_strings": ["1"],
    "cache_implementation": "static",
    "max_length": 5,
    "min_length": 30,
    "min_new_tokens": 6,
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 5.0,
    "temperature": 9.0,
    "max_time": 1e-9,
    "use_cache": False,
    "guidance_scale": 3.0,
    "penalty_alpha": 0.6,
    "watermarking_config": {"bias": 9.0, "seeding_scheme": "lefthash"},
}
FIELDS = [name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_no_field_of_the_models_generation_config_reaches_our_answers(name):
    model = policy()
    setattr(model.generation_config, name, OF_ITS_KIND.get(name, 3))
    before = model.generation_config.to_dict()
    for temperature in (0.0, 1.0):
        settings = {"stop_ids": [2], "pad_id": 0, "max_new_tokens": 6, "quiet": True, "temperature": temperature}
        assert generate(model, PROMPTS, **settings) == answers(temperature=temperature)
    assert model.generation_config.to_dict() == before


def test_the_rules_above_would_change_the_answers_of_transformers_own_generate():
    model = policy()
    ids = torch.tensor(PROMPTS[:1])
    plain = model.generate(ids, do_sample=False, max_new_tokens=6).tolist()
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.suppress_tokens = plain[0][-6:]
    assert model.generate(ids, do_sample=False, max_new_tokens=6).tolist() != plain


def test_the_generation_config_is_there_again_after_an_error_and_is_saved_as_it_was(tmp_path):
    model = policy()
    model.generation_config.repetition_penalty, own = 1.5, model.generation_config
    with pytest.raises(RuntimeError), without_generation_config(model):
        assert model.generation_config.repetition_penalty is None
        raise RuntimeError
    assert model.generation_config is own
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).repetition_penalty == 1.5


def test_a_response_ends_at_the_first_of_the_stop_ids():
    found = [r for many in answers(stop_ids=[2, 5, 7], num_generations=50, max_new_tokens=12) for r in many]
    assert {r.ids[-1] for r in found if r.ended} == {2, 5, 7}
    for response in found:
        assert not {2, 5, 7} & set(response.ids[:-1])
        assert response.ended == (response.ids[-1] in (2, 5, 7))
