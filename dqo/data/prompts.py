"""Prompts in a file, one a line, to which responses are wanted: read, checked, and placed on tokens as training places them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dqo.data.chat import prompt_text
from dqo.data.checks import conversation, ids_of, of_templates, word
from dqo.data.forms import Record, shown
from dqo.data.hints import prompt_hint
from dqo.data.json_text import writable
from dqo.data.rows import report
from dqo.data.sources import BadRow, read_records
from dqo.data.tokens import state_ids
from dqo.errors import UserError, printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What a response is wanted to. `answer` is what a verifier compares it with."""

    prompt: str | list[dict]
    answer: str | None = None
    prompt_id: str | None = None
    tools: list[dict] | None = None  # of messages, for the chat template; so are chat_template_kwargs
    chat_template_kwargs: dict | None = None
    source: str = ""  # "prompts.jsonl:12"


@dataclass(frozen=True)
class Prefix(Prompt):
    """A prompt with the beginning of a response to it: its text, its ids, or both; the ids are then what goes on."""

    prefix: str | None = None
    prefix_ids: list[int] | None = None


P = TypeVar("P", bound=Prompt)
FIELDS = ("prompt", "answer", "prompt_id", "tools", "chat_template_kwargs")


def read_prefixes(path: str | Path) -> list[Prefix]:
    """As `read_prompts`, of rows that have `prefix`, a string, or `prefix_ids`, or both."""
    return _read(path, _prefix, (*FIELDS, "prefix", "prefix_ids"))


def read_prompts(path: str | Path, *, answers: bool = False) -> list[Prompt]:
    """The prompts of a .jsonl or .parquet file, a saved data set, or one of the Hugging Face hub.

    Args:
        answers: every row must have an answer.

    Raises:
        UserError: naming the first ten rows that do not fit, each with its file and line.
    """
    return _read(path, lambda record: _prompt(record, answers), FIELDS)


def _read(path: str | Path, made: Callable[[Record], P], fields: tuple[str, ...]) -> list[P]:
    name, records, problems = read_records(path)
    found: list[P] = []
    for record in records:
        try:
            found.append(made(record))
        except UserError as error:
            problems.append(BadRow(record.index, record.source, str(error)))
    if problems:
        raise UserError(report(name, problems, len(found) + len(problems)))
    _check_one_kind(found)
    _name_unused(name, records, fields)
    return found


def _prefix(record: Record) -> Prefix:
    values = {key: value for key, value in record.values.items() if value is not None}
    if "prefix" not in values and "prefix_ids" not in values:
        found = ", ".join(map(str, values)) or "nothing"
        raise UserError(f"has no prefix and no prefix_ids, the beginning of a response; found {found}")
    text = values.get("prefix")
    if text is not None and (not isinstance(text, str) or not text):
        raise UserError(f"prefix is {shown(text)}; expected the text that a response begins with")
    prompt = _prompt(record, answers=False)
    return Prefix(**vars(prompt), prefix=text, prefix_ids=ids_of(record, "prefix_ids"))


def _prompt(record: Record, answers: bool) -> Prompt:
    values: dict[str, Any] = {key: value for key, value in record.values.items() if value is not None}
    if "prompt" not in values:
        raise UserError(f"has no prompt; found {', '.join(map(str, values)) or 'nothing'}{prompt_hint(values)}")
    prompt = conversation(values["prompt"], "prompt")
    if not prompt:
        raise UserError("prompt is empty; the first token of a response needs something before it")
    answer = word(values.get("answer"), "answer")
    if answers and answer is None:
        raise UserError("has no answer; expected the string that a response is graded by")
    templates = of_templates(values)
    for name, value in {"prompt": prompt, **templates}.items():
        if not writable(value):
            raise UserError(f"{name} is {shown(value)}, which JSON cannot hold; mend it, or drop the row")
    if isinstance(prompt, str) and any(templates.values()):
        given = ", ".join(key for key, value in templates.items() if value)
        raise UserError(
            f"has {given}, which a chat template reads, and prompt is a string; give messages, or drop {given}"
        )
    return Prompt(prompt, answer, word(values.get("prompt_id"), "prompt_id"), **templates, source=record.source)


def _check_one_kind(prompts: Sequence[Prompt]) -> None:
    first = prompts[0]
    for other in prompts:
        if isinstance(other.prompt, str) != isinstance(first.prompt, str):
            kinds = ["a string" if isinstance(p.prompt, str) else "a list of messages" for p in (first, other)]
            raise UserError(
                f"{other.source}: prompt is {kinds[1]}, and {first.source} has {kinds[0]}; one file holds one kind"
            )


def _name_unused(name: str, records: list[Record], fields: tuple[str, ...]) -> None:
    counts = Counter(str(key) for record in records for key in record.values if key not in fields)
    if counts:
        columns = ", ".join(f"{key!r} (in {count:,} rows)" for key, count in counts.items())
        logger.warning("%s: columns that prompts do not have, and are not used: %s", name, printable(columns))


def prompt_token_ids(tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The state before each response, as training has it: messages through the chat template, strings as the tokenizer writes
    them.

    Raises:
        UserError: naming the prompts that the chat template refuses, and those without tokens.
    """
    texts, problems = [], []
    for index, prompt in enumerate(prompts):
        try:
            texts.append(prompt_text(tokenizer, prompt))
        except UserError as error:
            problems.append(BadRow(index, prompt.source, str(error)))
    found = []
    if not problems:
        found = state_ids(tokenizer, texts, [not isinstance(prompt.prompt, str) for prompt in prompts])
        problems = [
            BadRow(index, prompt.source, "prompt has no tokens; a response needs a state before it")
            for index, (prompt, ids) in enumerate(zip(prompts, found))
            if not ids
        ]
    if problems:
        raise UserError(report("the prompts", problems, len(prompts)))
    return found
