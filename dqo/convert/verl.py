"""verl's data: prompts, with responses and scores where its main_generation and a grader have added them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dqo.convert.source import Converted, each, list_of, source_records
from dqo.data.fields import finite_number
from dqo.data.forms import Record, shown
from dqo.data.rows import Row
from dqo.errors import UserError
from dqo.grading.answers import boxed, same_answer
from dqo.grading.gsm8k import gsm8k_answer

logger = logging.getLogger(__name__)

_SCORES = ("scores", "rewards", "score", "reward")  # names that people give the scores of verl's responses


def convert_verl(source: str | Path) -> Converted:
    r"""data_source, prompt (messages), reward_model.ground_truth, extra_info, with the columns responses and scores.

    verl's own data sets are prompts: its main_generation adds responses. Without scores (or rewards) a response is graded here:
    its last \boxed{} or "#### answer" is compared with the ground truth.
    """
    name, records = source_records(source)
    if not any("responses" in record.values for record in records):
        raise UserError(
            f"{name}: these are prompts only; found {', '.join(records[0].values)}. Sample responses to them first (verl's "
            "main_generation adds the column responses), and score them (a column scores, one for each response)"
        )
    rows, graded, readable = [], 0, 0
    for record in records:
        prompt = record.values.get("prompt")
        if not isinstance(prompt, (list, str)) or not prompt:
            raise UserError(f"{record.source}: prompt is {shown(prompt)}; expected a list of messages")
        responses = record.values.get("responses")
        responses = [responses] if isinstance(responses, str) else list_of(record, "responses")
        scored = next((column for column in _SCORES if record.values.get(column) is not None), None)
        if scored and not isinstance(record.values[scored], list):
            record.values[scored] = [record.values[scored]]
        scores = each(record, scored, len(responses)) if scored else None
        truth = _inside(record, "reward_model", "ground_truth")
        if scores is None and not isinstance(truth, (str, int, float)):
            raise UserError(
                f"{record.source}: has no scores, and reward_model.ground_truth is {shown(truth)}; add a column scores with "
                "one number for each response"
            )
        for i, response in enumerate(responses):
            if not isinstance(response, str) or not response.strip():
                raise UserError(
                    f"{record.source}: responses[{i}] is {shown(response)}; expected a string, drop the row"
                )
            if scores is None:
                answer = _final_answer(response)
                graded, readable = graded + 1, readable + (answer is not None)
                reward = float(answer is not None and same_answer(answer, str(truth)))
            else:
                try:
                    reward = finite_number(scores[i], f"{scored}[{i}]")
                except UserError as error:
                    raise UserError(f"{record.source}: {error}") from error
            rows.append(_row(record, prompt, response, reward, i))
    if graded and not readable:
        raise UserError(
            f"{name}: has no scores, and no response has a \\boxed{{}} or #### answer to grade; add a column scores with one "
            "number for each response"
        )
    if graded:
        logger.warning("%s: has no scores: answers in \\boxed{} or after #### are compared with the ground truth", name)
    return Converted(rows, {"graded_here": graded, "without_an_answer": graded - readable} if graded else {})


def _inside(record: Record, name: str, key: str) -> Any:
    value = record.values.get(name)
    return value.get(key) if isinstance(value, dict) else None


def _final_answer(response: str) -> str | None:
    box = boxed(response)
    if box:
        return box[0]
    value = gsm8k_answer(response)
    return None if value is None else str(value)


def _row(record: Record, prompt: Any, response: str, reward: float, index: int) -> Row:
    truth = _inside(record, "reward_model", "ground_truth")
    extra = [_inside(record, "extra_info", name) for name in ("split", "index")]
    where = [part for part in (record.values.get("data_source"), *extra) if isinstance(part, (str, int))]
    return Row(
        prompt=prompt,
        completion=response if isinstance(prompt, str) else [{"role": "assistant", "content": response}],
        reward=reward,
        label=reward > 0.5,
        answer=truth if isinstance(truth, str) else None,
        prompt_id="/".join(map(str, where)) or None,
        source=f"{record.source}, response {index + 1}",
    )


FORMATS = {"verl": convert_verl}
