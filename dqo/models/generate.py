"""Responses of a policy by transformers' generate, each from a random stream of its own; prompts sorted by length."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from dqo.models.attention import unpacked
from dqo.models.draws import Draws, Sampling

__all__ = ["Request", "Response", "Sampling", "generate", "in_order", "text_of", "without_generation_config"]


@dataclass(frozen=True)
class Request:
    """One response that is wanted. `key`, strings and integers, names its random stream: equal keys get equal draws."""

    prompt_ids: list[int]
    key: tuple


@dataclass(frozen=True)
class Response:
    ids: list[int]  # with its end token when it ended
    logprobs: list[float]  # of each id, in the distribution that it was drawn from; greedy: in the model's own
    ended: bool


def in_order(found: Iterator[tuple[int, Response]]) -> list[Response]:
    """All responses, in the order of their requests."""
    return [response for _, response in sorted(found, key=lambda pair: pair[0])]


def text_of(tokenizer, response: Response) -> str:
    """The text of a response, without its end token."""
    return tokenizer.decode(response.ids[:-1] if response.ended else response.ids)


@contextmanager
def without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """The model has a fresh generation_config inside, its own again outside: `generate` takes every field that its argument
    leaves open (min_p, no_repeat_ngram_size, num_beams ...) from the model's."""
    inner = getattr(model, "get_base_model", lambda: model)()  # under peft's wrapper
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


@torch.inference_mode()
def _generated(policy: PreTrainedModel, prompts: Sequence[list[int]], length: int, pad_id: int, **options: Any) -> Any:
    """What transformers' generate returns for prompts with padding on their left up to `length`."""
    ids = torch.full((len(prompts), length), pad_id, device="cpu")
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt, device="cpu")
        attention[row, length - len(prompt) :] = 1
    inputs = {"input_ids": ids.to(policy.device), "attention_mask": attention.to(policy.device)}
    with unpacked(policy), without_generation_config(policy):
        return policy.generate(**inputs, **options)  # type: ignore[operator]  # a model for generation has it, not its base class


def _reads_padding(policy: PreTrainedModel, prompt: list[int], length: int, pad_id: int) -> bool:
    """Whether the next token after `prompt` changes with padding before it up to `length`: some recurrences take it in."""
    if length == len(prompt):
        return False
    first = GenerationConfig(
        max_new_tokens=1, do_sample=False, pad_token_id=pad_id, output_logits=True, return_dict_in_generate=True
    )
    alone, padded = (
        _generated(policy, [prompt], size, pad_id, generation_config=first).logits[0].float()
        for size in (len(prompt), length)
    )
    scale = alone.abs().max().clamp_min(1e-12)
    return bool((padded - alone).abs().max() / scale > (1e-3 if policy.dtype == torch.float32 else 0.1))


def _batches(policy: PreTrainedModel, prompts: list[list[int]], batch_size: int, pad_id: int) -> list[list[int]]:
    """Indices of prompts, sorted by length: equal ones need no padding. A model that reads padding gets none."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order]
    if order and _reads_padding(policy, prompts[order[0]], len(prompts[order[-1]]), pad_id):
        groups = [list(found) for _, found in groupby(order, key=lambda i: len(prompts[i]))]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def generate(
    policy: PreTrainedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    pad_id: int,
    batch_size: int = 1024,
    description: str = "sample",
    quiet: bool = False,
) -> Iterator[tuple[int, Response]]:
    """(index of the request, response) of every request, as batches end. A response has ended when it has one of `stop_ids`.

    The distribution is the policy's under `sampling` alone, whatever the model's generation_config says. Token t of a response
    is a function of that distribution and of number t of the stream that (sampling.seed, request.key) names. So a response
    depends on the other requests and on `batch_size` by the rounding of the logits only.
    """
    stops = frozenset(stop_ids)
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, eos_token_id=sorted(stops), pad_token_id=pad_id, do_sample=False
    )
    prompts = [request.prompt_ids for request in requests]
    with tqdm(total=len(prompts), desc=description, unit="response", disable=quiet, leave=False) as bar:
        tokens = 0
        for indices in _batches(policy, prompts, batch_size, pad_id):
            longest = len(prompts[indices[-1]])
            draws = Draws(sampling, [requests[i].key for i in indices], policy.device)
            output = _generated(
                policy,
                [prompts[i] for i in indices],
                longest,
                pad_id,
                generation_config=settings,
                logits_processor=LogitsProcessorList([draws]),
            )
            for i, response in zip(indices, _responses(output[:, longest:], draws.logprobs(), stops)):
                tokens += len(response.ids)
                yield i, response
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
            bar.update(len(indices))


def _responses(ids: Tensor, logprobs: Tensor, stops: frozenset[int]) -> Iterator[Response]:
    """Rows of (B, T) ids and log-probabilities, each up to its first end."""
    for row, values in zip(ids.tolist(), logprobs.tolist()):
        end = next((at for at, token in enumerate(row) if token in stops), None)
        length = len(row) if end is None else end + 1
        yield Response(row[:length], values[:length], end is not None)
