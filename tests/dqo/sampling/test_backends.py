import pytest

from dqo.errors import UserError
from dqo.models.generate import Request, Sampling, in_order
from dqo.models.new import save
from dqo.sampling.backends import load_backend
from tests.dqo.helpers import policy, tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save(policy(), tokenizer(), path)
    return str(path)


def test_transformers_answers_with_the_models_own_tokenizer_and_ends(model):
    backend = load_backend("transformers", model, batch_size=2)
    requests = [Request(backend.tokenizer(text)["input_ids"], (text,)) for text in ("1+2=", "7*8-3=", "5-5=")]
    found = in_order(backend.generate(requests, Sampling(max_new_tokens=9), quiet=True))
    assert len(found) == 3 and all(len(r.ids) == len(r.logprobs) for r in found)
    assert backend.ends.stops == {2} and backend.record["backend"] == "transformers"


def test_an_unknown_backend_is_refused(model):
    with pytest.raises(
        UserError, match="unknown backend 'transformer'; known: transformers.* Did you mean 'transformers'"
    ):
        load_backend("transformer", model)
