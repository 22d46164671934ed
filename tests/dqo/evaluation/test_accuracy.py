import pytest
import torch

from dqo.evaluation.accuracy import Problem, evaluate
from dqo.grading.grade import Grade
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


def empty_is_right(completions, rows):
    assert all(row == {"prompt": "1+2="} for row in rows)
    return [Grade(float(text == ""), parsed=text != "?") for text in completions]


def found(model, **changes):
    settings = {"num_generations": 2, "max_new_tokens": 3, "seed": 0, "quiet": True} | changes
    return evaluate(model, TOKENIZER, [Problem(PROMPT, {"prompt": "1+2="})], empty_is_right, **settings)


@pytest.mark.parametrize("end", [2, 7])
def test_an_end_of_the_generation_config_ends_an_answer_and_is_not_graded(end):
    model = biased(end)
    model.generation_config.eos_token_id = [7, 8]
    model.generation_config.min_new_tokens = 3
    result = found(model)
    assert result.scores() == {"greedy": [1], "sampling": [[1, 1]]}
    assert [answered.text for answered in result.greedy] == [""]
    assert [what["share"] for what in result.unread().values()] == [0, 0]


def test_an_answer_without_an_end_is_wrong_and_was_not_read():
    result = found(biased(7))
    assert result.scores() == {"greedy": [0], "sampling": [[0, 0]]}
    assert result.greedy[0].text == TOKENIZER.decode([7, 7, 7])
    lost = result.unread()["sampling"]
    assert (lost["share"], lost["cut"], lost["of"]) == (1, 1, 2)
    assert lost["examples"][0]["response"] == TOKENIZER.decode([7, 7, 7])
