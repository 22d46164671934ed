import pytest
import torch
from transformers import GenerationConfig, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from dqo.errors import UserError
from dqo.models.decoding import without_generation_config
from dqo.models.generate import Request, Sampling, generate, in_order
from tests.dqo.helpers import policy, tokenizer

TOKENIZER = tokenizer()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("1+2=", "7*8-3=", "5-5=")]


def responses(model, prompts, count=1, stop_ids=(2,), batch_size=8, **sampling):
    """By prompt: `count` responses each."""
    requests = [Request(prompt, (i, k)) for i, prompt in enumerate(prompts) for k in range(count)]
    settings = Sampling(**{"max_new_tokens": 6} | sampling)
    found = in_order(
        generate(model, requests, settings, stop_ids=stop_ids, pad_id=0, batch_size=batch_size, quiet=True)
    )
    return [found[i : i + count] for i in range(0, len(found), count)]


def answers(count=1, **options):
    return responses(policy(), PROMPTS, count, **options)


def ids_of(found):
    return [[response.ids for response in many] for many in found]


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
    settings = {"max_new_tokens": 12, "temperature": 0.0}
    alone = [responses(model, [prompt], **settings)[0] for prompt in prompts]
    assert ids_of(responses(model, prompts, **settings)) == ids_of(alone)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}])
def test_a_response_depends_on_neither_the_batch_nor_the_other_requests(sampling):
    expected = answers(5, batch_size=1, max_new_tokens=12, **sampling)
    for size in (3, 7, 100):
        found = answers(5, batch_size=size, max_new_tokens=12, **sampling)
        assert ids_of(found) == ids_of(expected)
        for one, other in zip(sum(found, []), sum(expected, [])):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    alone = responses(policy(), PROMPTS[:1], 2, max_new_tokens=12, **sampling)
    assert ids_of(alone)[0] == ids_of(expected)[0][:2]


def test_responses_are_given_as_batches_end_with_the_indices_of_their_requests():
    requests = [Request(PROMPTS[i % 3], (i,)) for i in range(7)]
    found = list(generate(policy(), requests, Sampling(), stop_ids=[2], pad_id=0, batch_size=2, quiet=True))
    assert sorted(index for index, _ in found) == list(range(7)) != [index for index, _ in found]  # sorted by length
    first = next(generate(policy(), requests, Sampling(), stop_ids=[2], pad_id=0, batch_size=1, quiet=True))
    assert first == found[0]


@pytest.mark.parametrize("temperature, top_k, top_p", [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.6, 0, 1.0), (1.3, 6, 0.8)])
def test_logprobs_are_those_of_a_full_forward_under_the_warped_distribution(temperature, top_k, top_p):
    model = policy()
    found = answers(4, temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=12)
    for prompt, many in zip(PROMPTS, found):
        for response in many:
            logits = model(torch.tensor([prompt + response.ids])).logits[0, len(prompt) - 1 : -1]
            expected = warped(logits.detach(), temperature, top_k, top_p).gather(1, torch.tensor(response.ids)[:, None])
            assert response.logprobs == pytest.approx(expected[:, 0].tolist(), abs=1e-5)


def warped(logits, temperature, top_k, top_p):
    """Log-probabilities of (T, V), by hand: greedy responses have those of the model."""
    probabilities = (logits.double() / (temperature or 1.0)).softmax(-1)
    if top_k:
        probabilities[probabilities < probabilities.topk(top_k).values[:, -1:]] = 0.0
        probabilities /= probabilities.sum(-1, keepdim=True)
    for row in probabilities if top_p < 1 else ():
        order = row.argsort(descending=True)
        kept = int((row[order].cumsum(0) < top_p).sum()) + 1
        row[order[kept:]] = 0.0
    return (probabilities / probabilities.sum(-1, keepdim=True)).log()


def test_a_response_has_ended_exactly_when_its_last_token_is_eos():
    for response in (r for found in answers(50, max_new_tokens=12) for r in found):
        assert response.ended == (response.ids[-1] == 2)
        assert 2 not in response.ids[:-1]
        assert response.ended or len(response.ids) == 12


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 8, 0.95)])
def test_samples_follow_the_distribution(temperature, top_k, top_p):
    # 4,000 first tokens against the exact probabilities: chi-square of at most 18 degrees of freedom is below 50 (p = 7e-5)
    model = policy()
    logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1:].detach()
    probabilities = warped(logits, temperature, top_k, top_p)[0].exp()
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": 1}
    found = responses(model, [PROMPTS[0]], 4000, batch_size=4000, **settings)[0]
    counts = torch.bincount(torch.tensor([response.ids[0] for response in found]), minlength=19)
    expected = 4000 * probabilities
    assert counts[expected == 0].sum() == 0
    assert ((counts - expected).square() / expected)[expected > 0].sum() < 50


def test_the_seed_decides_the_samples():
    assert answers(seed=1) == answers(seed=1)
    assert answers(8, seed=1) != answers(8, seed=2)


def test_the_global_generator_of_torch_is_neither_used_nor_moved():
    model = policy()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = responses(model, PROMPTS, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert responses(model, PROMPTS, 4) == found


def test_a_model_whose_logits_are_not_finite_is_refused():
    model = policy()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="the model's logits are not finite"):
            responses(model, PROMPTS, temperature=temperature)


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
        assert responses(model, PROMPTS, temperature=temperature) == answers(temperature=temperature)
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
    found = [r for many in answers(50, stop_ids=[2, 5, 7], max_new_tokens=12) for r in many]
    assert {r.ids[-1] for r in found if r.ended} == {2, 5, 7}
    for response in found:
        assert not {2, 5, 7} & set(response.ids[:-1])
        assert response.ended == (response.ids[-1] in (2, 5, 7))
