"""The rollout file: one response a row, read and checked before any model is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from dqo.data.checks import Common, checked
from dqo.data.forms import Record, Shapes, check_columns, needed, one_row_each, to_flat
from dqo.data.sources import BadRow, Source, open_source
from dqo.data.turns import turn_count
from dqo.errors import UserError
from dqo.files import replacing

logger = logging.getLogger(__name__)

_ENCODED = json.JSONEncoder(sort_keys=True).encode
Say = Callable[[int, str], None]
_LISTED = 10  # problems in one message
_NAMED = 9  # further rows that are named with a problem


class Prompted(Protocol):
    """What is read of a row, or of a prompt, before its response."""

    @property
    def prompt(self) -> str | list[dict]: ...
    @property
    def tools(self) -> list[dict] | None: ...
    @property
    def chat_template_kwargs(self) -> dict | None: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One response. What `read_rows` returns always has reward and label, unless unscored rows were asked for."""

    prompt: str | list[dict]
    completion: str | list[dict]  # of the prompt's kind; messages: the first of assistant
    # None only before `read_rows` has read a row that a caller made: typed as what all other code sees
    reward: float = None  # type: ignore[assignment]  # of the outcome alone
    label: bool = None  # type: ignore[assignment]
    steps: list[tuple[int, int]] | None = None  # character spans that cover the completion
    step_rewards: list[float] | None = None  # one for each step
    prompt_value: float | None = (
        None  # the pass rate of the prompt: where step rewards are potentials, that of the first state
    )
    prompt_ids: list[int] | None = None
    completion_ids: list[int] | None = None
    logprobs: list[float] | None = None  # the sampler's, one for each of completion_ids
    env_mask: list[int] | None = None  # of completion_ids, 1 where the model wrote the token; None: everywhere
    turn_spans: list[tuple[int, int]] | None = (
        None  # character spans of the model's turns; None: all of it is one, or messages
    )
    turn_rewards: list[float] | None = None  # one for each turn of the model
    finish_reason: str | None = None  # "stop" or "length"
    answer: str | None = None
    prompt_id: str | None = None
    sampling: dict | None = None  # what sampled it
    grading: dict | None = None  # what graded it, and how that ended
    tools: list[dict] | None = None  # what the chat template is told of, beside the messages
    chat_template_kwargs: dict | None = None
    source: str = ""  # "rollouts.jsonl:12"; not written to files

    @property
    def turns(self) -> int:
        """How many times the model had its turn."""
        return turn_count(self.completion, self.env_mask, self.turn_spans)

    @property
    def process_rewards(self) -> list[float] | None:
        """Rewards on the way: of steps, or of turns."""
        return self.turn_rewards if self.step_rewards is None else self.step_rewards


def read_rows(
    source: Any, *, skip_bad_rows: bool = False, reward_threshold: float = 0.5, scored: bool = True
) -> list[Row]:
    """Reads and checks rows.

    Args:
        source: path of a .jsonl or .parquet file or of a folder that `Dataset.save_to_disk` wrote, a data set's
            name on the Hugging Face hub ("org/name[@revision][[:configuration]:split]"), or an iterable of dicts (a list, a
            datasets.Dataset) or of Rows; in any one of the forms of `dqo.data.forms`.
        skip_bad_rows: drop rows that do not fit and log how many, instead of raising.
        reward_threshold: a row without a label is right when its reward is above this.
        scored: False: flat rows may lack both reward and label, which are None then, as `dqo sample` writes them.

    Raises:
        UserError: naming the first ten rows that do not fit, each with its file and line.
    """
    return _rows(open_source(source), skip_bad_rows, reward_threshold, scored)


def rows_of(name: str, records: list[Record], problems: list[BadRow], *, scored: bool = True) -> list[Row]:
    """The rows of records as `read_records` returns them; see `read_rows`."""
    return _rows(Source(name, lambda: chain(problems, records)), scored=scored)


def _rows(source: Source, skip_bad_rows: bool = False, reward_threshold: float = 0.5, scored: bool = True) -> list[Row]:
    rows: list[Row] = []
    problems: list[BadRow] = []
    for item in checked_rows(source, reward_threshold, scored, logger.log):
        if isinstance(item, Row):
            rows.append(item)
        else:
            problems.append(item)
    refuse(source.name, problems, len(rows), skip_bad_rows, scored, logger.log)
    return rows


def checked_rows(source: Source, reward_threshold: float, scored: bool, say: Say) -> Iterator[Row | BadRow]:
    """The rows of a source one by one, and why others are none, in their order. The source is read twice or three times: what
    rows have in common is known after the first.

    Args:
        say: called with a level of `logging` and a line.

    Raises:
        UserError: for columns that rows cannot have, and a file that changes meanwhile or cannot be read twice.
    """
    if source.path is not None and not source.path.is_file():
        raise UserError(
            f"{source.path}: is a pipe, or no file at all; rows are read more than once: write them to a file"
        )
    shapes = Shapes()
    for item in source.items():
        if isinstance(item, Record):
            shapes.note(item)
    if not shapes.all:
        yield from (item for item in source.items() if isinstance(item, BadRow))
        return
    form, unused = check_columns(source.name, shapes, scored)
    if unused:
        say(logging.WARNING, unused)
    if form != "flat":
        say(logging.INFO, f"{source.name}: read as {form} rows")

    def flat_records() -> Iterator[Record | BadRow]:
        for item in source.items():
            if isinstance(item, BadRow):
                yield item
                continue
            shapes.tidy(item)
            try:
                yield from to_flat(item, form, reward_threshold)
            except UserError as error:
                yield BadRow(item.index, item.source, str(error))

    if one_row_each(form):
        common = Common.of_shapes(shapes.all, needed(form))
    else:
        common = Common.of(item for item in flat_records() if isinstance(item, Record))
    for item in flat_records():
        if isinstance(item, BadRow):
            yield item
            continue
        try:
            yield Row(**checked(item, common, reward_threshold, scored), source=item.source)
        except UserError as error:
            yield BadRow(item.index, item.source, str(error))
    source.check_unchanged()


def refuse(name: str, problems: list[BadRow], fit: int, skip_bad_rows: bool, scored: bool, say: Say) -> None:
    """Raises for rows that do not fit, or says that they are dropped. `fit`: how many do."""
    if not problems:
        return
    message = report(name, problems, fit + len(problems))
    if not skip_bad_rows or not fit:
        # an option of training; `dqo score` drops no row
        usable = f"\n{fit} rows fit: --skip_bad_rows goes on with them" if fit and scored else ""
        raise UserError(message + usable)
    say(logging.WARNING, f"{message}\nThey are dropped; {fit} rows are left")


def report(name: str, problems: list[BadRow], total: int) -> str:
    """The first ten problems, in the order of their rows; what is the same for several rows is said once."""
    same: dict[str, list[str]] = {}
    for problem in sorted(problems, key=lambda problem: problem.index):
        same.setdefault(problem.message, []).append(problem.source)
    lines = [_once(message, sources) for message, sources in list(same.items())[:_LISTED]]
    left = sum(map(len, list(same.values())[_LISTED:]))
    if left:
        lines.append(f"... and {left} more")
    if len(problems) == 1:
        return lines[0]
    return "\n  ".join([f"{name}: {len(problems)} of {total} rows do not fit:", *lines])


def _once(message: str, sources: list[str]) -> str:
    first, *more = sources
    if not more:
        return f"{first}: {message}"
    named = ", ".join(more[:_NAMED]) + (", ..." if len(more) > _NAMED else "")
    return f"{first}: {message} (the same in {len(more):,} more: {named})"


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes JSON Lines; the file appears whole or not at all."""
    path = Path(path)
    if path.suffix == ".parquet":
        raise UserError(f"{path}: rows are written as JSON Lines; name the file .jsonl")
    names = [f.name for f in fields(Row) if f.name != "source"]
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
        for row in rows:
            values = {name: value for name in names if (value := getattr(row, name)) is not None}
            file.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")


def prompt_key(row: Prompted) -> str:
    """A key that rows of the same prompt share, and no others."""
    more = [row.tools, row.chat_template_kwargs] if row.tools or row.chat_template_kwargs else []
    return _ENCODED([row.prompt, *more] if more else row.prompt)


def completion_key(row: Row) -> str:
    """A key that rows with the same completion share, and no others."""
    return _ENCODED(row.completion)
