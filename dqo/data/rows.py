"""The rollout file: one response a row, read and checked before any model is loaded."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from dqo.data.checks import Common, checked
from dqo.data.forms import Record, check_columns, to_flat
from dqo.data.sources import BadRow, progress, read_records
from dqo.data.turns import turn_count
from dqo.errors import UserError
from dqo.files import replacing

logger = logging.getLogger(__name__)

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
            name on the Hugging Face hub ("org/name" or "org/name:split"), or an iterable of dicts (a list, a
            datasets.Dataset) or of Rows; in any one of the forms of `dqo.data.forms`.
        skip_bad_rows: drop rows that do not fit and log how many, instead of raising.
        reward_threshold: a row without a label is right when its reward is above this.
        scored: False: flat rows may lack both reward and label, which are None then, as `dqo sample` writes them.

    Raises:
        UserError: naming the first ten rows that do not fit, each with its file and line.
    """
    name, records, problems = read_records(source)
    return rows_of(
        name, records, problems, skip_bad_rows=skip_bad_rows, reward_threshold=reward_threshold, scored=scored
    )


def rows_of(
    name: str,
    records: list[Record],
    problems: list[BadRow],
    *,
    skip_bad_rows: bool = False,
    reward_threshold: float = 0.5,
    scored: bool = True,
) -> list[Row]:
    """The rows of records as `read_records` returns them; see `read_rows`."""
    flat, rows, problems = [], [], list(problems)
    if records:
        form = check_columns(name, records, scored)
        if form != "flat":
            logger.info("%s: read as %s rows", name, form)
        for record in records:
            try:
                flat.extend(to_flat(record, form, reward_threshold))
            except UserError as error:
                problems.append(BadRow(record.index, record.source, str(error)))
    common = Common.of(flat)
    for record in progress(flat, f"check {name}"):
        try:
            rows.append(Row(**checked(record, common, reward_threshold, scored), source=record.source))
        except UserError as error:
            problems.append(BadRow(record.index, record.source, str(error)))
    if problems:
        message = report(name, problems, len(rows) + len(problems))
        if not skip_bad_rows or not rows:
            # an option of training; `dqo score` drops no row
            usable = f"\n{len(rows)} rows fit: --skip_bad_rows goes on with them" if rows and scored else ""
            raise UserError(message + usable)
        logger.warning("%s\nThey are dropped; %d rows are left", message, len(rows))
    return rows


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
    return json.dumps([row.prompt, *more] if more else row.prompt, sort_keys=True)


def check_contrast(rows: list[Row]) -> str:
    """A warning when no prompt has responses with different rewards, else "".

    Raises:
        UserError: when all rewards are equal and no step has a reward, so that there is nothing to learn.
    """
    rewards = {row.reward for row in rows}
    if len(rewards) == 1 and not any(any(row.process_rewards or ()) for row in rows):
        raise UserError(
            f"every reward is {rewards.pop()}: nothing to learn. Check the grader, or add responses that it "
            "rewards differently"
        )
    by_prompt: dict[str, set] = defaultdict(set)
    for row in rows:
        by_prompt[prompt_key(row)].add(row.reward)
    if any(len(found) > 1 for found in by_prompt.values()):
        return ""
    return (
        f"no prompt has responses with different rewards ({len(rows)} responses, {len(by_prompt)} prompts): "
        "responses can only be compared across prompts"
    )


def check_process_reward(rows: list[Row], name: str, process_reward: str | None) -> None:
    """Refuses rewards of steps or turns without a choice of what they do, a choice without any, and potentials that differ where
    they belong to one state."""
    found = next((row for row in rows if row.process_rewards is not None), None)
    if process_reward == "potential":
        _check_prompt_values(rows, name)
        found = found or next((row for row in rows if row.prompt_value is not None), None)
    if found is not None and process_reward is None:
        what = "step" if found.turn_rewards is None else "turn"
        raise UserError(
            f"{name} has {what}_rewards; choose what they do: --process_reward additive (added on the last token of their "
            f"{what}), --process_reward potential (they are pass rates of the prefixes, whose differences are paid and move no "
            "optimum) or --process_reward none"
        )
    if found is None and process_reward not in (None, "none"):
        raise UserError(
            f"{name} has no step_rewards, so --process_reward {process_reward} would do nothing; drop the option, or add "
            "steps and step_rewards, or turn_rewards (`dqo score FILE --prefix_values 8` measures pass rates of prefixes)"
        )


def _check_prompt_values(rows: list[Row], name: str) -> None:
    """A potential of the prompt that all its rows share moves no optimum; different ones are rewards."""
    values: dict[str, Row] = {}
    for row in rows:
        first = values.setdefault(prompt_key(row), row)
        if row.prompt_value != first.prompt_value:
            raise UserError(
                f"{row.source or name}: prompt_value is {row.prompt_value}, and {first.source or 'a row'} of the same prompt has "
                f"{first.prompt_value}; as potentials they must be equal: give every row of a prompt one value, or none"
            )


def duplicate_count(rows: list[Row]) -> int:
    """Rows that repeat prompt and completion of an earlier row."""
    return len(rows) - len({(prompt_key(row), json.dumps(row.completion, sort_keys=True)) for row in rows})


def split_by_prompt(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, in their order; all rows of a prompt fall on one side.

    A prompt is held out with probability `fraction` by a hash of its text and the seed, whatever the other
    rows are. So a small file may have none.
    """
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"the held-out fraction must be in [0, 1), got {fraction}")
    train: list[Row] = []
    held_out: list[Row] = []
    for row in rows:
        digest = hashlib.sha256(f"{seed}/{prompt_key(row)}".encode()).digest()
        (held_out if int.from_bytes(digest[:8], "big") < fraction * 2**64 else train).append(row)
    return train, held_out
