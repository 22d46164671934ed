"""`dqo score`: responses of a rollout file are graded, and written again with their rewards."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dqo.config.values import checked_config
from dqo.data.appending import Appended, appending
from dqo.data.sources import progress
from dqo.data.trajectory import is_trajectory
from dqo.errors import UserError
from dqo.grading.grade import Grade
from dqo.grading.pool import VerifierPool, check_problems
from dqo.grading.verifiers import source_of
from dqo.scoring.options import ScoreConfig
from dqo.scoring.rows import Scored, add_answers, check_existing, fingerprint, read_scored
from dqo.scoring.steps import step_splitter
from dqo.scoring.summary import CUT, KEPT, Seen, Summary, seen

logger = logging.getLogger(__name__)

_WRITTEN = 1.0  # seconds after which grades go to the disk
_AHEAD = 1024  # responses that are handed to the pool at once


def score(**options: Any) -> Summary:
    """Grades the responses of a rollout file, as `dqo score` does: score(data="rollouts.jsonl", verifier="gsm8k",
    output_file="scored.jsonl"). A call that was killed goes on where it was.

    Args:
        options: those of `dqo.scoring.options.ScoreConfig`.

    Raises:
        UserError: for options, rows or answers that do not fit, before anything is graded.
    """
    return score_rows(checked_config(ScoreConfig, options))


def score_rows(config: ScoreConfig, say: Callable[[str], object] = logger.info) -> Summary:
    """Grades responses and writes them, with their rewards, to output_file.

    Args:
        config: whose values were checked.
        say: gets what the user should know before long work begins.

    Raises:
        UserError: for rows, answers or files that do not fit, before anything is graded.
    """
    assert config.verifier is not None and config.output_file is not None  # `problems` refuses None
    name, rows = read_scored(config.data)
    if Path(config.output_file).resolve() == Path(config.data).resolve():
        raise UserError(f"output_file {config.output_file} is the file that is scored; choose another")
    if config.prefix_cache is not None and Path(config.prefix_cache).resolve() == Path(config.output_file).resolve():
        raise UserError(f"prefix_cache {config.prefix_cache} is the output_file too; choose another")
    if config.answers is not None:
        add_answers(rows, config.answers)
    undivided = sum(isinstance(s.row.completion, str) and s.row.env_mask is not None for s in rows)
    if undivided:
        logger.warning(
            "%d completions are strings that only env_mask divides: what the environment wrote is graded with them. Give them as "
            "messages, or with turn_spans in the place of ids, where the verifier should read the model's words alone",
            undivided,
        )
    read = fingerprint(rows)
    _check_columns(rows, name, config)
    if config.steps is not None:
        split = step_splitter(config.steps)
        for scored in progress(rows, "split into steps"):
            scored.cut(split(scored.text))
    with VerifierPool(config.verifier, config.processes, config.timeout, int(config.memory_gb * 2**30)) as pool:
        asked = rows if config.prefix_values is not None else [scored for scored in rows if not _kept(scored, config)]
        check_problems([scored.problem for scored in asked], config.verifier)
        with appending(config.output_file, _identity(config, read), seen) as file:
            values: Sequence[Any] = [None] * len(rows)
            if config.prefix_values is not None and len(file.found) < len(rows):
                from dqo.scoring.prefixes import measure  # torch from here on

                values = measure(rows, config, pool, say)
            return _grade(rows, values, config, pool, file)


def _check_columns(rows: list[Scored], name: str, config: ScoreConfig) -> None:
    if config.existing_rewards == "refuse":
        cure = "--existing_rewards keep grades the others alone, replace grades all"
        check_existing(rows, name, "reward", cure)
    if config.existing_rewards != "replace" and (config.steps is not None or config.prefix_values is not None):
        check_existing(rows, name, "step_rewards", "--existing_rewards replace makes them again")
    if config.steps is not None or config.prefix_values is not None:
        several = [scored.row.source for scored in rows if is_trajectory(scored.row)]
        if several:
            raise UserError(
                f"{several[0]}: its completion has turns of the model and of its environment, as {len(several):,} of "
                f"{len(rows):,} rows of {name} have, and steps are of a completion of one turn; leave out --steps and "
                "--prefix_values, or score those rows apart"
            )
    if config.prefix_values is not None and config.steps is None:
        lacking = [scored.row.source for scored in rows if scored.row.steps is None]
        if lacking:
            raise UserError(
                f"{lacking[0]}: has no steps, whose ends prefix_values measures ({len(lacking):,} of {len(rows):,} rows have "
                "none); give --steps lines, sentences or python:module:function"
            )


def _identity(config: ScoreConfig, read: str) -> dict[str, Any]:
    """What the written rows depend on."""
    found = dataclasses.asdict(config) | {"data": read, "command": "dqo score"}
    for option in ("verifier", "steps"):
        found[f"source of {option}"] = source_of(found[option])
    for option in ("answers", "output_file", "processes", "batch_size", "prefix_cache", "backend"):
        found.pop(option)
    return found


def _grade(
    rows: list[Scored], values: Sequence[Any], config: ScoreConfig, pool: VerifierPool, file: Appended
) -> Summary:
    """Grades and writes the rows that the file has not got yet."""
    assert config.verifier is not None
    known: list[Seen] = list(file.found)
    pending: list[dict] = []
    begun = time.monotonic()
    left = list(zip(rows, values))[len(known) :]
    for (scored, measured), (grade, outcome) in progress(zip(left, _grades(rows[len(known) :], config, pool)), "grade"):
        pending.append(scored.written(grade, outcome, config.verifier, measured))
        if time.monotonic() - begun > _WRITTEN:
            file.append(pending)
            known += map(seen, pending)
            pending, begun = [], time.monotonic()
    file.append(pending)
    return Summary.of([*known, *map(seen, pending)])


def _kept(scored: Scored, config: ScoreConfig) -> bool:
    return config.existing_rewards == "keep" and scored.row.reward is not None


def _grades(rows: list[Scored], config: ScoreConfig, pool: VerifierPool) -> Iterator[tuple[Grade | None, str]]:
    """The grade of each row, None where its reward stays as it is, and the outcome."""
    for start in range(0, len(rows), _AHEAD):
        some = rows[start : start + _AHEAD]
        keep = [_kept(scored, config) for scored in some]
        cut = [config.truncated == "wrong" and scored.row.finish_reason == "length" for scored in some]
        asked = [scored for scored, kept, short in zip(some, keep, cut) if not kept and not short]
        made = pool.grades([scored.text for scored in asked], [scored.problem for scored in asked])
        for kept, short in zip(keep, cut):
            if kept:
                yield None, KEPT
            elif short:
                yield Grade(0.0, parsed=False), CUT
            else:
                grade = next(made)
                yield grade, grade.outcome
