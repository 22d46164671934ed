"""Measured pass rates of prefixes: the share of a policy's continuations that a verifier accepts.

The estimator of Math-Shepherd (arXiv 2312.08935) and VinePPO (2410.01679). A prefix is the prompt with the first steps of a response,
as tokens; equal ones share one value, and so do the verifier's answer and the continuations. Values are kept in a file of their own,
one line each, as they are measured: a run that was killed goes on there, and another one finds them.

Phi of a state is the value of the longest measured prefix of it, of those that this run asked for. So it depends on the state
alone, also in rows whose own steps were not measured, and pays no policy more than another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqo.data.appending import Appended, appending
from dqo.data.rows import prompt_key
from dqo.data.tokens import Tokens, tokenize_rows
from dqo.errors import UserError
from dqo.grading.pool import VerifierPool
from dqo.models.fitness import position_limit
from dqo.models.generate import Request, Sampling
from dqo.models.policy import load_config
from dqo.sampling.backends import Backend, load_backend
from dqo.scoring.options import ScoreConfig
from dqo.scoring.rows import Measured, Scored

_AT_ONCE = 2048  # continuations that a backend is asked for together
_WRITTEN = 16  # prefixes that are graded and written together


@dataclass(frozen=True)
class Prefix:
    """A state whose value is wanted."""

    key: str
    prompt_ids: list[int]
    completion_ids: list[int]  # of the steps; [] is the prompt itself
    problem: dict[str, Any]  # for the verifier


def measure(
    rows: list[Scored], config: ScoreConfig, pool: VerifierPool, say: Callable[[str], object]
) -> list[Measured]:
    """The pass rates of each row's prompt and steps, by `config.prefix_values` continuations each.

    Raises:
        UserError: when rows do not fit the model, or the file of values belongs to other options.
    """
    assert config.model_name_or_path is not None and config.prefix_values is not None  # else the options are refused
    backend = load_backend(
        config.backend, config.model_name_or_path, dtype=config.dtype, batch_size=config.batch_size
    )
    vocabulary = load_config(config.model_name_or_path).get_text_config().vocab_size
    tokens = tokenize_rows([scored.row for scored in rows], backend.tokenizer, backend.ends, vocabulary, sys.maxsize)
    _check_lengths(tokens, config)
    path = config.prefix_cache or f"{config.output_file}.prefixes.jsonl"
    with appending(path, _identity(config, backend), lambda row: (row["prefix"], float(row["value"])), "--prefix_cache") as file:
        values = fill(rows, tokens, config, backend, pool, file, say)
    return values


def fill(
    rows: list[Scored],
    tokens: list[Tokens],
    config: ScoreConfig,
    backend: Backend,
    pool: VerifierPool,
    file: Appended,
    say: Callable[[str], object],
) -> list[Measured]:
    """`measure` with a loaded model and an open file of values."""
    wanted: dict[str, Prefix] = {}
    states = [list(_prefixes(scored, found)) for scored, found in zip(rows, tokens)]
    for scored, prefixes in zip(rows, states):
        for prefix in prefixes if _chosen(scored, config) else prefixes[:1]:
            wanted.setdefault(prefix.key, prefix)
    known = {key: value for key, value in file.found if key in wanted}
    left = [prefix for key, prefix in wanted.items() if key not in known]
    batches = list(_batches(left, config))
    most = sum(len(batch) * config.prefix_values * _room(batch, config) for batch in batches)
    say(
        f"{len(wanted):,} prefixes of {len(rows):,} rows, {len(known):,} of them measured before: "
        f"{len(left) * config.prefix_values:,} continuations, {most:,} tokens at most"
    )
    for batch in batches:
        known |= _measured(batch, config, backend, pool, file)
    return [_row_values([known.get(prefix.key) for prefix in prefixes], len(scored.row.steps or ())) for scored, prefixes in zip(rows, states)]


def _row_values(found: list[float | None], steps: int) -> Measured:
    """Values of a row from those of its prefixes, the prompt's first; one that was not measured has that of the one before."""
    values: list[float] = []
    for value in found:
        values.append(values[-1] if value is None else value)
    return Measured(values[0], [*values[1:], *values[-1:]][:steps])


def _prefixes(scored: Scored, tokens: Tokens) -> Iterator[Prefix]:
    """The prompt, and the end of each step that is not the last."""
    problem = {key: value for key, value in scored.problem.items() if key not in ("completion", "completion_ids", "logprobs")}
    for end in [-1, *tokens.step_ends[:-1]]:
        ids = tokens.completion[: end + 1]
        told = json.dumps([tokens.prompt, ids, scored.values.get("answer")])
        yield Prefix(hashlib.sha256(told.encode()).hexdigest()[:32], tokens.prompt, ids, problem)


def _chosen(scored: Scored, config: ScoreConfig) -> bool:
    """Whether a row is in the share whose steps are measured: by its text and the seed, whatever the other rows are."""
    told = json.dumps([config.seed, prompt_key(scored.row), scored.row.completion], sort_keys=True)
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") < config.share * 2**64


def _batches(prefixes: list[Prefix], config: ScoreConfig) -> Iterator[list[Prefix]]:
    """The longest first: those of a batch have about the same room for a continuation."""
    assert config.prefix_values is not None
    size = max(1, _AT_ONCE // config.prefix_values)
    order = sorted(prefixes, key=lambda prefix: -len(prefix.completion_ids))
    yield from (order[i : i + size] for i in range(0, len(order), size))


def _room(batch: list[Prefix], config: ScoreConfig) -> int:
    return config.max_completion_length - min(len(prefix.completion_ids) for prefix in batch)


def _measured(
    batch: list[Prefix], config: ScoreConfig, backend: Backend, pool: VerifierPool, file: Appended
) -> dict[str, float]:
    count = config.prefix_values
    assert count is not None
    requests = [Request(p.prompt_ids + p.completion_ids, (p.key, k)) for p in batch for k in range(count)]
    sampling = Sampling(config.temperature, config.top_k, config.top_p, _room(batch, config), config.seed)
    texts: dict[int, list[tuple[str, bool]]] = {}  # of the prefixes that are not graded yet
    ready: list[int] = []
    values: dict[str, float] = {}

    def grade() -> None:
        asked = [(i, text) for i in ready for text, ended in texts[i] if ended]
        grades = pool.grades([text for _, text in asked], [batch[i].problem for i, _ in asked])
        passed = dict.fromkeys(ready, 0.0)
        for (i, _), made in zip(asked, grades):
            passed[i] += made.score
        written = [{"prefix": batch[i].key, "value": passed[i] / count, "continuations": count} for i in ready]
        file.append(written)
        values.update({row["prefix"]: row["value"] for row in written})
        for i in ready:
            del texts[i]
        ready.clear()

    for index, response in backend.generate(requests, sampling, description="continue"):
        prefix = batch[index // count]
        ids = prefix.completion_ids + (response.ids[:-1] if response.ended else response.ids)
        ended = response.ended and len(prefix.completion_ids) + len(response.ids) <= config.max_completion_length
        found = texts.setdefault(index // count, [])
        found.append((backend.tokenizer.decode(ids), ended))
        if len(found) == count:
            ready.append(index // count)
        if len(ready) == _WRITTEN:
            grade()
    grade()
    return values


def _check_lengths(tokens: list[Tokens], config: ScoreConfig) -> None:
    """Refuses rows after whose steps no continuation has room, in max_completion_length or in the model."""
    assert config.model_name_or_path is not None
    limit, hard = position_limit(load_config(config.model_name_or_path))
    for found in tokens:
        used = max([0, *(end + 1 for end in found.step_ends[:-1])])
        if used >= config.max_completion_length:
            raise UserError(
                f"{found.row.source}: its steps before the last have {used:,} tokens, and max_completion_length "
                f"{config.max_completion_length:,} leaves no room after them; raise --max_completion_length"
            )
        if limit is not None and hard and len(found.prompt) + config.max_completion_length > limit:
            raise UserError(
                f"{found.row.source}: {len(found.prompt):,} tokens of prompt and {config.max_completion_length:,} of the response "
                f"(max_completion_length), and the model has {limit:,} positions; lower --max_completion_length, or drop the row"
            )


def _identity(config: ScoreConfig, backend: Backend) -> dict[str, Any]:
    """What a value depends on, beside its prefix and answer."""
    names = ("prefix_values", "verifier", "timeout", "dtype", "max_completion_length", "seed", "model_name_or_path")
    found = {name: getattr(config, name) for name in (*names, "temperature", "top_k", "top_p")}
    return found | {"command": "dqo score --prefix_values", "model": model_digest(config), "backend": backend.record}
