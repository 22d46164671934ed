"""The text of rows. A chat template writes messages; strings stay as they are."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dqo.data.rows import Prompted, Row
from dqo.errors import UserError

_PLAIN = {"role", "content"}
_REASONING = {"reasoning_content", "reasoning", "thinking"}  # transformers hands each to a template under every name
_OPENING = re.compile(r"<\|?[\w:]*(?:think|reason)[\w:]*\|?>\s*\Z", re.IGNORECASE)  # <think>, <|START_THINKING|> ...


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion's text. Character i of the row's content is character i + shift of it."""

    text: str
    shift: int = 0


def completion_text(row: Row) -> str:
    """The completion's content, of all its messages, without tags or tool calls."""
    if isinstance(row.completion, str):
        return row.completion
    return "\n".join(message.get("content", "") for message in row.completion)


def written_text(row: Row) -> str:
    """What the model wrote of a completion, its turns one below the other: a tool's or a user's words are no answer of the model.
    Of a string that `env_mask` alone divides it is all of the string."""
    if isinstance(row.completion, str):
        return "\n".join(row.completion[start:end] for start, end in row.turn_spans or [(0, len(row.completion))])
    return "\n".join(message.get("content", "") for message in row.completion if message["role"] == "assistant")


def template_text(tokenizer) -> str:
    """The source of the tokenizer's chat templates; "" without one."""
    found = tokenizer.chat_template or ""
    return "\n".join(found.values()) if isinstance(found, dict) else found


def reads_clock(tokenizer) -> bool:
    """Whether what the chat template writes depends on the time."""
    return "strftime_now" in template_text(tokenizer)


@contextmanager
def clock_at(when: datetime.datetime | None) -> Iterator[None]:
    """Inside, chat templates take `when` for the time; with None they read the clock."""
    if when is None:
        yield
        return
    from transformers.utils import chat_template_utils

    class Stopped(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return when

    clock = chat_template_utils.datetime
    module: Any = chat_template_utils  # its name `datetime` is a class, which types do not let be replaced
    clock, module.datetime = module.datetime, Stopped
    try:
        yield
    finally:
        module.datetime = clock


def unread_rows(tokenizer, rows: Iterable[Row]) -> dict[str, list[int]]:
    """Keys of messages, tools and chat_template_kwargs that the chat template does not read, with the indices of the rows that
    have them."""
    source = template_text(tokenizer)
    found: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if not isinstance(row.prompt, str):
            keys = {key for message in (*row.prompt, *row.completion) for key in message} - _PLAIN
            for key in keys | set(row.chat_template_kwargs or ()) | ({"tools"} if row.tools else set()):
                found.setdefault(key, []).append(i)
    return {key: of for key, of in found.items() if not _read(key, source)}


def _read(key: str, source: str) -> bool:
    names = "|".join(map(re.escape, _REASONING if key in _REASONING else {key}))
    return re.search(rf"(?<!\w)(?:{names})(?!\w)", source) is not None


def prompt_text(tokenizer, row: Prompted) -> str:
    """The prompt as the policy reads it: messages with the head of the answer, or with their last one open when it is the
    assistant's own.

    Raises:
        UserError: when the template refuses the messages.
    """
    if isinstance(row.prompt, str):
        return row.prompt
    if not tokenizer.chat_template:
        raise UserError(
            "prompt is a list of messages but the tokenizer has no chat_template; "
            "use string prompts or a tokenizer with a template"
        )
    goes_on = row.prompt[-1]["role"] == "assistant"
    return rendered(tokenizer, row, row.prompt, continue_final_message=goes_on, add_generation_prompt=not goes_on)


def completion_after(tokenizer, row: Row, prompt: str, end: str) -> Completion:
    """The completion as it goes on from the text of the prompt.

    A message with nothing but content is its content. With more that the template reads (reasoning_content, tool_calls) it is
    what the template writes after the prompt, up to `end`. A tag such as <think> that ends the prompt is not repeated.

    Raises:
        UserError: when the template writes such a message elsewhere than after the prompt.
    """
    content = completion_text(row)
    if isinstance(row.prompt, str) or isinstance(row.completion, str):
        return opened_once(prompt, Completion(content))
    message = row.completion[-1]
    source = template_text(tokenizer)
    more = sorted(key for key, value in message.items() if value and key not in _PLAIN and _read(key, source))
    if not more:
        return opened_once(prompt, Completion(content))
    whole = rendered(tokenizer, row, [*row.prompt, message])
    if row.prompt[-1]["role"] == "assistant" or not whole.startswith(prompt):
        raise UserError(
            f"the completion has {', '.join(more)}, and the chat template does not write it as a continuation of the prompt; "
            "write all of the response into content"
        )
    text = whole[len(prompt) :]
    text = text[: text.rindex(end)] if end in text else text
    if row.steps and content not in text:
        raise UserError("the chat template changes the completion's content, so steps cannot be placed; drop steps")
    return opened_once(prompt, Completion(text, max(text.rfind(content), 0)))


def opening(prompt: str) -> str | None:
    """The tag that opens the reasoning at the end of a prompt's text, without white space."""
    found = _OPENING.search(prompt)
    return found[0].rstrip() if found else None


def opened_once(prompt: str, completion: Completion) -> Completion:
    """The completion without a tag that opens the reasoning and ends the prompt already."""
    tag, text = opening(prompt), completion.text.lstrip()
    if tag is None or not text.startswith(tag):
        return completion
    text = text.removeprefix(tag).removeprefix(prompt[len(prompt.rstrip()) :])
    return Completion(text, completion.shift - (len(completion.text) - len(text)))


def rendered(tokenizer, row: Prompted, messages: list[dict], **options) -> str:
    """What the chat template writes for these messages of the row.

    Raises:
        UserError: when the template refuses them.
    """
    try:
        more = row.chat_template_kwargs or {}
        return tokenizer.apply_chat_template(messages, tools=row.tools, tokenize=False, **options, **more)
    except Exception as error:  # a template may raise anything
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the chat template refuses the messages: {what}") from error
