import torch

from dqo.sample import generate
from tests.dqo.helpers import policy, tokenizer

TOKENIZER = tokenizer()
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("1+2=", "7*8-3=", "5-5=")]


def answers(**options):
    settings = {"eos_id": 2, "pad_id": 0, "max_new_tokens": 6, "quiet": True} | options
    return generate(policy(), PROMPTS, **settings)


def test_greedy_tokens_are_the_argmax_of_the_model_without_padding():
    model = policy()
    for prompt, (response,) in zip(PROMPTS, answers(temperature=0.0)):
        ids = list(prompt)
        for token in response.ids:
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(token)


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
        model, [PROMPTS[0]], eos_id=2, pad_id=0, num_generations=4000, max_new_tokens=1, batch_size=4000, quiet=True
    )
    counts = torch.bincount(torch.tensor([r.ids[0] for r in found[0]]), minlength=19)
    expected = 4000 * probabilities
    assert ((counts - expected).square() / expected).sum() < 50


def test_the_seed_decides_the_samples():
    assert answers(seed=1) == answers(seed=1)
    assert answers(seed=1, num_generations=8) != answers(seed=2, num_generations=8)
