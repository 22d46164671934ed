"""What a row says of its turns: which tokens or characters the model wrote, and what each turn is paid.

completion       messages: every message of assistant is a turn, whatever is between them the environment wrote
env_mask         with completion_ids: 1 for each token of the model, 0 for each of the environment, as TRL's rollout_func returns
                 it. A turn is a run of ones. verl calls it response_mask, others completion_mask, assistant_masks or tool_mask
turn_spans       of a string: [start, end] in characters for each turn, end excluded
turn_rewards     one number for each turn
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from dqo.data.fields import each, is_int, numbers
from dqo.data.forms import Record, shown
from dqo.errors import UserError

Span = tuple[int, int]


def turn_fields(record: Record, completion: str | list[dict], ids: dict[str, list[int] | None]) -> dict[str, Any]:
    """env_mask, turn_spans and turn_rewards of a row; None where they say nothing, as of a completion that is one turn.

    Args:
        ids: prompt_ids and completion_ids.

    Raises:
        UserError: for the first that does not fit.
    """
    values, completion_ids = record.values, ids["completion_ids"]
    several = isinstance(completion, list) and len(completion) > 1
    if several and completion_ids is not None and "env_mask" not in values:
        raise UserError(
            f"{record.name('completion')} has {len(completion)} messages, and completion_ids do not tell which tokens the model "
            "wrote; add env_mask (1 for each token of the model, 0 for each of the environment), or drop the ids"
        )
    mask = _env_mask(record, ids["prompt_ids"], completion_ids)
    if mask is None and several and completion_ids is not None:
        mask = _of_one_turn(record, completion, completion_ids)
    spans = _turn_spans(record, completion, completion_ids)
    if "steps" in values or "step_rewards" in values:
        if several or mask or spans:
            raise UserError("steps and step_rewards are of a completion of one turn; pay turns by turn_rewards")
        if "turn_rewards" in values:
            raise UserError("turn_rewards and steps or step_rewards are both given; drop one of them")
    rewards = numbers(values["turn_rewards"], "turn_rewards") if "turn_rewards" in values else None
    turns = turn_count(completion, mask, spans)
    if rewards is not None and len(rewards) != turns:
        raise UserError(f"turn_rewards has {len(rewards)} values but the row has {turns} turns; expected one for each")
    return {"env_mask": mask, "turn_spans": spans, "turn_rewards": rewards}


def turn_count(completion: str | list[dict], env_mask: list[int] | None, turn_spans: list[Span] | None) -> int:
    """How many times the model had its turn."""
    if env_mask is not None:
        return sum(of_model for of_model, _ in groupby(env_mask))
    if turn_spans is not None:
        return len(turn_spans)
    return 1 if isinstance(completion, str) else sum(message["role"] == "assistant" for message in completion)


def _env_mask(record: Record, prompt_ids: list[int] | None, completion_ids: list[int] | None) -> list[int] | None:
    name, value = record.name("env_mask"), record.values.get("env_mask")
    if value is None:
        return None

    def flag(value: Any, name: str) -> int:
        if value not in (0, 1):
            raise UserError(f"{name} is {shown(value)}; expected 1 (a token of the model) or 0 (of the environment)")
        return int(value)

    mask = each(value, name, flag)
    if completion_ids is None:
        if all(mask):
            return None
        raise UserError(
            f"{name} has zeros, and there are no completion_ids whose tokens it could mark; store the sampler's ids, or give "
            "the completion as messages"
        )
    if prompt_ids is not None and len(mask) == len(prompt_ids) + len(completion_ids):
        mask = mask[len(prompt_ids) :]
    if len(mask) != len(completion_ids):
        raise UserError(
            f"{name} has {len(mask)} values for {len(completion_ids)} completion_ids; expected one for each"
        )
    if not any(mask):
        raise UserError(f"{name} has no 1: no token is the model's, so there is no action; drop the row")
    return None if all(mask) else mask


def _of_one_turn(record: Record, completion: Any, completion_ids: list[int]) -> list[int]:
    """The mask without a zero beside several messages: the ids are of one turn, however many messages tell of."""
    roles = [message["role"] for message in completion]
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    between = next((role for role in roles[:last] if role != "assistant"), None)
    if between is not None and record.values.get("finish_reason") != "length":  # else the ids may be cut before it
        raise UserError(
            f"{record.name('env_mask')} has no 0, and {record.name('completion')} has a message of {between} between those of "
            "assistant; expected 0 for each token that the model did not write"
        )
    return [1] * len(completion_ids)


def _turn_spans(record: Record, completion: str | list[dict], completion_ids: list[int] | None) -> list[Span] | None:
    value = record.values.get("turn_spans")
    if value is None:
        return None
    if not isinstance(completion, str):
        raise UserError(
            "turn_spans are of a string; in a list of messages every message of assistant is a turn: drop them"
        )
    if completion_ids is not None:
        raise UserError("turn_spans are characters; beside completion_ids give env_mask, or drop the ids")
    cure = (
        "turn_spans are [start, end] in characters of the completion, end excluded, in their order and without overlap"
    )
    position, spans = 0, []
    for i, span in enumerate(value if isinstance(value, (list, tuple)) else [value]):
        if not isinstance(span, (list, tuple)) or len(span) != 2 or not all(is_int(x) for x in span):
            raise UserError(f"turn_spans[{i}] is {shown(span)}; {cure}")
        start, end = map(int, span)
        if not position <= start < end <= len(completion):
            what = "an empty turn" if start == end else f"not within {position} and {len(completion)}"
            raise UserError(f"turn_spans[{i}] is {shown(span)}, {what}; {cure}")
        position = end
        spans.append((start, end))
    if not spans:
        raise UserError("turn_spans is an empty list: no character is the model's, so there is no action; drop the row")
    return None if spans == [(0, len(completion))] else spans
