import json
import shutil

import pytest

from dqo.models.new import save
from tests.dqo.helpers import policy, rollout_rows, tokenizer


@pytest.fixture
def files(tmp_path, tmp_path_factory):
    """A directory with a tiny model in model/ and its rollouts in rollouts.jsonl."""
    made = tmp_path_factory.getbasetemp() / "files"  # once for all tests
    if not made.exists():
        save(policy(), tokenizer(), made / "model")
        lines = [json.dumps(row) for row in rollout_rows(prompts=12, samples=4)]
        (made / "rollouts.jsonl").write_text("\n".join(lines))
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)
