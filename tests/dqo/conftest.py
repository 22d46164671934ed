import json

import pytest

from dqo.models.new import save
from tests.dqo.helpers import policy, rollout_rows, tokenizer


@pytest.fixture
def files(tmp_path):
    """A directory with a tiny model in model/ and its rollouts in rollouts.jsonl."""
    save(policy(), tokenizer(), tmp_path / "model")
    lines = [json.dumps(row) for row in rollout_rows(prompts=12, samples=4)]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(lines))
    return tmp_path
