"""The model that is sampled."""

import pytest

from dqo.models.new import save
from tests.dqo.helpers import policy, tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "model"
    save(policy(), tokenizer(), path)
    return path
