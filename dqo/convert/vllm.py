"""vLLM's offline outputs: RequestOutput objects, one a line, as `json.dumps` writes their fields."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from dqo.convert.source import Converted, each, list_of, source_records
from dqo.data.checks import finite_number
from dqo.data.forms import Record, shown
from dqo.data.rows import Row
from dqo.errors import UserError

logger = logging.getLogger(__name__)

_SCORES = ("rewards", "scores")  # names of a column that people add, with a number for each of the outputs


def convert_vllm(source: str | Path) -> Converted:
    """prompt (a string, or messages), prompt_token_ids, and outputs with text, token_ids, logprobs, finish_reason, stop_reason.

    Columns rewards (or scores, one number for each output), answer and prompt_id may stand beside them. Without rewards the rows
    are to be scored.
    """
    name, records = source_records(source)
    rows = [row for record in records for row in _rows(record)]
    at_text = sum(isinstance(o.get("stop_reason"), str) for r in records for o in r.values["outputs"])
    with_logprobs = any(row.logprobs is not None for row in rows)
    if at_text and with_logprobs:
        logger.warning(
            "%s: %d of %d responses ended at a stop string, and have no end token: training adds one, whose log-probability is "
            "not known, so that logprobs are left out of all rows",
            *(name, at_text, len(rows)),
        )
        rows = [dataclasses.replace(row, logprobs=None) for row in rows]
    elif with_logprobs:
        logger.warning(
            "%s: logprobs are taken for those of the distribution that sampled. vLLM's are that with "
            "logprobs_mode='processed_logprobs', or at temperature 1 without top_p and top_k",
            name,
        )
    return Converted(rows, {"ended_at_a_stop_string": at_text} if at_text else {})


def _rows(record: Record) -> list[Row]:
    values = record.values
    prompt = values.get("messages") or values.get("prompt")
    outputs = list_of(record, "outputs")
    if not isinstance(prompt, (str, list)) or not prompt:
        raise UserError(
            f"{record.source}: prompt is {shown(values.get('prompt'))}; vLLM has no text of a prompt that was given as token "
            "ids: add it (prompt, a string, or messages)"
        )
    scored = next((column for column in _SCORES if values.get(column) is not None), None)
    scores = each(record, scored, len(outputs)) if scored else [None] * len(outputs)
    return [_row(record, prompt, output, scores[i], i) for i, output in enumerate(outputs)]


def _row(record: Record, prompt: str | list, output: Any, score: Any, index: int) -> Row:
    where, values = f"{record.source}, output {index + 1}", record.values
    if not isinstance(output, dict) or not isinstance(output.get("text"), str):
        raise UserError(f"{where}: is {shown(output)}; expected an object with text, token_ids and finish_reason")
    reason = output.get("finish_reason")
    if reason not in ("stop", "length"):
        raise UserError(
            f'{where}: finish_reason is {shown(reason)}; expected "stop" or "length": drop a response that was aborted'
        )
    text, ids, prompt_ids = output["text"], output.get("token_ids"), values.get("prompt_token_ids")
    try:
        reward = None if score is None else finite_number(score, "its score")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Row(
        prompt=prompt,
        completion=text if isinstance(prompt, str) else [{"role": "assistant", "content": text}],
        reward=reward,  # type: ignore[arg-type]  # None until it is scored
        prompt_ids=prompt_ids if ids else None,
        completion_ids=ids,
        logprobs=_logprobs(output, ids, where) if isinstance(ids, list) else None,
        finish_reason=reason,
        answer=values.get("answer"),
        prompt_id=values.get("prompt_id"),
        source=where,
    )


def _logprobs(output: dict, ids: list, where: str) -> list[float] | None:
    """Of each token that was drawn. JSON has turned vLLM's integer keys to strings."""
    steps = output.get("logprobs")
    if steps is None:
        return None
    if not isinstance(steps, list) or len(steps) != len(ids):
        count = f"{len(steps)} steps" if isinstance(steps, list) else shown(steps)
        raise UserError(f"{where}: logprobs has {count}, and token_ids has {len(ids)} tokens; expected one for each")
    found = []
    for i, (token, step) in enumerate(zip(ids, steps)):
        value = step.get(str(token), step.get(token)) if isinstance(step, dict) else None
        value = value.get("logprob") if isinstance(value, dict) else value
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise UserError(f"{where}: logprobs[{i}] has no number for token {token}; found {shown(step)}")
        found.append(float(value))
    return found


FORMATS = {"vllm": convert_vllm}
