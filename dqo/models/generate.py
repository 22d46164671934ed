"""Responses of a policy by transformers' generate: prompts sorted by length, so that equal ones need no padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from dqo.models.attention import unpacked


@dataclass(frozen=True)
class Response:
    ids: list[int]  # with its end token when it ended
    ended: bool


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


def _generated(policy: PreTrainedModel, **inputs: Any) -> Any:
    with unpacked(policy), without_generation_config(policy):
        return policy.generate(**inputs)  # type: ignore[operator]  # a model for generation has it, not its base class


def _reads_padding(policy: PreTrainedModel, prompt: list[int], length: int, pad_id: int) -> bool:
    """Whether the next token after `prompt` changes with padding before it up to `length`: some recurrences take it in."""
    if length == len(prompt):
        return False
    first = GenerationConfig(
        max_new_tokens=1, do_sample=False, pad_token_id=pad_id, output_logits=True, return_dict_in_generate=True
    )
    logits = []
    for padding in (0, length - len(prompt)):
        ids = torch.tensor([[pad_id] * padding + prompt], device=policy.device)
        attention = torch.ones_like(ids)
        attention[:, :padding] = 0
        output = _generated(policy, input_ids=ids, attention_mask=attention, generation_config=first)
        logits.append(output.logits[0].float())
    scale = logits[0].abs().max().clamp_min(1e-12)
    return bool((logits[1] - logits[0]).abs().max() / scale > (1e-3 if policy.dtype == torch.float32 else 0.1))


@torch.inference_mode()
def generate(
    policy: PreTrainedModel,
    prompts: list[list[int]],
    *,
    stop_ids: Iterable[int],
    pad_id: int,
    num_generations: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 1024,
    seed: int = 0,
    description: str = "sample",
    quiet: bool = False,
) -> list[list[Response]]:
    """`num_generations` responses of every prompt; temperature 0 is greedy. Samples the whole distribution, whatever the model's
    generation_config says. A response has ended when it has one of `stop_ids`.

    Deterministic given the seed on one machine; the batch composition is part of what the seed fixes.
    """
    greedy = temperature == 0.0
    settings = (
        {"do_sample": False} if greedy else {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    )
    stops = frozenset(stop_ids)
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), pad_token_id=pad_id, **settings
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    order = [i for i in order for _ in range(num_generations)]
    responses: list[list[Response]] = [[] for _ in prompts]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if order and _reads_padding(policy, prompts[order[0]], max(len(prompt) for prompt in prompts), pad_id):
        by_length = [list(found) for _, found in groupby(order, key=lambda i: len(prompts[i]))]
        batches = [same[i : i + batch_size] for same in by_length for i in range(0, len(same), batch_size)]
    torch.manual_seed(seed)
    for indices in tqdm(batches, desc=description, unit="batch", disable=quiet, leave=False):
        longest = max(len(prompts[i]) for i in indices)
        ids = torch.full((len(indices), longest), pad_id, device="cpu")
        attention = torch.zeros_like(ids)
        for row, i in enumerate(indices):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i], device="cpu")
            attention[row, longest - len(prompts[i]) :] = 1
        output = _generated(
            policy,
            input_ids=ids.to(policy.device),
            attention_mask=attention.to(policy.device),
            generation_config=generation,
        )
        for i, row in zip(indices, output[:, longest:].tolist()):
            end = next((at for at, token in enumerate(row) if token in stops), None)
            responses[i].append(Response(row if end is None else row[: end + 1], end is not None))
    return responses
