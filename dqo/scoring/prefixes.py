"""Measured pass rates of prefixes: the share of a policy's continuations that a verifier accepts.

The estimator of Math-Shepherd (arXiv 2312.08935) and VinePPO (2410.01679). A prefix is the prompt with the first steps of a
response, as tokens; equal ones share one value. Values are kept in a file of their own, as they are measured: a run that was
killed goes on there, and later ones find them.

Phi of a state is the value of the longest measured prefix of it, of those that this run asked for. So it depends on the state
alone, also in rows whose own steps were not measured, and moves no optimum.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from dqo.data.appending import Appended, appending
from dqo.data.ends import ends_of
from dqo.data.rows import prompt_key
from dqo.data.tokens import Tokens, tokenize_rows
from dqo.errors import UserError
from dqo.grading.pool import VerifierPool
from dqo.grading.verifiers import source_of
from dqo.models.generate import Request, Sampling
from dqo.models.identity import check_holds_model, model_identity
from dqo.models.limits import check_room
from dqo.models.named import load_config, load_tokenizer, stop_ids
from dqo.processes import ALONE, Processes, gather_objects
from dqo.sampling.backends import Backend, dtype_of, load_backend
from dqo.scoring.options import ScoreConfig
from dqo.scoring.rows import Measured, Scored

_AT_ONCE = 2048  # continuations that a backend is asked for together
_WRITTEN = 16  # prefixes that are graded and written together
_OF_THE_RESPONSE = ("completion", "completion_ids", "logprobs", "finish_reason", "steps", "step_rewards")


@dataclass(frozen=True)
class Prefix:
    """A state whose value is wanted."""

    key: str
    prompt_ids: list[int]
    completion_ids: list[int]  # of the steps; [] is the prompt itself
    problem: dict[str, Any]  # for the verifier


def measure(
    rows: list[Scored],
    config: ScoreConfig,
    pool: VerifierPool,
    say: Callable[[str], object],
    processes: Processes | None = None,
) -> list[Measured]:
    """The pass rates of each row's prompt and steps, by `config.prefix_values` continuations each.

    Args:
        say: gets what it costs, before it begins.
        processes: all of them call this with the same rows; each measures a part.

    Raises:
        UserError: when rows do not fit the model, or the file of values belongs to other options.
    """
    processes = processes or ALONE
    path = config.model_name_or_path
    assert path is not None  # else the options are refused
    check_holds_model(path)
    model_config, tokenizer = load_config(path), load_tokenizer(path)
    ends = ends_of(tokenizer, stop_ids(path), messages=not isinstance(rows[0].row.prompt, str))
    vocabulary = model_config.get_text_config().vocab_size
    tokens = tokenize_rows([scored.row for scored in rows], tokenizer, ends, vocabulary, sys.maxsize)
    _check_lengths(tokens, config, model_config)
    kept = config.prefix_cache or f"{config.output_file}.prefixes.jsonl"
    identity = _identity(config, model_identity(path, model_config))

    def load() -> Backend:
        place = {"device": str(processes.device)} if processes.world > 1 else {}
        return load_backend(config.backend, path, dtype=config.dtype, batch_size=config.batch_size, **place)

    def value(row: dict) -> tuple[str, float]:
        return row["prefix"], float(row["value"])

    with appending(kept, identity, value, "--prefix_cache", processes) as file:
        return Measurement(config, pool, file, processes).values(rows, tokens, load, say)


class Measurement:
    """Continues prefixes, grades the responses, and keeps the values in a file."""

    def __init__(self, config: ScoreConfig, pool: VerifierPool, file: Appended, processes: Processes = ALONE):
        assert config.prefix_values is not None
        self.config, self.pool, self.file, self.count = config, pool, file, config.prefix_values
        self.processes = processes

    def values(
        self, rows: list[Scored], tokens: list[Tokens], load: Callable[[], Backend], say: Callable[[str], object]
    ) -> list[Measured]:
        """Those of rows, whose `tokens` are given. `load` loads the model, where something is left to measure."""
        states = [list(prefixes_of(scored, found)) for scored, found in zip(rows, tokens)]
        wanted: dict[str, Prefix] = {}
        for scored, prefixes in zip(rows, states):
            for prefix in prefixes if self._chosen(scored) else prefixes[:1]:
                wanted.setdefault(prefix.key, prefix)
        known: dict[str, float] = {key: value for key, value in self.file.found if key in wanted}
        missing = [prefix for key, prefix in wanted.items() if key not in known]
        batches = list(self._batches(missing, self.processes.world))
        left = sum(map(len, batches)) * self.count
        most = sum(len(batch) * self.count * self._room(batch) for batch in batches)
        say(
            f"{len(wanted):,} prefixes of {len(rows):,} rows, {len(known):,} of them measured before: {left:,} continuations, "
            f"{most:,} tokens at most"
        )
        if mine := batches[self.processes.rank :: self.processes.world]:
            backend = load()
            for batch in mine:
                known |= self._measured(batch, backend)
        known = dict(gather_objects(list(known.items()), self.processes))
        return [
            _row_values([known.get(p.key) for p in found], len(s.row.steps or ())) for s, found in zip(rows, states)
        ]

    def _chosen(self, scored: Scored) -> bool:
        """Whether a row is in the share whose steps are measured: by its text and the seed, whatever the other rows are."""
        told = json.dumps([self.config.seed, prompt_key(scored.row), scored.row.completion], sort_keys=True)
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") < self.config.share * 2**64

    def _batches(self, prefixes: list[Prefix], parts: int) -> Iterator[list[Prefix]]:
        """The longest first: those of a batch have about the same room for a continuation. Few prefixes are `parts` batches."""
        size = max(1, min(_AT_ONCE // self.count, -(-len(prefixes) // parts)))
        order = sorted(prefixes, key=lambda prefix: -len(prefix.completion_ids))
        return (order[i : i + size] for i in range(0, len(order), size))

    def _room(self, batch: list[Prefix]) -> int:
        return self.config.max_completion_length - min(len(prefix.completion_ids) for prefix in batch)

    def _measured(self, batch: list[Prefix], backend: Backend) -> dict[str, float]:
        requests = [Request(p.prompt_ids + p.completion_ids, (p.key, k)) for p in batch for k in range(self.count)]
        config = self.config
        sampling = Sampling(config.temperature, config.top_k, config.top_p, self._room(batch), config.seed)
        texts: dict[int, list[str | None]] = {}  # by the index of the prefix; None: it did not end in time
        ready: list[tuple[Prefix, list[str | None]]] = []
        values: dict[str, float] = {}
        for index, response in backend.generate(requests, sampling, description="continue"):
            prefix = batch[index // self.count]
            ids = prefix.completion_ids + response.ids
            ended = response.ended and len(ids) <= config.max_completion_length
            found = texts.setdefault(index // self.count, [])
            found.append(backend.tokenizer.decode(ids[:-1]) if ended else None)
            if len(found) == self.count:
                ready.append((prefix, texts.pop(index // self.count)))
            if len(ready) == _WRITTEN:
                values |= self._graded(ready)
                ready = []
        return values | self._graded(ready)

    def _graded(self, found: list[tuple[Prefix, list[str | None]]]) -> dict[str, float]:
        """The mean score of each prefix's responses, which is written too."""
        asked = [(text, prefix.problem) for prefix, texts in found for text in texts if text is not None]
        grades = self.pool.grades([text for text, _ in asked], [problem for _, problem in asked])
        values = {
            prefix.key: sum(0.0 if text is None else next(grades).score for text in texts) / self.count
            for prefix, texts in found
        }
        self.file.append({"prefix": key, "value": value, "continuations": self.count} for key, value in values.items())
        return values


def _row_values(found: list[float | None], steps: int) -> Measured:
    """Values of a row from those of its prefixes, the prompt's first; one that was not measured has that of the one before."""
    values: list[float] = []
    for value in found:
        values.append(values[-1] if value is None else value)
    return Measured(values[0], [*values[1:], values[-1]][:steps], outcome_last=True)


def prefixes_of(scored: Scored, tokens: Tokens) -> Iterator[Prefix]:
    """The prompt, and the end of each step that is not the last."""
    problem = {key: value for key, value in scored.problem.items() if key not in _OF_THE_RESPONSE}
    for end in [-1, *tokens.step_ends[:-1]]:
        ids = tokens.completion[: end + 1]
        told = json.dumps([tokens.prompt, ids, scored.values.get("answer")])
        yield Prefix(hashlib.sha256(told.encode()).hexdigest()[:32], tokens.prompt, ids, problem)


def _check_lengths(tokens: list[Tokens], config: ScoreConfig, model_config: PreTrainedConfig) -> None:
    """Refuses rows after whose steps no continuation has room, in max_completion_length or in the model."""
    for found in tokens:
        used = max([0, *(end + 1 for end in found.step_ends[:-1])])
        if used >= config.max_completion_length:
            raise UserError(
                f"{found.row.source}: its steps before the last have {used:,} tokens, and max_completion_length "
                f"{config.max_completion_length:,} leaves no room after them; raise --max_completion_length"
            )
    sources, lengths = [found.row.source for found in tokens], [len(found.prompt) for found in tokens]
    check_room(model_config, sources, lengths, config.max_completion_length, hard=config.backend == "vllm")


def _identity(config: ScoreConfig, model: str) -> dict[str, Any]:
    """What a value depends on, beside its prefix and answer."""
    assert config.model_name_or_path is not None
    names = ("prefix_values", "verifier", "timeout", "max_completion_length", "temperature", "top_k", "top_p", "seed")
    found = {name: getattr(config, name) for name in (*names, "backend")}
    return found | {
        "model": model,
        "dtype": str(dtype_of(config.dtype, config.model_name_or_path)),
        "source of verifier": source_of(config.verifier),
        "command": "dqo score --prefix_values",
    }
