"""Checks of every field of a flat row. Each message says what was found, what is expected, and the cure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from dqo.data.fields import each, finite_number, is_int, numbers, truth_of
from dqo.data.forms import Record, Shape, shown
from dqo.data.json_text import DoubledKey, decode
from dqo.data.turns import turn_fields
from dqo.errors import UserError
from dqo.grading.text import line_spans

_OURS = {  # what apply_chat_template is called with
    *(
        "conversation",
        "messages",
        "tools",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "return_dict",
    ),
    *("padding", "truncation", "max_length", "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    "sanitize_control_tokens",
}
_ROUNDING = 1e-5  # a log-probability this little above 0 is 0 up to a sampler's rounding


@dataclass(frozen=True, slots=True)
class Common:
    """What the rows of one file must have in common."""

    prompts: str  # "string" or "list of messages"
    rewards: bool
    logprobs: bool

    @classmethod
    def of(cls, records: Iterable[Record]) -> Common:
        """Of flat rows."""
        kinds: Counter[str] = Counter()
        rewards = logprobs = False
        for record in records:
            kinds[_kind(record.values["prompt"])] += 1
            rewards = rewards or record.values.get("reward") is not None
            logprobs = logprobs or "logprobs" in record.values
        return cls(_most(kinds), rewards, logprobs)

    @classmethod
    def of_shapes(cls, shapes: list[Shape], needed: Collection[str]) -> Common:
        """The same from the columns of rows that are flat, or have other names alone, where they have those that are needed."""
        kinds: Counter[str] = Counter()
        whole = [shape for shape in shapes if all(name in shape.keys for name in needed)]
        for shape in whole:
            kinds["list of messages" if shape.messages else "string"] += shape.count
        rewards = any("reward" in shape.keys and not shape.null_reward for shape in whole)
        return cls(_most(kinds), rewards, any("logprobs" in shape.keys for shape in whole))


def _most(kinds: Counter[str]) -> str:
    return kinds.most_common(1)[0][0] if kinds else "string"


def _kind(value: Any) -> str:
    return "list of messages" if isinstance(value, (list, tuple)) else "string"


def checked(record: Record, common: Common, reward_threshold: float, scored: bool = True) -> dict[str, Any]:
    """The fields of a row, each of its type. `scored`: it must have a reward or a label.

    Raises:
        UserError: for the first field that does not fit; the message begins with the field's name.
    """
    values = record.values
    prompt = conversation(values["prompt"], "prompt")
    if _kind(prompt) != common.prompts:
        raise UserError(f"prompt is a {_kind(prompt)} but most rows have a {common.prompts}; one file holds one kind")
    if not prompt:
        raise UserError("prompt is empty; the first token of a response needs something before it")
    sampled = values.get("completion_ids") is not None  # a model may answer with nothing but its end
    completion, text = _completion(values["completion"], record.name("completion"), sampled)
    if _kind(prompt) != _kind(completion):
        raise UserError(
            f"prompt is a {_kind(prompt)} but {record.name('completion')} is a {_kind(completion)}; "
            "expected two strings, or two lists of messages"
        )
    unscored = not scored and values.get("reward") is None and values.get("label") is None
    reward, label = (None, None) if unscored else _outcome(record, common, reward_threshold)
    steps, step_rewards = _steps(record, text)
    ids = {name: ids_of(record, name) for name in ("prompt_ids", "completion_ids")}
    if ids["prompt_ids"] is not None and ids["completion_ids"] is None:
        raise UserError("prompt_ids without completion_ids; give both, or neither")
    turns = turn_fields(record, completion, ids)
    return {
        "prompt": prompt,
        "completion": completion,
        "reward": reward,
        "label": label,
        "steps": steps,
        "step_rewards": step_rewards,
        "prompt_value": finite_number(values["prompt_value"], "prompt_value") if "prompt_value" in values else None,
        **ids,
        **turns,
        "logprobs": _logprobs(record, ids["completion_ids"], turns["env_mask"], common),
        "finish_reason": _finish_reason(values.get("finish_reason")),
        "answer": word(values.get("answer"), "answer"),
        "prompt_id": word(values.get("prompt_id"), "prompt_id"),
        "sampling": _object(values.get("sampling"), "sampling", '{"model": "sft", "temperature": 1.0}'),
        "grading": _object(values.get("grading"), "grading", '{"verifier": "gsm8k", "outcome": "right"}'),
        **({} if isinstance(prompt, str) else of_templates(values)),
    }


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} is {shown(value)}; expected a string or a list of messages")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{name} has half a surrogate pair at character {error.start}; drop the row") from error
    return value


def conversation(value: Any, name: str) -> str | list[dict]:
    if not isinstance(value, (list, tuple)):
        return _text(value, name)
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f'{name}[{i}] is {shown(message)}; expected {{"role": ..., "content": ...}}')
        message = {key: v for key, v in message.items() if v is not None}
        if "content" in message or "tool_calls" not in message:
            content = message.get("content")
            if not isinstance(content, str):
                raise UserError(f"{name}[{i}].content is {shown(content)}; expected a string")
            _text(content, f"{name}[{i}].content")
        messages.append(message)
    return messages


def _completion(value: Any, name: str, may_be_empty: bool) -> tuple[str | list[dict], str]:
    completion = conversation(value, name)
    if isinstance(completion, str):
        text = completion
    elif not completion or completion[0]["role"] != "assistant":
        raise UserError(
            f"{name} has messages of {shown([m['role'] for m in completion])}; expected the first of assistant. What comes "
            "before it belongs to prompt"
        )
    else:
        for i, message in enumerate(completion[1:], 1):
            if message["role"] == "assistant" and not (message.get("content", "").strip() or message.get("tool_calls")):
                raise UserError(f"{name}[{i}] is a message of assistant without content; expected a turn, drop the row")
        text = completion[0].get("content", "")
        if completion[0].get("tool_calls"):  # a response without content
            return completion, text
    if not text.strip() and not may_be_empty:
        raise UserError(f"{name} is empty or only whitespace ({shown(text)}); expected a response, drop the row")
    return completion, text


def _outcome(record: Record, common: Common, reward_threshold: float) -> tuple[float, bool]:
    """Reward and label. A missing one is made from the other."""
    values = record.values
    name, label = record.name("reward"), values.get("label")
    if label is not None and not isinstance(label, bool):
        truth = truth_of(label)
        meant = "" if truth is None else f": write {str(truth).lower()}"
        raise UserError(
            f"{record.name('label')} is {shown(label)}; labels are true or false{meant}. "
            "For graded scores use the reward column"
        )
    if "reward" in values:
        reward = finite_number(values["reward"], name)
    elif common.rewards:
        raise UserError(
            f"{name} is missing, and other rows have it; give every row a reward, or none: label is used then"
        )
    elif label is None:
        raise UserError(f"{name} and label are missing; give one of them")
    else:
        reward = float(label)
    return reward, reward > reward_threshold if label is None else label


def _steps(record: Record, text: str) -> tuple[list[tuple[int, int]] | None, list[float] | None]:
    values, name = record.values, record.name("step_rewards")
    rewards = numbers(values["step_rewards"], name) if "step_rewards" in values else None
    if "steps" in values:
        steps = _spans(values["steps"], len(text))
    elif rewards is None:
        return None, None
    else:
        steps = line_spans(text)
    if rewards is not None and len(rewards) != len(steps):
        of = f"steps has {len(steps)} spans"
        if "steps" not in values:
            of = f"the completion has {len(steps)} lines, which are its steps when steps is absent"
        raise UserError(f"{name} has {len(rewards)} values but {of}; expected one for each step")
    return steps, rewards


def _spans(value: Any, length: int) -> list[tuple[int, int]]:
    cure = "steps are [start, end] in characters, end excluded, and cover the completion without gap or overlap"
    position = 0
    spans = []
    for i, span in enumerate(value if isinstance(value, (list, tuple)) else [value]):
        if not isinstance(span, (list, tuple)) or len(span) != 2 or not all(is_int(x) for x in span):
            raise UserError(f"steps[{i}] is {shown(span)}; {cure}")
        start, end = map(int, span)
        if start != position:
            fault = "overlaps the step before it" if start < position else "leaves a gap"
            raise UserError(f"steps[{i}] begins at {start}, expected {position}: it {fault}; {cure}")
        if end <= start:
            raise UserError(f"steps[{i}] is {shown(span)}, an empty step; {cure}")
        position = end
        spans.append((start, end))
    if position != length:
        raise UserError(f"steps end at {position} but the completion has {length} characters; {cure}")
    return spans


def ids_of(record: Record, name: str) -> list[int] | None:
    ids, name = record.values.get(name), record.name(name)
    if ids is None:
        return None
    usual = isinstance(ids, (list, tuple)) and set(map(type, ids)) == {int}  # and fast
    if usual and min(ids) >= 0:
        return list(ids)

    def token(value: Any, name: str) -> int:
        if not is_int(value) or value < 0:
            raise UserError(f"{name} is {shown(value)}; expected token ids, integers from 0 up")
        return int(value)

    if not each(ids, name, token):
        raise UserError(f"{name} is an empty list; expected at least one token id, or no column {name}")
    return [int(value) for value in ids]


def _logprobs(
    record: Record, completion_ids: list[int] | None, env_mask: list[int] | None, common: Common
) -> list[float] | None:
    name, logprobs = record.name("logprobs"), record.values.get("logprobs")
    if logprobs is None:
        if common.logprobs:
            raise UserError(f"{name} is missing, and other rows have it; give it for every row, or for none")
        return None
    if completion_ids is None:
        raise UserError(f"{name} without completion_ids; expected the token ids that the log-probabilities belong to")

    if env_mask is not None and isinstance(logprobs, (list, tuple)) and len(logprobs) == len(env_mask):
        logprobs = [
            value if of_model else 0.0 for value, of_model in zip(logprobs, env_mask)
        ]  # the others may be anything
    logprobs = numbers(logprobs, name)
    worst = max(logprobs, default=0.0)
    if worst > _ROUNDING:
        raise UserError(
            f"{name}[{logprobs.index(worst)}] is {worst}; expected log-probabilities, which are never above 0"
        )
    if len(logprobs) != len(completion_ids):
        raise UserError(
            f"{name}: {len(logprobs)} logprobs for {len(completion_ids)} completion_ids; "
            "expected one for each, EOS included"
        )
    return logprobs if worst <= 0.0 else [min(logprob, 0.0) for logprob in logprobs]


def _finish_reason(value: Any) -> str | None:
    if value not in (None, "stop", "length"):
        raise UserError(
            f'finish_reason is {shown(value)}; expected "stop" (the response ended) or "length" (it was cut)'
        )
    return value


def word(value: Any, name: str) -> str | None:
    if is_int(value):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{name} is {shown(value)}; expected a string")
    return value if value is None else _text(value, name)


def of_templates(values: dict[str, Any]) -> dict[str, Any]:
    """What chat templates get beside the messages: tools (a list, or its JSON text, as in TRL) and further names."""
    tools, more = values.get("tools"), values.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = decode(tools)
        except DoubledKey as error:
            raise UserError(f"tools {error}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"tools is {shown(tools)}, a string that is not JSON; expected a list of objects"
            ) from error
    if tools is not None and not (isinstance(tools, (list, tuple)) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"tools is {shown(tools)}; expected a list of objects, the schemas of functions")
    if more is not None and (not isinstance(more, dict) or not all(isinstance(name, str) for name in more)):
        raise UserError(
            f'chat_template_kwargs is {shown(more)}; expected an object such as {{"enable_thinking": false}}'
        )
    if taken := sorted(_OURS & set(more or ())):
        raise UserError(f"chat_template_kwargs sets {', '.join(taken)}, which is decided here; leave it out")
    return {"tools": list(tools) if tools else None, "chat_template_kwargs": more or None}


def _object(value: Any, name: str, example: str) -> dict | None:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{name} is {shown(value)}; expected an object such as {example}")
    return value
