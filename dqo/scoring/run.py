"""`dqo score`: responses of a rollout file are graded, or their steps rewarded by a model, and written again."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqo.config.values import checked_config
from dqo.data.appending import Appended, appending
from dqo.data.sources import progress
from dqo.data.trajectory import is_trajectory
from dqo.errors import UserError
from dqo.grading.grade import Grade
from dqo.grading.pool import VerifierPool, check_problems
from dqo.grading.verifiers import source_of
from dqo.peers import told
from dqo.scoring.options import ScoreConfig
from dqo.scoring.rows import AT_ONCE, Measured, Scored, add_answers, check_existing, fingerprint, read_scored
from dqo.scoring.steps import step_splitter
from dqo.scoring.summary import CUT, KEPT, UNGRADED, Seen, Summary, seen

if TYPE_CHECKING:  # it imports torch
    from dqo.processes import Processes

logger = logging.getLogger(__name__)

_WRITTEN = 1.0  # seconds after which grades go to the disk
_AHEAD = 1024  # responses that are handed to the pool at once


@told
def score(**options: Any) -> Summary | None:
    """Grades the responses of a rollout file, as `dqo score` does: score(data="rollouts.jsonl", verifier="gsm8k",
    output_file="scored.jsonl"), or rewards their steps by a model: score(data="rollouts.jsonl", by="implicit:RUN", steps="lines",
    output_file="scored.jsonl"). A call that was killed goes on where it was.

    Args:
        options: those of `dqo.scoring.options.ScoreConfig`.

    Returns:
        What was written; None in a process of a launch that is not the first.

    Raises:
        UserError: for options, rows or answers that do not fit, before anything is graded.
    """
    config = checked_config(ScoreConfig, options)
    return score_rows(config, processes=launched_by(config))


def launched_by(config: ScoreConfig) -> Processes | None:
    """The processes of a launch, which measure prefixes together; None without a launch, and torch is not imported.

    Raises:
        UserError: where nothing is measured, and for settings of the launcher that `dqo score` does not have.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        return None
    if config.prefix_values is None:
        raise UserError(
            f"{world} processes were launched, and only what prefix_values measures is split over them; start dqo score as one "
            "process, which grades in as many as --processes says"
        )
    from dqo.sampling.backends import launched_for

    return launched_for("dqo score", config.backend)


def score_rows(
    config: ScoreConfig, say: Callable[[str], object] = logger.info, processes: Processes | None = None
) -> Summary | None:
    """Grades responses and writes them, with their rewards, to output_file.

    Args:
        config: whose values were checked.
        say: gets what the user should know before long work begins.
        processes: those of a launch; they measure together, then the first one grades and writes.

    Returns:
        What was written; None in the other processes of a launch.

    Raises:
        UserError: for rows, answers or files that do not fit, before anything is graded.
    """
    assert config.output_file is not None  # `problems` refuses None
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
    told = None
    if config.by is not None:
        from dqo.scoring.by import ByModel  # torch from here on

        told = ByModel(config, rows)
    identity = _identity(config, read, None if told is None else told.identity)
    with _pool(config) as pool:
        if pool is not None:
            asked = (
                rows if config.prefix_values is not None else [scored for scored in rows if not _kept(scored, config)]
            )
            check_problems([scored.problem for scored in asked], pool.verifier)
        first = processes is None or processes.main
        with appending(config.output_file, identity, seen) if first else nullcontext() as file:
            left = 0 if file is None else len(rows) - len(file.found)
            values: Iterable[Measured | None] = [None] * left
            if told is not None:
                values = told.measured([] if file is None else file.found, say)
            elif pool is not None and config.prefix_values is not None and (left or processes is not None):
                from dqo.scoring.prefixes import measure

                values = measure(rows, config, pool, say if first else lambda _: None, processes)[len(rows) - left :]
            if file is None:
                return None
            return _grade(rows, values, config, pool, file)


def _pool(config: ScoreConfig) -> AbstractContextManager[VerifierPool | None]:
    if config.verifier is None:
        return nullcontext()
    return VerifierPool(config.verifier, config.processes, config.timeout, int(config.memory_gb * 2**30))


def _check_columns(rows: list[Scored], name: str, config: ScoreConfig) -> None:
    if config.existing_rewards == "refuse" and config.verifier is not None:
        cure = "--existing_rewards keep grades the others alone, replace grades all"
        check_existing(rows, name, "reward", cure)
    told = "prefix_values" if config.prefix_values is not None else "by" if config.by is not None else None
    if config.steps is None and told is None:
        return
    if config.existing_rewards != "replace":
        check_existing(rows, name, "step_rewards", "--existing_rewards replace makes them again")
    several = [scored.row.source for scored in rows if is_trajectory(scored.row)]
    if several:
        raise UserError(
            f"{several[0]}: its completion has turns of the model and of its environment, as {len(several):,} of "
            f"{len(rows):,} rows of {name} have, and steps are of a completion of one turn; leave out --steps"
            f"{'' if told is None else f' and --{told}'}, or score those rows apart"
        )
    if config.steps is None:
        lacking = [scored.row.source for scored in rows if scored.row.steps is None]
        if lacking:
            what = "whose ends prefix_values measures" if told == "prefix_values" else f"which {config.by} rewards"
            raise UserError(
                f"{lacking[0]}: has no steps, {what} ({len(lacking):,} of {len(rows):,} rows have none); give --steps lines, "
                "sentences or python:module:function"
            )


def _identity(config: ScoreConfig, read: str, models: str | None) -> dict[str, Any]:
    """What the written rows depend on. `models`: the hash of those of `by`."""
    found = dataclasses.asdict(config) | {"data": read, "command": "dqo score"}
    if models is None:
        found.pop("by_as")
    else:
        found["hash of the models of by"] = models
    for option in ("verifier", "steps"):
        found[f"source of {option}"] = source_of(found[option])
    for option in ("answers", "output_file", "processes", "batch_size", "prefix_cache", "backend"):
        found.pop(option)
    return found


def _grade(
    rows: list[Scored],
    values: Iterable[Measured | None],
    config: ScoreConfig,
    pool: VerifierPool | None,
    file: Appended,
) -> Summary:
    """Grades and writes the rows that the file has not got yet, with `values` of theirs."""
    known: list[Seen] = list(file.found)
    pending: list[dict] = []
    begun = time.monotonic()
    left = rows[len(known) :]
    for scored, measured, (grade, outcome) in progress(zip(left, values, _grades(left, config, pool)), "grade"):
        pending.append(scored.written(grade, outcome, config.verifier, measured))
        together = (len(known) + len(pending)) % AT_ONCE == 0  # the next row waits for the models, see `dqo.scoring.by`
        if together or time.monotonic() - begun > _WRITTEN:
            file.append(pending)
            known += map(seen, pending)
            pending, begun = [], time.monotonic()
    file.append(pending)
    return Summary.of([*known, *map(seen, pending)])


def _kept(scored: Scored, config: ScoreConfig) -> bool:
    return config.existing_rewards == "keep" and scored.row.reward is not None


def _grades(rows: list[Scored], config: ScoreConfig, pool: VerifierPool | None) -> Iterator[tuple[Grade | None, str]]:
    """The grade of each row, None where its reward stays as it is, and the outcome."""
    if pool is None:
        yield from ((None, UNGRADED if scored.row.reward is None else KEPT) for scored in rows)
        return
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
