"""GSM8K's graded solutions of four models, and its calculator annotations."""

from __future__ import annotations

import dataclasses
import logging
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

from dqo.convert.source import Converted, source_records, text_of
from dqo.data.forms import Record, shown
from dqo.data.rows import Row
from dqo.errors import UserError
from dqo.grading.gsm8k import ANNOTATION, calculator_steps, gsm8k_answer, gsm8k_correct, number
from dqo.grading.text import line_spans

logger = logging.getLogger(__name__)


def convert_gsm8k_solutions(source: str | Path, *, step_penalty: float = 0.5) -> Converted:
    """GSM8K's example_model_solutions.jsonl: test problems, each with graded solutions of several models.

    A line {"question", "ground_truth", MODEL: {"solution", "is_correct"}, ...} becomes one row a model. The
    prompt is the question and a newline; prompt_id ends in the line's number. Steps are lines: one with a
    wrong calculator annotation has the step reward -step_penalty, every other 0, so that a solution whose
    arithmetic is right is paid for its outcome alone. A solution without a final answer (a line "A: 24", or
    a last line that is a number alone) was cut, and its finish_reason is "length". Empty solutions are left
    out, and counted in the log.

    Raises:
        UserError: naming file and line, for what is not of this form.
    """
    if not 0.0 <= step_penalty < math.inf:
        raise UserError(f"step_penalty must be a finite number from 0 up, got {step_penalty}")
    name, records = source_records(source)
    rows, empty = [], 0
    for record in records:
        question, truth, solutions = _gsm8k_fields(record)
        answer = gsm8k_answer(truth)
        if answer is None:
            raise UserError(f'{record.source}: ground_truth ends in {shown(truth[-40:])}; expected a line "A: number"')
        for model, solution, correct in solutions:
            if not solution.strip():
                empty += 1
                continue
            steps = calculator_steps(solution)
            rows.append(
                Row(
                    prompt=f"{question}\n",
                    completion=solution,
                    reward=float(correct),
                    label=correct,
                    steps=[(step.start, step.end) for step in steps],
                    step_rewards=[-step_penalty if step.correct is False else 0.0 for step in steps],
                    finish_reason="stop" if _answers(solution) else "length",
                    answer=_decimal(answer),
                    prompt_id=f"gsm8k/test/{record.index}",
                    sampling={"model": model},
                    source=record.source,
                )
            )
    if empty:
        logger.warning("%s: %d empty solutions are left out", name, empty)
    return Converted(rows, _counts(rows))


def _gsm8k_fields(record: Record) -> tuple[str, str, list[tuple[str, str, bool]]]:
    """Question, reference solution, and (model, solution, is_correct) of every model."""
    question, truth = text_of(record, "question"), text_of(record, "ground_truth")
    values, source = record.values, record.source
    solutions = []
    for model, graded in values.items():
        if not isinstance(graded, dict):
            continue
        solution, correct = graded.get("solution"), graded.get("is_correct")
        if not isinstance(solution, str):
            raise UserError(f"{source}: {model}.solution is {shown(solution)}; expected a string")
        if not isinstance(correct, bool):
            raise UserError(f"{source}: {model}.is_correct is {shown(correct)}; expected true or false")
        solutions.append((model, solution, correct))
    if not solutions:
        raise UserError(
            f'{source}: has no solutions; expected such as "6b_finetuning": {{"solution", "is_correct"}}; '
            f"found {', '.join(values)}"
        )
    return question, truth, solutions


def _decimal(value: Fraction) -> str:
    """A number that was written in decimals, exactly."""
    with localcontext() as context:
        context.prec = 1000
        return f"{Decimal(value.numerator) / value.denominator:f}"


def _answers(solution: str) -> bool:
    lines = solution.strip().split("\n")
    return any(line.startswith("A:") for line in lines) or number(lines[-1]) is not None


def without_annotations(row: Row) -> Row:
    """The row without calculator annotations, its spans moved. A line that is nothing else keeps them."""
    lines, steps, position = [], [], 0
    text = _text(row)
    for start, end in row.steps or line_spans(text):
        line = text[start:end]
        without = ANNOTATION.sub("", line)
        line = without if without.strip() else line
        lines.append(line)
        steps.append((position, position + len(line)))
        position += len(line)
    return dataclasses.replace(row, completion="".join(lines), steps=row.steps and steps)


def _text(row: Row) -> str:
    assert isinstance(row.completion, str)  # `convert_gsm8k_solutions` writes no messages
    return row.completion


def _counts(rows: list[Row]) -> dict[str, Any]:
    """What the annotations say, and how often our own grading of the answer agrees."""
    by_model: dict[str, list[bool]] = {}
    for row in rows:
        by_model.setdefault((row.sampling or {})["model"], []).append(row.label)
    steps = [step for row in rows for step in calculator_steps(_text(row))]
    agreeing = sum(gsm8k_correct(_text(row), row.answer or "") == row.label for row in rows)
    return {
        "correct_by_model": {model: sum(labels) / len(labels) for model, labels in by_model.items()},
        "lines_checked": sum(step.correct is not None for step in steps),
        "annotations": sum(step.annotations for step in steps),
        "wrong_annotations": sum(step.wrong for step in steps),
        "unparsed_annotations": sum(step.unparsed for step in steps),
        "rows_with_wrong_annotations": sum(any(step.wrong for step in calculator_steps(_text(r))) for r in rows),
        "grading_agreement": agreeing / max(len(rows), 1),
        "grading_disagreements": len(rows) - agreeing,
    }


FORMATS = {"gsm8k-solutions": convert_gsm8k_solutions}
