"""Options and rows of a small run of dqo sample, for its tests."""

import json
import os
import signal

import pytest

from dqo.config.sampling import SampleConfig
from dqo.sampling import backends

PROMPTS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in (1, 23) for b in (4, 5, 6)]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}{{ tools | length }}{% endif %}"
TEMPLATE += "{% if add_generation_prompt %}{{ '=' if plain else '+' }}{% endif %}"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(model, tmp_path, rows=None, **changes):
    given = {
        "model_name_or_path": str(model),
        "prompts": write(tmp_path / "prompts.jsonl", rows or PROMPTS),
        "output_file": str(tmp_path / "rollouts.jsonl"),
        "num_generations": 3,
        "max_completion_length": 8,
        "batch_size": 4,
    }
    return SampleConfig(**given | changes)


def rows_of(path):
    return [json.loads(line) for line in open(path)]


def by_key(path):
    """{key: row without log-probabilities}, and {key: log-probabilities}."""
    rows = {tuple(row["sampling"]["key"]): row for row in rows_of(path)}
    assert len(rows) == len(rows_of(path))
    return {key: {**row, "logprobs": None} for key, row in rows.items()}, {
        k: row["logprobs"] for k, row in rows.items()
    }


def same_rows(one, other):
    (first, numbers), (second, others) = by_key(one), by_key(other)
    assert first == second
    for key in numbers:
        assert numbers[key] == pytest.approx(others[key], abs=1e-5)


def stopping(real, after, stop):
    """The responses of `real`, and then `stop()` in place of the next one."""

    def generate(*arguments, **more):
        for number, pair in enumerate(real(*arguments, **more)):
            if number == after:
                stop()
            yield pair

    return generate


STOPPED_AFTER = 15


def sample_and_stop():
    """The command `dqo ...` in a process that is stopped after so many responses, and ends when it is killed."""
    from dqo.commands.base import main

    backends.generate = stopping(backends.generate, STOPPED_AFTER, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    main()


def whole_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0
