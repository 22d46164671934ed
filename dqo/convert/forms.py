"""Other trainers' data: TRL's preference, unpaired preference and stepwise sets, OREO's rows, open-r1's, verl's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dqo.convert.source import Converted, list_of, prompt_of, source_records, text_of
from dqo.data.checks import number
from dqo.data.forms import Record, form_of, shown
from dqo.data.rows import Row, rows_of
from dqo.errors import UserError
from dqo.grading.answers import boxed, same_answer
from dqo.grading.gsm8k import gsm8k_answer

logger = logging.getLogger(__name__)

_SCORES = ("scores", "rewards", "score", "reward")  # names that people give the scores of verl's responses


def convert_trl_preference(source: str | Path) -> Converted:
    """prompt, chosen, rejected: two rows, with rewards 1 and 0. The prompt may be implicit, the common beginning of both."""
    name, records = source_records(source)
    _refuse_other_form(name, records, "preference", "chosen, rejected")
    implicit = 0
    for record in records:
        implicit += _split_prompt(record)
    return Converted(rows_of(name, records, []), {"pairs": len(records), "implicit_prompts": implicit})


def convert_trl_kto(source: str | Path) -> Converted:
    """prompt, completion, label: one row, with reward 1 when label is true, else 0."""
    name, records = source_records(source)
    _refuse_other_form(name, records, "flat", "prompt, completion, label")
    found = {key: None for record in records for key in record.values}
    if "label" not in found:
        raise UserError(
            f"{name}: no row has label; found {', '.join(found)}. Unpaired preferences are prompt, completion and label"
        )
    for record in records:
        record.values.pop("reward", None)
    return Converted(rows_of(name, records, []), {})


def convert_trl_stepwise(source: str | Path) -> Converted:
    """prompt, completions, labels: the completions are the steps of one response, the labels its step_rewards."""
    name, records = source_records(source)
    _refuse_other_form(name, records, "stepwise", "prompt, completions, labels")
    return Converted(rows_of(name, records, []), {})


def convert_oreo(source: str | Path) -> Converted:
    """prompt, response, reward: one row."""
    name, records = source_records(source)
    _refuse_other_form(name, records, "oreo", "prompt, response, reward")
    return Converted(rows_of(name, records, []), {})


def _refuse_other_form(name: str, records: list[Record], form: str, columns: str) -> None:
    found = {key: None for record in records for key in record.values}
    if form_of(found) != form:
        raise UserError(f"{name}: is not of this format, which has the columns {columns}; found {', '.join(found)}")


def _split_prompt(record: Record) -> bool:
    """Moves what chosen and rejected share to prompt, where it stands in both of them; says whether it did."""
    chosen, rejected, prompt = (record.values.get(name) for name in ("chosen", "rejected", "prompt"))
    kinds = {type(chosen), type(rejected)}
    if kinds not in ({str}, {list}) or (kinds == {str} and prompt is not None):
        return False  # what is wrong, if anything is, will be said where rows are checked
    if chosen == rejected:
        raise UserError(f"{record.source}: chosen and rejected do not differ; drop the row")
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if kinds == {str}:
        while shared and not chosen[shared - 1].isspace():
            shared -= 1  # a word that begins alike belongs to the responses
        if shared and chosen[shared - 1] == " ":
            shared -= 1  # as tokenizers have it, a space belongs to the word after it
    if shared == 0:
        if prompt is None:
            raise UserError(
                f"{record.source}: has no prompt, and chosen and rejected share no beginning that could be it"
            )
        return False
    if kinds == {list} and isinstance(prompt, list) and chosen[:shared][: len(prompt)] != prompt:
        prompt = prompt + chosen[:shared]  # turns that follow the prompt
    else:
        prompt = chosen[:shared]
    record.values |= {"prompt": prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}
    return True


def convert_open_r1(source: str | Path) -> Converted:
    """problem, generations[], and a list of verdicts for each grader: correctness_math_verify, correctness_llama ...

    One row a generation; right when any grader says so (the second grader is there for answers that the first cannot read).
    finish_reasons, and else is_reasoning_complete, say which generations were cut.
    """
    _, records = source_records(source)
    rows = []
    for record in records:
        problem, generations = text_of(record, "problem"), list_of(record, "generations")
        graders = [k for k, v in record.values.items() if k.startswith("correctness_") and isinstance(v, list)]
        if not graders:
            raise UserError(
                f"{record.source}: has no verdicts; expected a list such as correctness_math_verify, one for each generation; "
                f"found {', '.join(record.values)}"
            )
        columns = {k: _each(record, k, len(generations)) for k in (*graders, "finish_reasons", "is_reasoning_complete")}
        for i, generation in enumerate(generations):
            if not isinstance(generation, str) or not generation.strip():
                raise UserError(f"{record.source}: generations[{i}] is {shown(generation)}; expected a string")
            verdicts = [columns[grader][i] for grader in graders]
            if not all(verdict in (True, False, None) for verdict in verdicts):
                raise UserError(f"{record.source}: {graders[0]}[{i}] is {shown(verdicts[0])}; expected true or false")
            right = any(verdicts)
            cut = columns["finish_reasons"][i] == "length"
            if columns["finish_reasons"][i] is None:
                cut = columns["is_reasoning_complete"][i] is False
            rows.append(
                Row(
                    prompt=prompt_of(problem),
                    completion=generation,
                    reward=float(right),
                    label=right,
                    finish_reason="length" if cut else "stop",
                    answer=record.values["answer"] if isinstance(record.values.get("answer"), str) else None,
                    prompt_id=record.values["uuid"] if isinstance(record.values.get("uuid"), str) else None,
                    source=f"{record.source}, generation {i + 1}",
                )
            )
    return Converted(rows, {})


def _each(record: Record, name: str, count: int) -> list:
    """A column with one value for each response, None where the row has no such column."""
    values = record.values.get(name)
    if values is None:
        return [None] * count
    if not isinstance(values, list) or len(values) != count:
        found = f"has {len(values)} values" if isinstance(values, list) else f"is {shown(values)}"
        raise UserError(f"{record.source}: {name} {found}, and there are {count} responses; expected one for each")
    return values


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
        scores = _each(record, scored, len(responses)) if scored else None
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
                    reward = number(scores[i], f"{scored}[{i}]")
                except UserError as error:
                    raise UserError(f"{record.source}: {error}") from error
            rows.append(_verl_row(record, prompt, response, reward, i))
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


def _verl_row(record: Record, prompt: Any, response: str, reward: float, index: int) -> Row:
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
