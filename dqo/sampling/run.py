"""`dqo sample`: responses of a model to the prompts of a file, as rollout rows; a run that was killed goes on."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from dqo.config.sampling import SampleConfig
from dqo.data.appending import appending, begun_under
from dqo.data.chat import clock_at, reads_clock
from dqo.data.ends import ends_of
from dqo.data.forms import shown
from dqo.data.ids import Continuation
from dqo.data.prompts import Prefix, Prompt, prompt_token_ids, read_prefixes, read_prompts
from dqo.data.rows import prompt_key, report
from dqo.data.sources import BadRow
from dqo.errors import UserError
from dqo.models.generate import Request, Response, Sampling
from dqo.models.identity import check_holds_model, model_identity
from dqo.models.limits import check_room, check_vocabulary
from dqo.models.named import load_config, load_tokenizer, stop_ids
from dqo.processes import ALONE, Processes, gather_objects
from dqo.sampling.backends import Backend, dtype_of, load_backend

logger = logging.getLogger(__name__)

_MANY = 0.2  # share of responses without an end that is worth a warning
_TIME = "time that the chat template was told"


@dataclass(frozen=True)
class Sampled:
    """What the file holds at the end. `new`: rows of this call; `not_ended`: responses that were cut at max_completion_length."""

    rows: int
    new: int
    prompts: int
    tokens: int
    not_ended: int
    tokens_per_second: float  # of this call; 0 where nothing was left to do


@dataclass(frozen=True)
class _Task:
    """A prompt on tokens. `state`: what the model goes on from, the prompt and a prefix."""

    prompt: Prompt
    prompt_ids: list[int]
    prefix_ids: list[int]
    prefix: str
    key: tuple[str, int]  # of the prompt's text, and which of the equal ones it is

    @property
    def state(self) -> list[int]:
        return self.prompt_ids + self.prefix_ids


def sample_rows(config: SampleConfig, quiet: bool = False, processes: Processes = ALONE) -> Sampled:
    """Samples what the file of `config`, whose values were checked, does not have yet. Of several `processes` each samples the
    responses to a part of the prompts, and all of them get what the file holds at the end.

    Raises:
        UserError: for prompts, a model or a file that do not fit, before any work.
    """
    assert config.model_name_or_path is not None and config.output_file is not None  # `problems` refuses None
    path = config.model_name_or_path
    prompts: Sequence[Prompt]
    if config.prefixes is not None:
        prompts = read_prefixes(config.prefixes)
    else:
        assert config.prompts is not None
        prompts = read_prompts(config.prompts)
    check_holds_model(path)
    model_config, tokenizer = load_config(path), load_tokenizer(path)
    output = config.output_file
    now = processes.from_main(lambda: begun_under(output).get(_TIME) or datetime.datetime.now().isoformat())
    with clock_at(datetime.datetime.fromisoformat(now) if reads_clock(tokenizer) else None):
        tasks = _tasks(prompts, tokenizer, ends_of(tokenizer, stop_ids(path)).stops)
    sources, lengths = [task.prompt.source for task in tasks], [len(task.state) for task in tasks]
    check_vocabulary(model_config, sources, [task.state for task in tasks])
    check_room(model_config, sources, lengths, config.max_completion_length, hard=config.backend == "vllm")
    settings = Sampling(config.temperature, config.top_k, config.top_p, config.max_completion_length, config.seed)
    record = _record(config, model_identity(path, model_config))
    options = record | {"num_generations": config.num_generations, "prompts": _hash(prompts)}
    if reads_clock(tokenizer):
        options[_TIME] = now
    with appending(output, options, _kept, processes=processes) as file:
        wanted = [(task, (*task.key, k)) for task in tasks for k in range(config.num_generations)]
        done = {key for key, _, _ in file.found}
        missing = [(task, key) for task, key in wanted if key not in done]
        mine = _part(missing, processes)
        new: list[tuple[tuple, int, str]] = []
        started, tokens = time.perf_counter(), 0
        if mine:
            backend = load_backend(
                config.backend, path, dtype=config.dtype, batch_size=config.batch_size, **_places(config, processes)
            )
            record = {"model": path} | record | backend.record
            requests = [Request(task.state, key) for task, key in mine]
            started = time.perf_counter()
            for index, response in backend.generate(requests, settings, quiet=quiet or not processes.main):
                task, key = mine[index]
                row = _row(task, response, backend, record | {"key": list(key)}, config.temperature > 0)
                file.append([row])
                new.append(_kept(row))
                tokens += len(response.ids)
        parts = gather_objects([(new, tokens, time.perf_counter() - started)], processes)
    found = [*file.found, *chain.from_iterable(new for new, _, _ in parts)]
    tokens, seconds = sum(tokens for _, tokens, _ in parts), max(seconds for _, _, seconds in parts)
    not_ended = sum(reason == "length" for _, _, reason in found)
    if not_ended > _MANY * len(found):
        end = tokenizer.convert_ids_to_tokens(
            ends_of(tokenizer, messages=not isinstance(prompts[0].prompt, str)).trained
        )
        logger.warning(
            "%s of %s responses (%.0f%%) did not end within max_completion_length %s: raise it, or see whether the model was "
            "trained to end responses to such prompts with %s",
            f"{not_ended:,}",
            f"{len(found):,}",
            100 * not_ended / len(found),
            f"{config.max_completion_length:,}",
            end,
        )
    speed = tokens / seconds if tokens else 0.0
    return Sampled(len(found), len(missing), len(tasks), sum(length for _, length, _ in found), not_ended, speed)


def _part(missing: list[tuple[_Task, tuple]], processes: Processes) -> list[tuple[_Task, tuple]]:
    """This process's part of what is missing: all responses to every n-th prompt of n processes."""
    place: dict[tuple, int] = {}
    return [
        (task, key)
        for task, key in missing
        if place.setdefault(task.key, len(place)) % processes.world == processes.rank
    ]


def _places(config: SampleConfig, processes: Processes) -> dict[str, Any]:
    """Where the model runs, as arguments of the backend."""
    if config.backend == "transformers":
        of_launch = str(processes.device) if processes.world > 1 else None
        return {"device": "cpu" if config.use_cpu else of_launch}
    names = ("tensor_parallel_size", "gpu_memory_utilization")
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def _record(config: SampleConfig, identity: str) -> dict[str, Any]:
    """What the responses depend on, for the rows and for a run that goes on; the backend adds its version to the rows."""
    assert config.model_name_or_path is not None
    return {
        "model_hash": identity,
        "backend": config.backend,
        "dtype": str(dtype_of(config.dtype, config.model_name_or_path)).removeprefix("torch."),
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "max_completion_length": config.max_completion_length,
        "seed": config.seed,
    }


def _hash(prompts: Sequence[Prompt]) -> str:
    told = [{**dataclasses.asdict(prompt), "source": None} for prompt in prompts]
    return f"sha256:{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]}"


def _tasks(prompts: Sequence[Prompt], tokenizer, stops: frozenset[int]) -> list[_Task]:
    """Prompts and prefixes on tokens, each with the beginning of its random streams' names."""
    states = prompt_token_ids(tokenizer, list(prompts))
    prefixes = _prefix_ids(prompts, states, tokenizer, stops)
    seen: Counter[str] = Counter()
    tasks = []
    for prompt, ids, (prefix_ids, prefix) in zip(prompts, states, prefixes):
        text = prompt_key(prompt) + (f" {prefix_ids}" if prefix_ids else "")
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        tasks.append(_Task(prompt, ids, prefix_ids, prefix, (name, seen[name])))
        seen[name] += 1
    return tasks


def _prefix_ids(
    prompts: Sequence[Prompt], states: list[list[int]], tokenizer, stops: frozenset[int]
) -> list[tuple[list[int], str]]:
    """Ids and text of each prefix; of a prompt without one, nothing."""
    texts = [p.prefix or "" if isinstance(p, Prefix) else "" for p in prompts]
    made = Continuation(tokenizer)(texts, [ids[-1] for ids in states], offsets=False) if any(texts) else []
    found: list[tuple[list[int], str]] = []
    problems = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Prefix):
            found.append(([], ""))
            continue
        ids = made[index][0] if prompt.prefix_ids is None else prompt.prefix_ids
        if not ids:
            problems.append(
                BadRow(index, prompt.source, f"the tokenizer has no token for prefix {shown(texts[index])}")
            )
        elif max(ids) >= len(tokenizer):
            problems.append(
                BadRow(index, prompt.source, f"prefix_ids has {max(ids)}, which is no token of the tokenizer")
            )
        elif ended := stops & set(ids):
            problems.append(
                BadRow(index, prompt.source, f"the prefix has the end token {min(ended)}; it cannot be continued")
            )
        elif (
            texts[index]
            and ids != made[index][0]
            and (decoded := tokenizer.decode(ids)).split() != texts[index].split()
        ):
            told = f"prefix is {shown(texts[index])}, and prefix_ids are the ids of {shown(decoded)}; drop one of them"
            problems.append(BadRow(index, prompt.source, told))
        else:
            found.append((ids, texts[index] or tokenizer.decode(ids)))
    if problems:
        raise UserError(report("the prefixes", problems, len(prompts)))
    return found


def _row(
    task: _Task, response: Response, backend: Backend, record: dict[str, Any], with_logprobs: bool
) -> dict[str, Any]:
    """A rollout row without a reward. The log-probabilities of a prefix are not known, and a greedy response was not drawn: such
    rows have none."""
    prompt, ids = task.prompt, task.prefix_ids + response.ids
    text = backend.tokenizer.decode(ids[:-1] if response.ended else ids)
    if task.prefix_ids:
        begun = backend.tokenizer.decode(task.prefix_ids)
        if text.startswith(begun):  # it may end in half a character
            text = task.prefix + text[len(begun) :]
        record = record | {"prefix_tokens": len(task.prefix_ids)}
        with_logprobs = False
    row = {
        "prompt": prompt.prompt,
        "completion": text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}],
        "prompt_ids": task.prompt_ids,
        "completion_ids": ids,
        "logprobs": _as_float32(response.logprobs) if with_logprobs else None,
        "finish_reason": "stop" if response.ended else "length",
        "answer": prompt.answer,
        "prompt_id": prompt.prompt_id or task.key[0],
        "tools": prompt.tools,
        "chat_template_kwargs": prompt.chat_template_kwargs,
        "sampling": record,
    }
    return {name: value for name, value in row.items() if value is not None}


def _as_float32(values: list[float]) -> list[float]:
    """The same float32 numbers, with no more digits than tell them apart."""
    return [float(str(value)) for value in np.array(values, dtype=np.float32)]


def _kept(row: dict) -> tuple[tuple, int, str]:
    """Which response a row is, its length, and how it ended."""
    return tuple(row["sampling"]["key"]), len(row["completion_ids"]), row["finish_reason"]
