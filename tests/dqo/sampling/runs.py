"""Options and rows of a small run of dqo sample, for its tests."""

import json

import pytest

from dqo.config.sampling import SampleConfig

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
