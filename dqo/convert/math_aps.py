"""MATH-APS (openreasoner/MATH-APS): questions with prefixes of solutions, each measured by its completions."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from dqo.convert.source import Converted, list_of, prompt_of, source_records, text_of, warn_unended
from dqo.data.forms import Record, shown
from dqo.data.rows import Row
from dqo.errors import UserError
from dqo.grading.answers import boxed, same_answer


def convert_math_aps(source: str | Path) -> Converted:
    r"""A line is a question with prefixes of solutions, each with mc_value, the share of its completions that were right.

    The prefixes are a tree. One row a leaf; its steps end where the prefixes on the way to it end, and step_rewards are their
    mc_values: potentials, for `--process_reward potential`. A prefix that was measured twice has the mean. The question's own
    mc_value is not kept: Phi of a prompt is 0, which shifts values and nothing else. White space before the first step and
    after the last is dropped.
    A leaf has ended when nothing follows its last \boxed{} but the rest of a line, and is right when that box holds
    final_answer; mc_value calls some leaves right that go on after their answer until they are cut, or that end in another
    answer: those are counted as `graded_right_without_the_answer`.
    """
    _, records = source_records(source)
    rows, disputed, merged = [], 0, 0
    for record in records:
        question, truth = text_of(record, "question"), text_of(record, "final_answer")
        values = _values(record, question)
        merged += sum(len(found) - 1 for found in values.values())
        for chain in _chains(list(values)):
            row = _row(record, question, truth, chain, values)
            disputed += not row.label and row.step_rewards is not None and row.step_rewards[-1] == 1.0
            rows.append(row)
    warn_unended(rows)
    return Converted(rows, {"merged_prefixes": merged, "graded_right_without_the_answer": disputed})


def _values(record: Record, question: str) -> dict[str, list[float]]:
    """{what follows the question, without the white space around it: its mc_values}."""
    values = defaultdict(list)
    for i, step in enumerate(list_of(record, "reasoning_steps")):
        prefix, value = (step.get("solution_prefix"), step.get("mc_value")) if isinstance(step, dict) else (None, None)
        if not isinstance(prefix, str) or not prefix.startswith(question):
            raise UserError(
                f"{record.source}: reasoning_steps[{i}].solution_prefix is {shown(prefix)}; expected the question and what "
                "follows it"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(
                f"{record.source}: reasoning_steps[{i}].mc_value is {shown(value)}; expected a share in [0, 1]"
            )
        if prefix[len(question) :].strip():
            values[prefix[len(question) :].strip()].append(float(value))
    return values


def _chains(prefixes: list[str]) -> list[list[str]]:
    """From the first prefix to each leaf, every prefix on the way; in sorted order a prefix comes before what it begins."""
    chains: list[list[str]] = []
    way: list[str] = []
    ordered = sorted(prefixes)
    for i, prefix in enumerate(ordered):
        while way and not prefix.startswith(way[-1]):
            way.pop()
        way.append(prefix)
        if i + 1 == len(ordered) or not ordered[i + 1].startswith(prefix):
            chains.append(list(way))
    return chains


def _row(record: Record, question: str, truth: str, chain: list[str], values: dict[str, list[float]]) -> Row:
    text = chain[-1]
    ends = [len(prefix) for prefix in chain]
    box = boxed(text)
    ended = box is not None and not re.search(r"\n[^\n]*\w", text[box[1] :])
    right = box is not None and ended and same_answer(box[0], truth)
    number = record.values.get("question_id", record.index)
    return Row(
        prompt=prompt_of(question),
        completion=text,
        reward=float(right),
        label=right,
        steps=list(zip([0, *ends], ends)),
        step_rewards=[sum(values[prefix]) / len(values[prefix]) for prefix in chain],
        finish_reason="stop" if ended else "length",
        answer=truth,
        prompt_id=f"math-aps/{number}",
        source=record.source,
    )


FORMATS = {"math-aps": convert_math_aps}
