import pytest
import torch

from dqo.evaluation.accuracy import Problem, evaluate
from tests.dqo.helpers import policy, tokenizer

TOKENIZER = tokenizer()
PROMPT = TOKENIZER("1+2=")["input_ids"]


def biased(token):
    """A policy that always answers with `token`."""
    model = policy()
    head = torch.nn.Linear(16, 19)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[token] = 50.0
    model.lm_head = head
    model.generation_config._from_model_config = False
    return model


def found(model, **changes):
    problem = Problem("1+2=", PROMPT, lambda text: text == "")
    settings = {"num_generations": 2, "max_new_tokens": 3, "seed": 0, "quiet": True} | changes
    return evaluate(model, TOKENIZER, [problem], **settings)


@pytest.mark.parametrize("end", [2, 7])
def test_an_end_of_the_generation_config_ends_an_answer_and_is_not_graded(end):
    model = biased(end)
    model.generation_config.eos_token_id = [7, 8]
    model.generation_config.min_new_tokens = 3
    result = found(model)
    assert (result.greedy, result.sampling, result.greedy_texts) == ([1], [[1, 1]], [""])


def test_an_answer_without_an_end_is_wrong():
    result = found(biased(7))
    assert (result.greedy, result.sampling) == ([0], [[0, 0]])
    assert result.greedy_texts == [TOKENIZER.decode([7, 7, 7])]
