"""Rows, files and messages that the tests of rows share."""

import json

import pytest

from dqo.data.rows import read_rows
from dqo.errors import UserError

GOOD = {"prompt": "2+3*4=", "completion": "3*4=12\n2+12=14\n#14", "reward": 1.0}
OTHER = {"prompt": "1+1=", "completion": "#3", "reward": 0.0}
USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
IDS = {"prompt_ids": [1, 2], "completion_ids": [3, 4, 5], "logprobs": [-0.1, -0.2, -0.3]}


def write(folder, *lines, name="rollouts.jsonl"):
    """The path of a file of dicts (as JSON, NaN and Infinity too) and strings (as they are), one a line."""
    path = folder / name
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def refusal(source, **options) -> str:
    """What `read_rows` says against a source."""
    with pytest.raises(UserError) as caught:
        read_rows(source, **options)
    return str(caught.value)


def says(message: str, *parts: str) -> None:
    """Checks that a message has all parts; " ... " in one stands for any text."""
    missing = [part for given in parts for part in given.split(" ... ") if part not in message]
    assert not missing, f"{missing} not in: {message}"
