"""Searches against enumeration: a beam as wide as the tree finds the true best, and steps end where they should."""

from itertools import product

import pytest
import torch

from dqo.evaluation.search import beam_search, separating_ids, step_search
from dqo.models.generate import Request, Sampling
from dqo.models.new import character_tokenizer, new_llama
from dqo.models.policy import ready

TOKENIZER = character_tokenizer("ab\n")  # 6 tokens: pad, bos, eos, a, b, line end
EOS, LINE = 2, 5
DEPTH = 3


def model(seed=0, spread=1.0):
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 64}
    return ready(new_llama(TOKENIZER, **sizes, initializer_range=spread, seed=seed), "cpu")


def log_likelihoods(policy, prompt, many):
    rows = torch.tensor([prompt + ids + [0] * (DEPTH - len(ids)) for ids in many])
    with torch.no_grad():
        logprobs = policy(rows).logits.log_softmax(-1)[:, len(prompt) - 1 : -1]
    of_tokens = logprobs.gather(-1, rows[:, len(prompt) :, None])[..., 0]
    return [row[: len(ids)].sum().item() for row, ids in zip(of_tokens, many)]


def responses():
    """Every response of at most DEPTH tokens: with the end token last, or of DEPTH tokens without one."""
    others = [token for token in range(len(TOKENIZER)) if token != EOS]
    for length in range(DEPTH):
        yield from ([*ids, EOS] for ids in product(others, repeat=length))
    yield from (list(ids) for ids in product(others, repeat=DEPTH))


def beams(policy, prompts, width, **changes):
    settings = {"max_new_tokens": DEPTH, "stop_ids": [EOS], "pad_id": 0, "quiet": True} | changes
    return dict(beam_search(policy, prompts, width=width, **settings))


@pytest.mark.parametrize("seed", range(4))
def test_a_beam_as_wide_as_the_tree_finds_the_most_probable_response(seed):
    policy = model(seed)
    prompts = [[1, 3], [1, 4, 3], [1, 5]]
    found = beams(policy, prompts, len(TOKENIZER) ** DEPTH)
    for i, prompt in enumerate(prompts):
        every = list(responses())
        score, best = max(zip(log_likelihoods(policy, prompt, every), every))
        assert found[i].ids == best
        assert found[i].ended == (best[-1] == EOS)
        assert found[i].score == pytest.approx(score, abs=1e-4)


def test_the_seeds_above_have_short_and_long_best_responses():
    kinds = {beams(model(seed), [[1, 3]], 216)[0].ended for seed in range(4)}
    assert kinds == {True, False}


def test_a_narrow_beam_finds_no_better_one_and_its_own_score():
    for seed in range(4):
        policy = model(seed)
        narrow, wide = (beams(policy, [[1, 3]], width)[0] for width in (2, 216))
        assert narrow.score <= wide.score + 1e-5
        assert narrow.score == pytest.approx(*log_likelihoods(policy, [1, 3], [narrow.ids]), abs=1e-4)


def test_the_models_own_generation_config_does_not_matter():
    policy = model(1)
    before = beams(policy, [[1, 3]], 8)
    policy.generation_config.length_penalty = 5.0
    policy.generation_config.repetition_penalty = 5.0
    assert beams(policy, [[1, 3]], 8) == before


def test_a_separator_is_in_the_text_of_a_token():
    assert separating_ids(TOKENIZER, "\n") == {LINE}
    assert separating_ids(TOKENIZER, "a") == {3}


TARGET = [3, LINE, 4, LINE, 3, EOS]


def agreement(episodes):
    """How many tokens from the first on are TARGET's, less those that are not."""
    found = []
    for episode in episodes:
        ids = episode.completion_ids
        same = next((t for t, (a, b) in enumerate(zip(ids, TARGET)) if a != b), min(len(ids), len(TARGET)))
        found.append(2.0 * same - len(ids))
    return found


def steps(policy, score, **changes):
    settings = {"beams": 4, "samples": 250, "separators": [LINE], "stop_ids": [EOS], "pad_id": 0, "batch_size": 512}
    sampling = Sampling(max_new_tokens=len(TARGET))
    return step_search(
        policy, [Request([1, 3], ("x", 0)), Request([1, 4], ("x", 1))], score, sampling, **settings | changes
    )


def test_the_search_by_steps_reaches_the_response_that_the_score_wants():
    found = steps(model(spread=0.01), agreement)  # nearly uniform
    assert [best.ids for best in found] == [TARGET, TARGET]
    assert all(best.ended and best.score == len(TARGET) for best in found)


def test_what_is_scored_are_whole_steps_once_each_and_no_longer_than_allowed():
    seen = []

    def score(episodes):
        seen.append(episodes)
        return agreement(episodes)

    steps(model(spread=0.01), score, samples=20)
    assert len(seen) > 1
    for episodes in seen:
        keys = [(tuple(e.prompt_ids), tuple(e.completion_ids)) for e in episodes]
        assert len(set(keys)) == len(keys)
        for episode in episodes:
            ids = episode.completion_ids
            assert ids[-1] in (LINE, EOS) or len(ids) == len(TARGET)
            assert episode.terminated == (ids[-1] == EOS)
            assert EOS not in ids[:-1] and len(ids) <= len(TARGET)


def test_a_search_depends_neither_on_its_neighbours_nor_on_the_batch():
    policy = model(spread=0.01)
    both = steps(policy, agreement, samples=5)
    sampling = Sampling(max_new_tokens=len(TARGET))
    settings = {"beams": 4, "samples": 5, "separators": [LINE], "stop_ids": [EOS], "pad_id": 0, "batch_size": 3}
    (alone,) = step_search(policy, [Request([1, 4], ("x", 1))], agreement, sampling, **settings)
    assert alone == both[1]
