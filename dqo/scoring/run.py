"""`dqo score`: responses of a rollout file are graded, and written again with their rewards."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from dqo.config.values import refuse, suggestion, typed, value_problems
from dqo.data.appending import Appended, appending
from dqo.data.sources import progress
from dqo.errors import UserError
from dqo.grading.grade import Grade
from dqo.grading.pool import VerifierPool, check_problems
from dqo.scoring.options import ScoreConfig
from dqo.scoring.rows import Scored, add_answers, check_existing, fingerprint, read_scored
from dqo.scoring.steps import step_splitter
from dqo.scoring.summary import CUT, KEPT, Seen, Summary, seen

logger = logging.getLogger(__name__)

_WRITTEN = 1.0  # seconds after which grades go to the disk
_AHEAD = 1024  # responses that are handed to the pool at once


def score(data: Any, **options: Any) -> Summary:
    """Grades responses and writes them, with their rewards, to output_file.

    Args:
        data: a path, a hub name, or an iterable of rows; see `dqo.data.rows.read_rows`. Rewards may be missing.
        options: those of `dqo score --help`, such as verifier and output_file.

    Raises:
        UserError: for rows, answers, options or files that do not fit, before anything is graded.
    """
    hints = get_type_hints(ScoreConfig)
    for name, value in options.items():
        if name not in hints:
            raise UserError(f"score has no option {name!r}.{suggestion(name, hints)}")
        try:
            options[name] = typed(hints[name], value)
        except TypeError as error:
            raise UserError(f"{name} {error} (from score)") from None
    for name in ("verifier", "output_file"):
        if name not in options:
            raise UserError(f"score needs {name}")
    config = ScoreConfig(data=data, **options)
    refuse(value_problems(config) or config.problems(), dict.fromkeys(options, "score"))
    return score_rows(config, logger.info)


def score_rows(config: ScoreConfig, say: Callable[[str], object]) -> Summary:
    """`score` with checked options. `say` gets what the user should know before long work begins."""
    name, rows = read_scored(config.data)
    if isinstance(config.data, str) and Path(config.output_file).resolve() == Path(config.data).resolve():
        raise UserError(f"output_file {config.output_file} is the file that is scored; choose another")
    read = fingerprint(rows)
    if config.answers is not None:
        add_answers(rows, config.answers)
    _check_columns(rows, name, config)
    if config.steps is not None:
        split = step_splitter(config.steps)
        for scored in progress(rows, "split into steps"):
            scored.cut(split(scored.text))
    with (
        VerifierPool(config.verifier, config.processes, config.timeout) as pool,
        appending(config.output_file, _identity(config, read), seen) as file,
    ):
        asked = rows if config.prefix_values is not None else [scored for scored in rows if not _kept(scored, config)]
        check_problems([scored.problem for scored in asked], config.verifier)
        values: Sequence[Any] = [None] * len(rows)
        if config.prefix_values is not None:
            from dqo.scoring.prefixes import measure  # torch from here on

            values = measure(rows, config, pool, say)
        return _grade(rows, values, config, pool, file)


def _check_columns(rows: list[Scored], name: str, config: ScoreConfig) -> None:
    if config.existing_rewards == "refuse":
        cure = "--existing_rewards keep grades the others alone, replace grades all"
        check_existing(rows, name, "reward", cure)
    if config.existing_rewards != "replace" and (config.steps is not None or config.prefix_values is not None):
        check_existing(rows, name, "step_rewards", "--existing_rewards replace makes them again")
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
    if config.answers is not None:
        found["answers"] = hashlib.sha256(Path(config.answers).read_bytes()).hexdigest()
    for option in ("verifier", "steps"):
        if str(found[option]).startswith("python:"):
            found[f"source of {option}"] = _source(found[option])
    for option in ("output_file", "processes", "batch_size", "prefix_cache", "backend"):
        found.pop(option)
    return found


def _source(name: str) -> str | None:
    """sha256 of the file of python:module:function."""
    spec = importlib.util.find_spec(name.split(":")[1])
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def _grade(
    rows: list[Scored], values: Sequence[Any], config: ScoreConfig, pool: VerifierPool, file: Appended
) -> Summary:
    """Grades and writes the rows that the file has not got yet."""
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
