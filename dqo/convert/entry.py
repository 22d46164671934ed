"""Published data -> rollout files. Each file of this folder that has a table FORMATS is a family of formats."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dqo.convert.gsm8k import without_annotations
from dqo.convert.source import Converted
from dqo.data.rows import Row, prompt_key, read_rows, write_rows
from dqo.errors import UserError, did_you_mean
from dqo.modules import modules_in


def _formats() -> dict[str, Callable[..., Converted]]:
    """{name of a format: its function of a source, whose keyword arguments are the options that it alone has}."""
    tables = (getattr(module, "FORMATS", {}) for module in modules_in("dqo.convert") if module.__name__ != __name__)
    return {name: function for table in tables for name, function in table.items()}


FORMATS = _formats()


def convert(
    format: str,
    source: str | Path,
    destination: str | Path,
    *,
    messages: bool = False,
    keep_annotations: bool = True,
    step_penalty: float | None = None,
) -> dict[str, Any]:
    """Converts a source of one of FORMATS and writes its rows as JSON Lines.

    Args:
        source: a .jsonl or .parquet file, a saved data set, or the name of one on the Hugging Face hub.
        messages: write prompts and completions as messages, for models with a chat template.
        keep_annotations: False removes <<expression=value>> from completions, after judging the steps by it.
        step_penalty: of gsm8k-solutions alone; None is its default.

    Returns:
        What `summary` says of the rows, and the format's own counts.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; known: {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}")
    options = {} if step_penalty is None else {"step_penalty": step_penalty}
    for option in options.keys() - inspect.signature(FORMATS[format]).parameters.keys():
        owners = [name for name, function in FORMATS.items() if option in inspect.signature(function).parameters]
        raise UserError(f"{option} is an option of {', '.join(owners)}; {format} has step rewards of its own, or none")
    rows, counts = FORMATS[format](source, **options)
    if not rows:
        raise UserError(f"{source}: no response is left to write")
    scored = any(row.reward is not None or row.label is not None for row in rows)
    rows = read_rows(rows, scored=scored)  # the checks of training, which name the source's line
    if not keep_annotations:
        if any(row.completion_ids for row in rows):
            raise UserError(f"{source}: has completion_ids, which annotations cannot be taken out of; keep them")
        rows = [without_annotations(row) if isinstance(row.completion, str) else row for row in rows]
    if messages:
        rows = [as_messages(row) for row in rows]
    write_rows(destination, rows)
    return summary(rows) | counts


def as_messages(row: Row) -> Row:
    """The row with a user's and an assistant's message instead of strings; spans count characters of the content."""
    if not isinstance(row.prompt, str):
        return row
    prompt = [{"role": "user", "content": row.prompt.strip()}]
    return dataclasses.replace(row, prompt=prompt, completion=[{"role": "assistant", "content": row.completion}])


def summary(rows: list[Row]) -> dict[str, Any]:
    """Counts of any rows: how many, how they end, how many are right, their steps."""
    rewards: dict[str, set[float]] = {}
    for row in rows:
        rewards.setdefault(prompt_key(row), set()).add(row.reward)
    found: dict[str, Any] = {
        "rows": len(rows),
        "problems": len(rewards),
        "problems_with_mixed_rewards": sum(len(found) > 1 for found in rewards.values()),
        "correct": sum(bool(row.label) for row in rows) / len(rows),
        "not_ended": sum(row.finish_reason == "length" for row in rows),
    }
    if all(row.reward is None for row in rows):
        found |= {"problems_with_mixed_rewards": "not scored yet", "correct": "not scored yet"}
    paid = [reward for row in rows for reward in row.step_rewards or ()]
    if paid:
        found |= {
            "steps": len(paid),
            "step_rewards": f"{min(paid):g} to {max(paid):g}, mean {sum(paid) / len(paid):.3g}",
        }
    return found
